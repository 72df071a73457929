"""Linear layer, bias and activation in one: does the activation come for free?

Question
    How near is act(x W^T + b) to the bare matrix product, and how does it grow with C and rows?
Method
    x (B, T, C), W (4C, C). On a GPU linear_act also runs both ways that its plan chooses between,
    the library's product and the Triton one, the latter with the tiles worth a try.
Formula
    FLOPs 2 B T C 4C forward, three times that with a backward. bytes: x, W, y forward; x, W, y,
    dy, dx, dW backward.
"""

import functools
from unittest import mock

import torch.nn.functional as F

from bench.harness import Case, Options, Work
from bench.ops import PHASES, TRAINING, Op, op_case, random_normal, sweep_points
from kernels import linear_act, mlp
from kernels.mlp import LinearActPlan
from kernels.problems import plain_activation

WAYS = {"linear_act-library": LinearActPlan(library=True)} | {
    f"linear_act-{M}x{N}x{K}": LinearActPlan(False, M, N, K, num_stages=stages)
    for M, N, K, stages in ((128, 128, 32, 4), (128, 128, 64, 3), (128, 256, 64, 3))
}


def by(plan: LinearActPlan, activation: str):
    """The op by `plan` instead of its own."""

    def outputs(x, p):
        with mock.patch.object(mlp, "linear_act_plan", lambda *_: plan):
            return linear_act(x["x"], x["weight"], x["bias"], activation=activation)

    return outputs


def mlp_work(B, T, C, itemsize: int, phase: str) -> Work:
    """FLOPs and bytes."""
    rows, width = B * T, 4 * C
    product, tensors = 2 * rows * C * width, rows * C + width * C + rows * width
    if phase == TRAINING:
        return Work(3 * product, 3 * tensors * itemsize, rows)
    return Work(product, tensors * itemsize, rows)


def cases(options: Options) -> list[Case]:
    """The notebook's shape first, then sweeps over C and B."""
    cuda = options.device.type == "cuda"

    def case(activation, B, T, C, phase=TRAINING, **rest):
        def inputs(generator):
            draw = functools.partial(random_normal, generator, dtype=options.dtype)
            return {
                "x": draw(B, T, C),
                "weight": draw(4 * C, C, scale=C**-0.5),
                "bias": draw(4 * C, scale=0.1),
            }

        def plain(x, p, key):
            return plain_activation(F.linear(x["x"], x["weight"], x["bias"]), activation)

        def ours(x, p, key):
            return linear_act(x["x"], x["weight"], x["bias"], activation=activation)

        ways = {name: by(plan, activation) for name, plan in WAYS.items()} if cuda else {}
        return op_case(
            Op(inputs, plain, ours, ways),
            options,
            f"{activation} B{B}-T{T}-C{C}",
            phase,
            mlp_work(B, T, C, options.dtype.itemsize, phase),
            "TFLOP/s",
            shape={"B": B, "T": T, "C": C, "kind": activation},
            **rest,
        )

    B0 = 64 if cuda else 4 if options.quick else 16
    Cs = (64, 128, 256, 384, 768) + ((1536, 3072) if cuda else ())
    found = [case("relu", B0, 256, 384, phase, quick=True) for phase in PHASES]
    found += [case("gelu", B0, 256, 384, phase, quick=phase == TRAINING) for phase in PHASES]
    found += [case("relu2", B0, 256, 384)]
    found += [case("gelu", 12, 1024, 768)] if cuda else []
    for axes, point in sweep_points({"C": Cs, "B": (1, 4, 16, 64)}, B=4, T=256, C=384):
        found.append(case("relu", **point, sweeps=axes, full=not cuda and point["B"] > 16))
    return found
