"""An update by Muon, matrices of one size at once: against one matrix after the other?

Question
    What does batching save over torch.optim.Muon, and how near is an update to its products' rate?
Method
    The matrices of a GPT's blocks, queries, keys and values apart, with gradients of N(0, 1).
    torch's multiplies bfloat16 whatever the dtype, and is held to that dtype's errors.
Formula
    FLOPs 5 (4 m^2 n + 2 m^3) a matrix of m x n, m <= n. bytes: weight and momentum read and
    written, gradient read, in float32.
"""

import functools
from collections.abc import Iterator

import torch
from torch import nn

from bench.harness import OURS, Case, Check, Contestant, Options, Tensors, Work, check_tensors
from gptcore.config import GPTConfig
from gptcore.model import GPT
from gptcore.muon import COEFFICIENTS, ITERATIONS, Muon, flops
from gptcore.optim import hidden_matrices

LR, BETA, DECAY = 1e-3, 0.9, 0.1
SIZES = {  # name -> layers, heads, channels
    "nanogpt-cpu": (4, 4, 128),
    "notebook": (6, 6, 384),
    "gpt2-124m": (12, 12, 768),
}


def matrices_of(layers: int, heads: int, C: int) -> list[tuple[nn.Parameter, int]]:
    """Matrices without data, and bands of rows in each."""
    with torch.device("meta"):
        return hidden_matrices(GPT(GPTConfig(n_layer=layers, n_head=heads, n_embd=C)))


class _Update:
    """Weights and gradients of one size, the same for everyone, and what is right."""

    def __init__(self, matrices: list[tuple[nn.Parameter, int]], options: Options):
        self.device, self.dtype = options.device, options.dtype
        generator = torch.Generator(self.device).manual_seed(1337)
        draw = functools.partial(torch.randn, generator=generator, device=self.device)
        self.bands = [bands for _, bands in matrices]
        self.weights = [0.02 * draw(tuple(p.shape)) for p, _ in matrices]
        self.gradients = [draw(tuple(p.shape)) for p, _ in matrices]

    def ours(self) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        """Our optimizer, and the matrices it updates."""
        parameters = [nn.Parameter(w.clone()) for w in self.weights]
        for parameter, gradient in zip(parameters, self.gradients, strict=True):
            parameter.grad = gradient.clone()
        matrices = list(zip(parameters, self.bands, strict=True))
        options = {"lr": LR, "betas": (BETA, 0.99), "weight_decay": DECAY, "dtype": self.dtype}
        return Muon(matrices, [], **options), parameters

    def torchs(self) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        """torch's, which takes every band as a parameter."""
        parameters = [nn.Parameter(w.clone()) for w in self._each(self.weights)]
        for parameter, gradient in zip(parameters, self._each(self.gradients), strict=True):
            parameter.grad = gradient.clone()
        options = {"lr": LR, "momentum": BETA, "weight_decay": DECAY}
        return torch.optim.Muon(parameters, adjust_lr_fn="match_rms_adamw", **options), parameters

    def _each(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [b for x, n in zip(tensors, self.bands, strict=True) for b in x.chunk(n)]

    def plain(self, dtype: torch.dtype) -> Tensors:
        """What the first update adds to each band, its products computed in `dtype`."""
        found, kept = {}, torch.promote_types(dtype, torch.float32)
        pairs = zip(self._each(self.weights), self._each(self.gradients), strict=True)
        for number, (weight, gradient) in enumerate(pairs):
            weight, gradient = weight.double(), gradient.double() * (1 - BETA**2)
            x = (gradient.mT if gradient.shape[0] > gradient.shape[1] else gradient).to(dtype)
            x = x / x.norm()
            a, b, c = COEFFICIENTS
            for _ in range(ITERATIONS):
                gram = x @ x.mT
                x = a * x + (b * gram + c * gram @ gram) @ x
            x = (x if x.shape == gradient.shape else x.mT).to(kept)
            after = weight.to(kept) * (1 - LR * DECAY) - LR * 0.2 * max(x.shape) ** 0.5 * x
            found[f"{number}"] = after.double() - weight
        return found

    def check(self, make, dtype: torch.dtype, ours: bool) -> Check:
        """Hold the first update against the formula."""
        optimizer, parameters = make()
        optimizer.step()
        before, after = self._each(self.weights), (p.detach() for p in parameters)
        pairs = zip(before, self._each(list(after)) if ours else after, strict=True)
        actual = {f"{n}": a.double() - b.double() for n, (b, a) in enumerate(pairs)}
        return check_tensors(actual, self.plain(dtype), self.plain(torch.float64), ours=ours)


def _open(matrices, options: Options) -> Iterator[Contestant]:
    update = _Update(matrices, options)

    def contestant(name, make, dtype):
        return Contestant(
            name,
            start=lambda: make()[0].step,
            check=lambda: update.check(make, dtype, ours=name == OURS),
        )

    yield contestant(OURS, update.ours, options.dtype)
    if options.wants("torch"):
        yield contestant("torch", update.torchs, torch.bfloat16)


def cases(options: Options) -> list[Case]:
    """nanoGPT's CPU size, the notebook's, on a GPU GPT-2's."""
    found = []
    for name, (layers, heads, C) in SIZES.items():
        if name == "gpt2-124m" and options.device.type != "cuda":
            continue
        matrices = matrices_of(layers, heads, C)
        numbers = sum(parameter.numel() for parameter, _ in matrices)
        found.append(
            Case(
                name=f"muon {name} L{layers}-C{C}",
                shape={"L": layers, "H": heads, "C": C},
                dtype=str(options.dtype).removeprefix("torch."),
                work=Work(flops(matrices), 20 * numbers),
                unit="TFLOP/s",
                open=functools.partial(_open, matrices, options),
                contestants=(OURS, "torch"),
                quick=name == "nanogpt-cpu",
            )
        )
    return found
