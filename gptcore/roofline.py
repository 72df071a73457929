"""What a training step does by kind of work, and the least time it takes: table and roofline.

The floor of a kind is the larger of FLOPs / matmul rate and bytes / copy rate, both measured on
this machine. FLOPs are the model's, nothing recomputed; bytes are those of fused ops that read
every input and write every output once, past the caches: a model that lives in them can be faster.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gptcore import muon
from gptcore.config import TrainConfig
from gptcore.model import GPT
from gptcore.naive import NaiveGPT
from gptcore.optim import hidden_matrices

PRODUCTS, ATTENTION, OTHER = "matrix products", "attention", "other kernels"
OPTIMIZER, DATA, GAPS = "optimizer", "data", "host gaps"
KINDS = (PRODUCTS, ATTENTION, OTHER, OPTIMIZER, DATA, GAPS)


@dataclass(frozen=True)
class Work:
    """What one kind of work does in a step at least; an elementwise op is a FLOP per number."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Profile:
    """Seconds of a step by kind, their floors, and what was measured beside them."""

    seconds: dict[str, float]  # traced
    work: dict[str, Work]
    traced_s: float  # a step by the clock
    timed_s: float  # a step while nothing watched
    tokens: int
    matmul_rate: float
    copy_rate: float

    def floor_s(self, kind: str) -> float:
        """The least time the work of `kind` takes at the measured rates."""
        work = self.work[kind]
        return max(work.flops / self.matmul_rate, work.bytes / self.copy_rate)

    @property
    def mfu(self) -> float:
        """FLOPs of the model a second, over what a matrix product reaches."""
        flops = self.work[PRODUCTS].flops + self.work[ATTENTION].flops
        return flops / self.timed_s / self.matmul_rate

    def table(self) -> str:
        """What is printed."""
        lines = [
            f"profile {1e3 * self.timed_s:.2f} ms a step, {1e3 * self.traced_s:.2f} while traced: "
            f"{self.tokens / self.timed_s:,.0f} tokens/s, "
            f"MFU {self.mfu:.1%} of {self.matmul_rate / 1e9:,.0f} GFLOP/s; "
            f"copy {self.copy_rate / 1e9:,.1f} GB/s",
            f"  {'':16}{'ms':>10}{'share':>8}{'floor ms':>10}{'x floor':>9}",
        ]
        for kind in KINDS:
            seconds, floor = self.seconds[kind], self.floor_s(kind)
            times = f"{seconds / floor:9.1f}" if floor else f"{'-':>9}"
            share = seconds / self.traced_s
            lines.append(f"  {kind:16}{1e3 * seconds:10.3f}{share:8.1%}{1e3 * floor:10.3f}{times}")
        seconds = sum(self.seconds.values())
        floor = sum(map(self.floor_s, KINDS))
        lines.append(
            f"  {'sum':16}{1e3 * seconds:10.3f}{seconds / self.traced_s:8.1%}"
            f"{1e3 * floor:10.3f}{seconds / floor:9.1f}"
        )
        return "\n".join(lines)

    def plot(self, image: Path) -> None:
        """The roofline: FLOP/s against FLOPs a byte, under what the machine can do."""
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        points = {
            kind: (work.flops / work.bytes, work.flops / self.seconds[kind])
            for kind, work in self.work.items()
            if work.flops and self.seconds[kind] > 0
        }
        ridge = self.matmul_rate / self.copy_rate
        edges = [min(0.1, *(x for x, _ in points.values())), ridge]
        edges.append(4 * max(ridge, *(x for x, _ in points.values())))
        roof = [min(self.matmul_rate, x * self.copy_rate) for x in edges]
        ceilings = f"{self.copy_rate / 1e9:,.1f} GB/s, {self.matmul_rate / 1e9:,.0f} GFLOP/s"
        axes.plot(edges, roof, color="black", label=f"measured: {ceilings}")
        for number, (kind, (x, y)) in enumerate(points.items()):
            share, colour = self.seconds[kind] / self.traced_s, f"C{number}"
            label = f"{kind}, {1e3 * self.seconds[kind]:.3g} ms ({share:.0%})"
            axes.scatter(x, y, color=colour, label=label)
            roof_here = min(self.matmul_rate, x * self.copy_rate)
            axes.vlines(x, y, roof_here, colors=colour, linestyles="dotted")
        axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        figure.savefig(image, dpi=120)


def model_flops(model: nn.Module, sequences: int) -> dict[str, float]:
    """Of forward and backward: 6 per weight and token in matrix products, and causal attention.

    Attention multiplies each of T queries by (T + 1) / 2 keys on average, twice (scores, values).
    """
    T, heads = model.config.block_size, _heads(model)
    weights = sum(linear.weight.numel() for linear in _linears(model))
    return {
        PRODUCTS: 6.0 * sequences * T * weights,
        ATTENTION: 6.0 * sequences * T * heads * (T + 1),
    }


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _heads(model: nn.Module) -> int:
    """Channels of the heads of all layers together."""
    config = model.config
    return config.n_layer * config.n_head * config.D if isinstance(model, (GPT, NaiveGPT)) else 0


def work_of(model: nn.Module, config: TrainConfig, dtype: torch.dtype) -> dict[str, Work]:
    """Model FLOPs and least bytes of a step by kind; activations have `dtype`.

    In tensors of tokens x channels: attention 4 forward and 8 backward; dropout+add+LayerNorm,
    twice a layer, 4 and 5; the activation, four wide, 3 backward (forward it ends a product);
    embedding and first LayerNorm 7; rotation 6 and 6, normalised first 9 backward. Token shift,
    once a model, is left out. Each logit and its gradient once. AdamW moves 28 bytes a
    parameter, SGD with momentum and Muon 20, the norm of the gradient 4, a bfloat16 copy 12.
    """
    shape, size = model.config, dtype.itemsize
    T, C = shape.block_size, shape.n_embd
    tokens = config.sequences * T
    linears, heads = _linears(model), _heads(model)
    layers = shape.n_layer if heads else 0
    weights = sum(linear.weight.numel() for linear in linears)
    ends = sum(linear.in_features + linear.out_features for linear in linears)
    products = 3 * size * (tokens * ends + config.gradient_accumulation_steps * weights)
    rotation = (15 if shape.qk_norm else 12) * heads * (shape.position == "rotary")
    numbers = tokens * ((30 * layers + 7) * C + rotation + 2 * shape.vocab_size)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrices = hidden_matrices(model) if config.optimizer == "muon" else []
    lighter = parameters if config.optimizer == "sgd" else sum(p.numel() for p, _ in matrices)
    update = parameters * (28 + 4 + 12 * (dtype != torch.float32)) - 8 * lighter
    update_flops = update / 4 + muon.flops(matrices)
    flops = model_flops(model, config.sequences)
    return {
        PRODUCTS: Work(flops[PRODUCTS], products),
        ATTENTION: Work(flops[ATTENTION], 12 * size * tokens * heads),
        OTHER: Work(numbers, size * numbers),
        OPTIMIZER: Work(update_flops, update),
        DATA: Work(0, 20 * tokens),  # two tokens of 2 bytes are read, of 8 written
        GAPS: Work(),
    }
