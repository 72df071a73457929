"""LayerNorm, alone and after dropout and the residual sum: how near to the memory's rate?

Question
    Does one pass over memory suffice, and how does the time grow with C and with the rows?
Method
    "norm": y = LayerNorm(x). "add": r = residual + dropout(x), y = LayerNorm(r), both returned,
    as each half of a transformer block does. x (B, T, C).
Formula
    bytes, in tensors of B T C: norm 2 forward (x, y), 3 backward (x, dy, dx); add 4 forward
    (x, residual, y, r), 5 backward (dy, dr, r, dx, dresidual), 4 where p = 0 and dx is dresidual.
    FLOPs are not the limit: 8 an element forward, 16 backward.
"""

import functools

import torch.nn.functional as F

from bench import peers
from bench.harness import Case, Options, Work
from bench.ops import PHASES, TRAINING, Op, dropout_rows, op_case, random_normal, sweep_points
from kernels import dropout_add_layer_norm, layer_norm

SITE = 17
EPS = 1e-5


def norm_work(B, T, C, itemsize: int, phase: str, *, add: bool, p: float = 0.0) -> Work:
    """FLOPs and bytes."""
    tensors = (4 if add else 2) + (phase == TRAINING) * (3 + add + (p > 0))
    flops = 24 if phase == TRAINING else 8
    return Work(flops * B * T * C, tensors * B * T * C * itemsize, B * T)


def plain_norm(x, p, key):
    """(x - mean) / sqrt(var + eps) * weight + bias."""
    return F.layer_norm(x["x"], x["weight"].shape, x["weight"], x["bias"], EPS)


def our_norm(x, p, key):
    """The op under test."""
    return layer_norm(x["x"], x["weight"], x["bias"], eps=EPS)


def plain_add(x, p, key):
    """LayerNorm(r) and r = residual + dropout(x)."""
    r = x["residual"] + dropout_rows(x["x"], p, key, SITE)
    return F.layer_norm(r, x["weight"].shape, x["weight"], x["bias"], EPS), r


def our_add(x, p, key):
    """The op under test."""
    return dropout_add_layer_norm(
        x["x"], x["residual"], x["weight"], x["bias"], eps=EPS, dropout_p=p, key=key, site=SITE
    )


def step_by_step(x, p):
    """LayerNorm as the seeds spell it out: mean, variance, scale, shift."""
    mean = x["x"].mean(-1, keepdim=True)
    variance = x["x"].var(-1, keepdim=True, unbiased=False)
    return (x["x"] - mean) / (variance + EPS).sqrt() * x["weight"] + x["bias"]


def cases(options: Options) -> list[Case]:
    """The notebook's shape first, then sweeps over C and B."""
    cuda = options.device.type == "cuda"

    def liger(x, p):
        function = peers.liger(options, "layer_norm", "LigerLayerNormFunction")
        return function.apply(x["x"], x["weight"], x["bias"], EPS)

    def liger_add(x, p):
        function = peers.liger(options, "layer_norm", "LigerLayerNormFunction")
        r = x["residual"] + F.dropout(x["x"], p)
        return function.apply(r, x["weight"], x["bias"], EPS), r

    def case(kind, B, T, C, p=0.0, phase=TRAINING, **rest):
        def inputs(generator):
            draw = functools.partial(random_normal, generator, dtype=options.dtype)
            tensors = {"x": draw(B, T, C), "weight": 1 + draw(C, scale=0.1), "bias": draw(C)}
            return tensors | ({"residual": draw(B, T, C)} if kind == "add" else {})

        if kind == "add":
            op = Op(inputs, plain_add, our_add, {"liger": liger_add}, p)
        else:
            op = Op(inputs, plain_norm, our_norm, {"naive": step_by_step, "liger": liger})
        work = norm_work(B, T, C, options.dtype.itemsize, phase, add=kind == "add", p=p)
        name = f"{kind} B{B}-T{T}-C{C}" + (f" p={p:g}" if kind == "add" else "")
        shape = {"B": B, "T": T, "C": C, "kind": kind}
        return op_case(op, options, name, phase, work, "GB/s", shape=shape, **rest)

    B0 = 64 if cuda else 4 if options.quick else 16
    Cs = (64, 128, 384, 768, 1536) + ((3072, 6144, 12288) if cuda else ())
    found = [case("add", B0, 256, 384, 0.2, phase, quick=phase == TRAINING) for phase in PHASES]
    found += [case("add", B0, 256, 384, 0.0, quick=True)]
    found += [case("norm", B0, 256, 384, 0.0, phase, quick=True) for phase in PHASES]
    for axes, point in sweep_points({"C": Cs, "B": (1, 4, 16, 64)}, B=16, T=256, C=384):
        found.append(case("norm", **point, sweeps=axes))
        found.append(case("add", **point, p=0.2, sweeps=axes, full=not cuda))
    return found
