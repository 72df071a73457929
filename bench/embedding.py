"""Token plus position embedding with dropout: a copy, in principle. And its backward?

Question
    Is the forward one write of x, and does the backward, where 16,384 tokens meet 65 rows, stay
    near the memory's rate?
Method
    idx (B, T) of V tokens; token table (V, C), position table (T, C); dropout p.
Formula
    bytes: the rows of both tables that are used and x forward; dx and both gradients, of all V
    rows, backward; eight bytes an index each way. FLOPs 2 an element each way.
"""

import functools

import torch
import torch.nn.functional as F

from bench.harness import Case, Options, Work
from bench.ops import PHASES, TRAINING, Op, dropout_rows, op_case, random_normal, sweep_points
from kernels import embed

SITE = 1


def embedding_work(B, T, C, V, itemsize: int, phase: str) -> Work:
    """FLOPs and bytes."""
    rows = (min(V, B * T), V) if phase == TRAINING else (min(V, B * T),)
    moved = sum((B * T + n + T) * C * itemsize + 8 * B * T for n in rows)
    return Work(2 * len(rows) * B * T * C, moved, B * T)


def plain_embed(x, p, key):
    """dropout(token[idx] + position)."""
    return dropout_rows(F.embedding(x["idx"], x["token"]) + x["position"], p, key, SITE)


def our_embed(x, p, key):
    """The op under test."""
    return embed(x["idx"], x["token"], x["position"], dropout_p=p, key=key, site=SITE)


def cases(options: Options) -> list[Case]:
    """The notebook's shape first, then GPT-2's, then sweeps over C and B."""
    cuda = options.device.type == "cuda"

    def case(B, T, C, V=65, p=0.0, phase=TRAINING, **rest):
        def inputs(generator):
            draw = functools.partial(random_normal, generator, dtype=options.dtype)
            idx = torch.randint(V, (B, T), generator=generator, device=generator.device)
            return {"token": draw(V, C), "position": draw(T, C), "idx": idx}

        return op_case(
            Op(inputs, plain_embed, our_embed, {}, p),
            options,
            f"B{B}-T{T}-C{C}-V{V} p={p:g}",
            phase,
            embedding_work(B, T, C, V, options.dtype.itemsize, phase),
            "GB/s",
            shape={"B": B, "T": T, "C": C, "V": V, "kind": "embed"},
            **rest,
        )

    B0 = 64 if cuda else 4 if options.quick else 16
    found = [case(B0, 256, 384, phase=phase, quick=True) for phase in PHASES]
    found += [case(B0, 256, 384, p=0.2, quick=True)]
    found += [case(8 if cuda else 1, 1024, 768, 50304)]
    for axes, point in sweep_points(
        {"C": (64, 384, 1536), "B": (1, 4, 16, 64)}, B=16, T=256, C=384
    ):
        found.append(case(**point, sweeps=axes))
    return found
