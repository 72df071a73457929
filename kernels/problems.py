"""The certificate's problems: every op with its inputs, its plain formula and its sizes.

A `Problem` is one op at one size in one dtype: its inputs, the fused call, and the same formula in
plain PyTorch, for `kernels.checks` to run fused, plain and in float64.
"""

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import kernels
from kernels import rng
from kernels.rotary import rotary_reference

Tensors = dict[str, torch.Tensor]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SITE = 18  # any would do


@dataclass(frozen=True)
class Problem:
    """One op at one size.

    `call(inputs, backend)` and `plain(inputs)` return the outputs by name; `plain` computes in
    the dtype of its inputs, float64 included. `key` is the op's randomness, if it has any.
    """

    inputs: Tensors
    call: Callable[[Tensors, str], Tensors]
    plain: Callable[[Tensors], Tensors]
    key: torch.Tensor | None = None
    op: str = ""
    name: str = ""


class Draw:
    """Random inputs of one problem, the same on every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """A tensor of the problem's dtype."""
        values = torch.randn(shape, generator=self.generator) * scale
        return values.to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def key(self) -> torch.Tensor:
        """A (3,) key whose sequences start at index 3 of the global batch."""
        seed, step = torch.randint(2**32, (2,), generator=self.generator).tolist()
        return rng.make_key(seed, step, 3, device=self.device)


# ------------------------------------------------------------------------------- plain formulas


def plain_attention(q, k, v, scale: float, keep: torch.Tensor | None, keep_scale: float):
    """softmax(scale q k^T + causal mask) v; keep (B, H, Tq, Tk) is what dropout leaves."""
    Tq, Tk = q.shape[2], k.shape[2]
    seen = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    p = (q @ k.mT * scale).masked_fill(~seen, float("-inf")).softmax(-1)
    return (p if keep is None else p * keep * keep_scale) @ v


def attention_keep(key: torch.Tensor, B: int, H: int, Tq: int, Tk: int, p: float, site=SITE):
    """The mask of DESIGN's layout for attention: plane b * H + h, row the query's position."""
    first = int(key[2])
    planes, rows = range(first * H, (first + B) * H), range(Tk - Tq, Tk)
    return rng.dropout_keep_mask(key, site, planes, rows, Tk, p).view(B, H, Tq, Tk)


def activation_keep(key: torch.Tensor, B: int, T: int, C: int, p: float):
    """The mask of DESIGN's layout for activations: plane 0, row b * T + t, column the channel."""
    first = int(key[2])
    rows = range(first * T, (first + B) * T)
    return rng.dropout_keep_mask(key, SITE, 1, rows, C, p).view(B, T, C)


def plain_activation(z: torch.Tensor, activation: str) -> torch.Tensor:
    """ReLU, tanh-GELU or ReLU squared."""
    if activation == "gelu":
        return F.gelu(z, approximate="tanh")
    return F.relu(z) if activation == "relu" else F.relu(z).square()


