"""Cross-entropy, alone and fused with the output head: time, and logits never held?

Question
    What does the loss cost at V = 65 (characters) and at V = 50257 (GPT-2's tokens), and does
    fusing it with the head's product pay?
Method
    "loss": logits (N, V) -> mean loss. "head": x (N, C), W (V, C) -> mean loss. Targets random.
Formula
    loss, bytes: logits once forward; logits again and their gradient backward.
    head, FLOPs 2 N C V forward, three times that with a backward; bytes x, W forward; x, W, dx,
    dW backward: logits that are never held need not move.
"""

import functools

import torch
import torch.nn.functional as F

from bench import peers
from bench.harness import Bound, Case, Options, Work
from bench.ops import PHASES, TRAINING, Op, op_case, random_normal
from kernels import cross_entropy, linear_cross_entropy


def loss_work(N, V, itemsize: int, phase: str) -> Work:
    """FLOPs (five an element) and bytes of the loss alone."""
    passes = 3 if phase == TRAINING else 1
    return Work(5 * passes * N * V, passes * N * V * itemsize, N)


def head_work(N, C, V, itemsize: int, phase: str) -> Work:
    """FLOPs and bytes of the head and the loss."""
    product, tensors = 2 * N * C * V, (N * C + V * C) * itemsize
    if phase == TRAINING:
        return Work(3 * product, 3 * tensors, N)
    return Work(product, tensors, N)


def plain_loss(x, p, key):
    """Mean of logsumexp(logits) - logits[target]; half precision in float32, as autocast does."""
    logits = x["logits"]
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.cross_entropy(logits, x["targets"])


def our_loss(x, p, key):
    """The op under test."""
    return cross_entropy(x["logits"], x["targets"])


def plain_head(x, p, key):
    """The loss of x W^T."""
    logits = F.linear(x["x"], x["weight"])
    return plain_loss({"logits": logits, "targets": x["targets"]}, p, key)


def our_head(x, p, key):
    """The op under test."""
    return linear_cross_entropy(x["x"], x["weight"], None, x["targets"])


def cases(options: Options) -> list[Case]:
    """Characters first, then GPT-2's tokens, then a sweep over V."""
    cuda = options.device.type == "cuda"

    def liger_loss(x, p):
        function = peers.liger(options, "cross_entropy", "LigerCrossEntropyFunction")
        # It writes the gradient into the logits, so it has its own: right once, then as fast.
        logits = x["logits"].detach().clone().requires_grad_(x["logits"].requires_grad)
        forward = lambda: function.apply(logits, x["targets"], None)[0]  # noqa: E731
        return Bound(forward, {"logits": logits})

    def liger_head(x, p):
        function = peers.liger(
            options, "fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"
        )
        return function.apply(x["x"], x["weight"], x["targets"])[0]

    def case(kind, N, V, C=384, phase=TRAINING, **rest):
        def inputs(generator):
            draw = functools.partial(random_normal, generator, dtype=options.dtype)
            device = generator.device
            targets = torch.randint(V, (N,), generator=generator, device=device)
            if kind == "loss":
                return {"logits": draw(N, V), "targets": targets}
            return {"x": draw(N, C), "weight": draw(V, C, scale=C**-0.5), "targets": targets}

        itemsize = options.dtype.itemsize
        if kind == "loss":
            op = Op(inputs, plain_loss, our_loss, {"liger": liger_loss})
            work, unit = loss_work(N, V, itemsize, phase), "GB/s"
        else:
            op = Op(inputs, plain_head, our_head, {"liger": liger_head})
            work, unit = head_work(N, C, V, itemsize, phase), "TFLOP/s"
        shape = {"N": N, "V": V, "C": C, "kind": kind}
        name = f"{kind} N{N}-V{V}" + (f"-C{C}" if kind == "head" else "")
        return op_case(op, options, name, phase, work, unit, shape=shape, **rest)

    large = 8192 if cuda else 256
    found = [case("loss", 16384, 65, phase=phase, quick=True) for phase in PHASES]
    found += [case("head", 16384, 65, quick=True)]
    found += [case("loss", large, 50257, phase=phase, quick=cuda) for phase in PHASES]
    quick = TRAINING if cuda else None  # on a CPU its check alone is not
    found += [case("head", large, 50257, 768, phase, quick=phase == quick) for phase in PHASES]
    for V in (65, 256, 1024, 4096, 16384) + ((32768, 131072) if cuda else ()):
        found.append(case("loss", 4096 if cuda else 512, V, sweeps=("V",)))
    return found
