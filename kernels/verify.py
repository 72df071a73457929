"""The certificate: every op, dtype and shape against a float64 reference.

Rule (DESIGN.md section 5), per output and gradient, in max norm and in relative RMS:

    error(fused) <= 2 * error(same formula, plain PyTorch, same dtype) + tiny

error_max = max |a - r| / max |r|,   error_rms = ||a - r|| / ||r||,   r the float64 reference.
tiny is one rounding to nearest of the result's dtype at the largest magnitude: eps / 2 in max
norm, eps / 4 in RMS. It matters only where plain PyTorch happens to be exact. The error of a
few numbers is a draw of luck, not a statistic, so below 16 elements tiny is 2 eps in both norms.
"""

from dataclasses import dataclass

import torch

ALLOWED_RATIO = 2.0
FEW_ELEMENTS = 16


@dataclass(frozen=True)
class Comparison:
    """Errors of one tensor against float64, of the op and of plain PyTorch in the same dtype."""

    name: str
    error_max: float
    error_rms: float
    plain_max: float
    plain_rms: float
    tiny_max: float
    tiny_rms: float

    @property
    def passed(self) -> bool:
        """Whether both norms obey the 2x rule; NaN never does."""
        return (
            self.error_max <= ALLOWED_RATIO * self.plain_max + self.tiny_max
            and self.error_rms <= ALLOWED_RATIO * self.plain_rms + self.tiny_rms
        )

    def __str__(self) -> str:
        return (
            f"{self.name}: max {self.error_max:.2e} (plain {self.plain_max:.2e}), "
            f"rms {self.error_rms:.2e} (plain {self.plain_rms:.2e}), tiny {self.tiny_max:.1e}"
        )


def relative_errors(actual: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(max-norm, RMS) error of `actual` relative to the float64 `reference`."""
    if actual.numel() == 0:
        return 0.0, 0.0
    difference = actual.detach().double() - reference.detach()
    magnitude, norm = reference.abs().max().item(), reference.norm().item()
    return (
        difference.abs().max().item() / (magnitude or 1.0),
        difference.norm().item() / (norm or 1.0),
    )


def compare(
    name: str, actual: torch.Tensor, plain: torch.Tensor, reference: torch.Tensor
) -> Comparison:
    """Measure `actual` and `plain` PyTorch of the same dtype against a float64 `reference`.

    Raises: ValueError if shapes or dtypes disagree.
    """
    if actual.shape != reference.shape or plain.shape != reference.shape:
        raise ValueError(
            f"compare: {name}: shapes must agree; got {tuple(actual.shape)}, "
            f"{tuple(plain.shape)}, reference {tuple(reference.shape)}"
        )
    if reference.dtype != torch.float64 or actual.dtype != plain.dtype:
        raise ValueError(
            f"compare: {name}: reference must be float64 and dtypes agree; got "
            f"{reference.dtype}, {actual.dtype}, {plain.dtype}"
        )
    eps = torch.finfo(actual.dtype).eps
    few = actual.numel() < FEW_ELEMENTS
    return Comparison(
        name,
        *relative_errors(actual, reference),
        *relative_errors(plain, reference),
        tiny_max=2 * eps if few else eps / 2,
        tiny_rms=2 * eps if few else eps / 4,
    )