def plain_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, reduction: str):
    """The loss in float32, or in float64 for float64 logits."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction=reduction)


# -------------------------------------------------------------------------------------- problems


def attention(draw: Draw, B=1, H=1, T=16, D=16, Tk=None, p=0.0, scale=None) -> Problem:
    """`causal_attention`."""
    Tk = T if Tk is None else Tk
    q, k, v = draw.normal(B, H, T, D), draw.normal(B, H, Tk, D), draw.normal(B, H, Tk, D)
    key = draw.key() if p else None
    keep = attention_keep(key, B, H, T, Tk, p) if p else None
    options = {"scale": scale, "dropout_p": p, "key": key, "site": SITE}

    def call(x, backend):
        return {"o": kernels.causal_attention(x["q"], x["k"], x["v"], backend=backend, **options)}

    def plain(x):
        factor = D**-0.5 if scale is None else scale
        o = plain_attention(x["q"], x["k"], x["v"], factor, keep, rng.dropout_scale(p))
        return {"o": o}

    return Problem({"q": q, "k": k, "v": v}, call, plain, key)


def attention_qkv(draw: Draw, B=1, T=16, H=1, D=16, p=0.0) -> Problem:
    """`causal_attention_qkv`."""
    key = draw.key() if p else None
    keep = attention_keep(key, B, H, T, T, p) if p else None
    options = {"dropout_p": p, "key": key, "site": SITE}

    def call(x, backend):
        return {"o": kernels.causal_attention_qkv(x["qkv"], backend=backend, **options)}

    def plain(x):
        q, k, v = x["qkv"].permute(2, 0, 3, 1, 4)
        o = plain_attention(q, k, v, D**-0.5, keep, rng.dropout_scale(p))
        return {"o": o.transpose(1, 2)}

    inputs = {"qkv": draw.normal(B, T, 3, H, D)}
    return Problem(inputs, call, plain, key)


def layer_norm(draw: Draw, M=16, C=16, bias=True) -> Problem:
    """`layer_norm` of rows far from mean 0 and variance 1."""
    inputs = {"x": draw.normal(M, C, scale=2.0) + 1, "weight": draw.normal(C)}
    inputs |= {"bias": draw.normal(C)} if bias else {}

    def call(x, backend):
        return {"y": kernels.layer_norm(x["x"], x["weight"], x.get("bias"), backend=backend)}

    def plain(x):
        return {"y": F.layer_norm(x["x"], (C,), x["weight"], x.get("bias"))}

    return Problem(inputs, call, plain)


def dropout_add_layer_norm(draw: Draw, B=1, T=16, C=16, p=0.0, bias=True) -> Problem:
    """`dropout_add_layer_norm`, with both of its biases or none."""
    inputs = {"x": draw.normal(B, T, C), "residual": draw.normal(B, T, C)}
    inputs |= {"weight": draw.normal(C)}
    inputs |= {"bias": draw.normal(C), "x_bias": draw.normal(C)} if bias else {}
    key = draw.key() if p else None
    keep = activation_keep(key, B, T, C, p) if p else None

    def call(x, backend):
        y, new_residual = kernels.dropout_add_layer_norm(
            *(x["x"], x["residual"], x["weight"], x.get("bias")),
            **{"x_bias": x.get("x_bias"), "dropout_p": p, "key": key, "site": SITE},
            backend=backend,
        )
        return {"y": y, "new_residual": new_residual}

    def plain(x):
        dropped = x["x"] + x["x_bias"] if bias else x["x"]
        dropped = dropped * keep * rng.dropout_scale(p) if p else dropped
        new_residual = x["residual"] + dropped
        y = F.layer_norm(new_residual, (C,), x["weight"], x.get("bias"))
        return {"y": y, "new_residual": new_residual}

    return Problem(inputs, call, plain, key)


def linear_act(draw: Draw, M=16, K=16, N=16, activation="relu", bias=True) -> Problem:
    """`linear_act`."""
    inputs = {"x": draw.normal(M, K), "weight": draw.normal(N, K, scale=K**-0.5)}
    inputs |= {"bias": draw.normal(N)} if bias else {}

    def call(x, backend):
        options = {"activation": activation, "backend": backend}
        return {"y": kernels.linear_act(x["x"], x["weight"], x.get("bias"), **options)}

    def plain(x):
        return {"y": plain_activation(F.linear(x["x"], x["weight"], x.get("bias")), activation)}

    return Problem(inputs, call, plain)


def cross_entropy(draw: Draw, M=16, V=16, reduction="mean") -> Problem:
    """`cross_entropy`; the first target is ignored."""
    inputs = {"logits": draw.normal(M, V, scale=3.0)}
    targets = draw.integers(V, M)
    targets[:1] = -100

    def call(x, backend):
        options = {"reduction": reduction, "backend": backend}
        return {"loss": kernels.cross_entropy(x["logits"], targets, **options)}

    def plain(x):
        return {"loss": plain_cross_entropy(x["logits"], targets, reduction)}

    return Problem(inputs, call, plain)


def linear_cross_entropy(draw: Draw, M=16, C=16, V=16, reduction="mean", bias=True) -> Problem:
    """`linear_cross_entropy`; the first target is ignored."""
    inputs = {"x": draw.normal(M, C), "weight": draw.normal(V, C)}
    inputs |= {"bias": draw.normal(V)} if bias else {}
    targets = draw.integers(V, M)
    targets[:1] = -100

    def call(x, backend):
        options = {"reduction": reduction, "backend": backend}
        weights = x["weight"], x.get("bias")
        return {"loss": kernels.linear_cross_entropy(x["x"], *weights, targets, **options)}

    def plain(x):
        logits = F.linear(x["x"], x["weight"], x.get("bias"))
        return {"loss": plain_cross_entropy(logits, targets, reduction)}

    return Problem(inputs, call, plain)


def embed(draw: Draw, B=1, T=16, C=16, V=16, p=0.0) -> Problem:
    """`embed`, with more positions than tokens."""
    idx = draw.integers(V, B, T)
    inputs = {"token_weight": draw.normal(V, C), "position_weight": draw.normal(T + 3, C)}
    key = draw.key() if p else None
    keep = activation_keep(key, B, T, C, p) if p else None

    def call(x, backend):
        weights = x["token_weight"], x["position_weight"]
        options = {"dropout_p": p, "key": key, "site": SITE, "backend": backend}
        return {"x": kernels.embed(idx, *weights, **options)}

    def plain(x):
        y = F.embedding(idx, x["token_weight"]) + x["position_weight"][:T]
        return {"x": y * keep * rng.dropout_scale(p) if p else y}

    return Problem(inputs, call, plain, key)


def rotary_qkv(draw: Draw, B=1, T=16, H=1, D=16, norm=0) -> Problem:
    """`rotary_qkv` at positions from 5 on."""
    table = kernels.rotary_table(5 + T, D, device=draw.device)[5:]

    def call(x, backend):
        return {"y": kernels.rotary_qkv(x["qkv"], table, normalize=norm > 0, backend=backend)}

    def plain(x):
        return {"y": rotary_reference(x["qkv"], table, normalize=norm > 0)}

    return Problem({"qkv": draw.normal(B, T, 3, H, D)}, call, plain)


# ---------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Shapes:
    """The sizes an op is checked at, as names: "B2-T65-H2-D16-p0.2".

    quick: always, though interpreted float16 and bfloat16 make do with the first of them;
    full: with --full, and always where nothing is interpreted; blocks: always where nothing is
    interpreted, on the CPU more than one block; large: with --full where nothing is interpreted,
    in float32 alone on a CPU, which multiplies halves far slower; draw: one more at random.
    """

    build: Callable[..., Problem]
    quick: tuple[str, ...]
    full: tuple[str, ...]
    large: tuple[str, ...]
    draw: Callable[[random.Random], str]
    blocks: tuple[str, ...] = ()


def _random_attention(r: random.Random) -> str:
    T = r.randint(9, 40)
    Tk = T + r.choice((0, 0, r.randint(1, 30)))
    return f"B{r.randint(1, 2)}-H1-T{T}-Tk{Tk}-D{r.randint(1, 80)}-p{r.choice((0.0, 0.1, 0.5))}"


# Notebook: T 256, C 384, D 64, V 65. Second seed: D 85. GPT-2: T 1024, C 768, V 50257.
SHAPES = {
    "causal_attention": Shapes(
        attention,
        quick=("B1-H2-T33-D16-p0.2", "B1-H1-T17-D85-scale0.05", "B1-H1-T3-Tk40-D8-p0.5"),
        full=(
            "B2-H2-T65-D16-p0.2",
            *("B0-H2-T8-D8", "B1-H1-T1-D1", "B1-H1-T1-Tk77-D64", "B1-H2-T64-D64-p0.2"),
            *("B1-H1-T63-D128", "B1-H1-T129-D85-p0.2", "B1-H1-T17-D256-p0.1"),
        ),
        large=(
            *("B8-H6-T256-D64-p0.2", "B8-H6-T256-D85-p0.2", "B2-H12-T1024-D64"),
            *("B1-H2-T1000-D128-p0.1",),
        ),
        draw=_random_attention,
        blocks=("B1-H2-T730-D16-p0.2", "B1-H2-T730-D24"),
    ),
    "causal_attention_qkv": Shapes(
        attention_qkv,
        quick=("B1-T19-H3-D16-p0.2",),
        full=("B0-T8-H2-D8", "B1-T65-H2-D64", "B2-T31-H6-D85-p0.2"),
        large=("B8-T256-H6-D64-p0.2", "B2-T1024-H12-D64"),
        blocks=("B1-T730-H2-D16-p0.2",),
        draw=lambda r: (
            f"B{r.randint(1, 2)}-T{r.randint(9, 40)}-H{r.randint(1, 2)}-D{r.randint(1, 48)}"
            f"-p{r.choice((0.0, 0.3))}"
        ),
    ),
    "layer_norm": Shapes(
        layer_norm,
        quick=("M33-C96", "M5-C130-nobias"),
        full=("M0-C16", "M7-C1", "M64-C384", "M65-C510", "M19-C768", "M3-C4099"),
        large=("M4096-C384", "M2048-C768", "M300-C16384"),
        draw=lambda r: f"M{r.randint(2, 40)}-C{r.randint(9, 600)}{r.choice(('', '-nobias'))}",
    ),
    "dropout_add_layer_norm": Shapes(
        dropout_add_layer_norm,
        quick=("B2-T9-C96-p0.2", "B1-T17-C130-nobias"),
        full=(
            *("B0-T4-C16-p0.2", "B2-T3-C1-p0.5", "B2-T32-C384-p0.2", "B1-T65-C510-p0.1"),
            *("B3-T7-C768", "B1-T3-C4099-p0.2"),
        ),
        large=("B16-T256-C384-p0.2", "B2-T1024-C768-p0.1", "B1-T300-C16384-p0.1"),
        draw=lambda r: (
            f"B{r.randint(1, 3)}-T{r.randint(1, 30)}-C{r.randint(2, 600)}"
            f"-p{r.choice((0.0, 0.2, 0.9))}"
        ),
    ),
    "linear_act": Shapes(
        linear_act,
        quick=("M33-K24-N70-relu", "M17-K40-N33-gelu-nobias", "M20-K16-N24-relu2"),
        full=(
            *("M0-K16-N8-relu", "M1-K1-N1-gelu", "M130-K96-N129-relu", "M65-K129-N64-gelu"),
            *("M65-K64-N200-relu2",),
        ),
        large=("M4096-K384-N1536-relu", "M2048-K768-N3072-gelu"),
        draw=lambda r: (
            f"M{r.randint(1, 70)}-K{r.randint(1, 70)}-N{r.randint(1, 140)}"
            f"-{r.choice(('relu', 'gelu', 'relu2'))}"
        ),
    ),
    "cross_entropy": Shapes(
        cross_entropy,
        quick=("M33-V65-mean", "M5-V1301-none"),
        full=("M0-V5-sum", "M3-V1-sum", "M2-V50257-mean", "M257-V65-sum"),
        large=("M4096-V65-mean", "M512-V50257-none"),
        draw=lambda r: (
            f"M{r.randint(2, 80)}-V{r.randint(2, 300)}-{r.choice(('mean', 'sum', 'none'))}"
        ),
    ),
    "linear_cross_entropy": Shapes(
        linear_cross_entropy,
        quick=("M33-C24-V65-mean", "M9-C16-V300-none-nobias"),
        full=("M0-C8-V5-sum", "M4-C32-V50257-mean", "M130-C96-V65-sum"),
        large=("M4096-C384-V65-mean", "M512-C768-V50257-mean"),
        draw=lambda r: (
            f"M{r.randint(2, 60)}-C{r.randint(1, 60)}-V{r.randint(2, 200)}"
            f"-{r.choice(('mean', 'sum', 'none'))}"
        ),
    ),
    "embed": Shapes(
        embed,
        quick=("B2-T17-C40-V65-p0.2", "B1-T9-C33-V300"),
        full=("B0-T4-C16-V5", "B1-T1-C1-V1", "B2-T64-C384-V65-p0.2", "B3-T15-C130-V5000-p0.1"),
        large=("B16-T256-C384-V65-p0.2", "B2-T1024-C768-V50257-p0.1"),
        draw=lambda r: (
            f"B{r.randint(1, 3)}-T{r.randint(1, 40)}-C{r.randint(1, 200)}-V{r.randint(2, 400)}"
            f"-p{r.choice((0.0, 0.4))}"
        ),
    ),
    "rotary_qkv": Shapes(
        rotary_qkv,
        quick=("B2-T17-H3-D20-norm1", "B1-T9-H2-D16"),
        full=("B0-T4-H2-D8", "B1-T1-H1-D2-norm1", "B2-T65-H6-D64-norm1", "B1-T33-H2-D254"),
        large=("B8-T256-H6-D64-norm1", "B2-T1024-H12-D64"),
        draw=lambda r: (
            f"B{r.randint(1, 3)}-T{r.randint(1, 40)}-H{r.randint(1, 4)}-D{2 * r.randint(1, 60)}"
            f"-norm{r.randint(0, 1)}"
        ),
    ),
}


def read_shape(name: str) -> dict:
    """Keyword arguments of a builder from a name such as "B2-T65-H2-D16-p0.2-nobias"."""
    arguments = {}
    for word in name.split("-"):
        if word in ("relu", "gelu", "relu2"):
            arguments["activation"] = word
        elif word in ("mean", "sum", "none"):
            arguments["reduction"] = word
        elif word == "nobias":
            arguments["bias"] = False
        else:
            letters, digits = re.fullmatch(r"([A-Za-z]+)([\d.]+)", word).groups()
            arguments[letters] = float(digits) if letters in ("p", "scale") else int(digits)
    return arguments


def build_problem(op: str, name: str, dtype: str, device: torch.device, seed: int | str) -> Problem:
    """One problem; op a key of SHAPES, name as in `Shapes`, dtype a key of DTYPES."""
    draw = Draw(device, DTYPES[dtype], zlib.crc32(f"{seed} {op} {name} {dtype}".encode()))
    return replace(SHAPES[op].build(draw, **read_shape(name)), op=op, name=name)


def problem_names(
    op: str, full: bool, compiled: bool, seed: int, dtype: str, on_gpu: bool = False
) -> list[str]:
    """The sizes of one op, the fixed and the drawn ones; the same for the same seed."""
    shapes = SHAPES[op]
    if compiled:
        large = full and (on_gpu or dtype == "float32")
        names = [*shapes.quick, *shapes.full, *shapes.blocks, *(shapes.large if large else ())]
    elif full:
        names = [*shapes.quick, *shapes.full]
    else:
        names = list(shapes.quick if dtype == "float32" else shapes.quick[:1])
    drawn = random.Random(f"{seed} {op} {dtype}")
    return names + [shapes.draw(drawn) for _ in range(6 if full else 1)]
