"""Muon: a matrix moves by its momentum with all singular values made equal.

    M <- lerp(M, gradient, 1 - beta)
    O  = orthogonalized(lerp(gradient, M, beta))                     (Nesterov's momentum)
    W <- (1 - lr * weight_decay) * W - lr * 0.2 * sqrt(max(rows, columns)) * O

The last factor makes an update as large as one of AdamW, so that one learning rate serves both.
Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the factor: Liu et al. 2025,
arXiv:2502.16982.

torch.optim.Muon takes one matrix after the other and reads the learning rate on the host. Here all
matrices of one size are one batched product, and what changes from step to step is read where it
lies, so that a CUDA graph can hold the update.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5; Jordan's, which are steep at 0


def orthogonalized(x: torch.Tensor) -> torch.Tensor:
    """About U V^T of each x = U S V^T, by Newton-Schulz.

    A singular value of s |x| ends between 0.68 and 1.21 if s is 0.002 or more, near 485 s if less.

    Args:
        x: (K, m, n), m <= n; bfloat16 is precise enough.
    Returns: (K, m, n); 0 where x is.
    """
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def flops(matrices: Sequence[tuple[nn.Parameter, int]]) -> float:
    """FLOPs of the products of one update of such `matrices` of `Muon`."""
    total = 0
    for parameter, bands in matrices:
        m, n = sorted((parameter.shape[0] // bands, parameter.shape[1]))
        total += bands * ITERATIONS * (4 * m * m * n + 2 * m**3)
    return total


class Muon(torch.optim.AdamW):
    """Muon for matrices and fused AdamW for the other parameters, as one optimizer.

    Heeds `found_inf` as torch's fused optimizers do: where it is 1, nothing changes.

    Args:
        matrices: of float32, (parameter, bands): each of so many equal bands of rows is a matrix
            of its own; queries, keys and values are three.
        groups: AdamW's.
        weight_decay: of `matrices`; decoupled, as AdamW's.
        dtype: of the products; weights and momentum are float32.
        options: of torch.optim.AdamW; Muon's beta is the first of betas.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[nn.Parameter, int]],
        groups: Sequence[dict],
        *,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
        **options,
    ):
        self.dtype = dtype
        parameters, bands = zip(*matrices, strict=True)
        own = {"params": list(parameters), "bands": bands, "weight_decay": weight_decay}
        super().__init__([own, *groups], fused=True, **options)

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's looks for its slots everywhere

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "bands" not in group]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if "bands" in group:
                self._update(group)
        return loss

    def _update(self, group: dict) -> None:
        """Muon's part, for one group."""
        beta, skipped = group["betas"][0], getattr(self, "found_inf", None)
        if skipped is None:
            skipped = torch.zeros((), device=group["params"][0].device)
        lr = group["lr"] * (1 - skipped)
        kept = 1 - group["weight_decay"] * lr
        directions = defaultdict(list)  # by size, (m, n), m <= n: (weights of a shape, theirs)
        for (rows, columns), matrices in self._by_shape(group).items():
            weights, gradients, momenta = zip(*matrices, strict=True)
            momentum = torch.stack(momenta)
            # A step to be skipped moves the momentum to where it is; NaN times 0 would be NaN.
            gradient = torch.where(skipped > 0, momentum, torch.stack(gradients))
            momentum.lerp_(gradient, 1 - beta)
            torch._foreach_copy_(momenta, momentum.unbind())
            direction = gradient.lerp_(momentum, beta)
            directions[min(rows, columns), max(rows, columns)].append((weights, direction))
        for (m, n), shapes in directions.items():
            x = torch.cat([d if d.shape[1] == m else d.mT for _, d in shapes])
            x = orthogonalized(x.to(self.dtype)).float() * (-0.2 * n**0.5 * lr)
            updates = x.split([len(weights) for weights, _ in shapes])
            for (weights, d), update in zip(shapes, updates, strict=True):
                update = update if d.shape[1] == m else update.mT.contiguous()  # as its weights
                torch._foreach_mul_(weights, kept)
                torch._foreach_add_(weights, update.unbind())

    def _by_shape(self, group: dict) -> dict[tuple[int, int], list[tuple[torch.Tensor, ...]]]:
        """(weights, gradient, momentum) of every matrix of the group, a band being one."""
        found = defaultdict(list)
        for parameter, count in zip(group["params"], group["bands"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            tensors = parameter, parameter.grad, state["momentum_buffer"]
            for band in zip(*(tensor.chunk(count) for tensor in tensors), strict=True):
                found[tuple(band[0].shape)].append(band)
        return found
