"""Measure attention's launch plans on this GPU and print the rows to check in.

    python -m kernels.tune [--dropout 0.2] [--dtype bfloat16] [--head_size 64 128] [--seconds 600]

For each head size D, short and long sequences (B64 H6 T256, B4 H12 T4096) and each of the three
kernels, candidates are timed (median of repeated launches, L2 flushed in between), first the
shipped plan, then its neighbours, until all are or the time is up; the fastest wins if, against the
shipped plan in turns, it is faster again. The printed rows go into `_PLANS` of
`kernels.attention_kernels`, where this architecture is.
"""

import dataclasses
import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import torch

from kernels import attention_kernels, backend
from kernels.attention_kernels import Plan
from kernels.command_line import Parser
from kernels.timing import Replayed, raise_clocks

KERNELS = ("forward", "dq", "dkdv")
HEAD_SIZES = (64, 128, 256)
SIZES = {512: (64, 6, 256), None: (4, 12, 4096)}  # most keys of a row -> B, H, T
_REPEATS = 20
_ROUNDS, _GAIN = 5, 0.98  # a plan replaces the shipped one if it takes at most so much of its time
Tensors = tuple[torch.Tensor, ...]


def candidates(kernel: str, architecture: str) -> list[Plan]:
    """Every plan worth a measurement; registers are capped where so many programs then fit."""
    caps = (None, 168, 128) if architecture.startswith("sm_") else (None,)
    loops = (False,) if kernel == "dkdv" else (False, True)
    blocks = itertools.product((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3), caps, loops)
    plans = [Plan(*block) for block in blocks if block[0] * block[1] <= 128 * 128 // 2]
    return [plan for plan in plans if plan.num_warps == 4 or plan.registers is None]


def nearest_first(plans: list[Plan], shipped: Plan) -> list[Plan]:
    """Plans by how many doublings, halvings and other choices they are from the shipped one."""

    def distance(plan: Plan) -> float:
        a, b = dataclasses.astuple(plan), dataclasses.astuple(shipped)
        doublings = sum(abs(math.log2(x / y)) for x, y in zip(a[:4], b[:4], strict=True))
        return doublings + sum(x != y for x, y in zip(a[4:], b[4:], strict=True))

    return sorted(plans, key=distance)


def best(
    plans: Iterable[Plan],
    time_of: Callable[[Plan], float | None],
    seconds: float = math.inf,
) -> tuple[Plan, int]:
    """The fastest plan.

    Args:
        time_of: returns None for a plan that cannot run.
        seconds: after which no other plan is tried, once one has run.
    Returns: the plan, and how many were tried.
    Raises: RuntimeError if no plan can run.
    """
    measured, tried, end = {}, 0, time.monotonic() + seconds
    for plan in plans:
        if measured and time.monotonic() >= end:
            break
        tried += 1
        if (result := time_of(plan)) is not None:
            measured[plan] = result
    if not measured:
        raise RuntimeError("tune: at least one plan must run; got none")
    return min(measured, key=measured.get), tried


def rematch(
    winner: Plan, shipped: Plan, time_of: Callable[[Plan], float | None]
) -> tuple[Plan, float]:
    """The winner, if it holds out against the shipped plan in turns, else the shipped one.

    A search times each plan once, the last perhaps on a chip that has warmed up since the first:
    whoever is fastest of a hundred may owe it to that.

    Returns: the plan to check in, and the median of winner / shipped over the rounds.
    """
    ratios = []
    for turn in range(_ROUNDS):
        pair = (winner, shipped) if turn % 2 else (shipped, winner)
        times = {plan: time_of(plan) for plan in pair}
        if times[winner] is None:
            return shipped, math.inf
        ratios.append(times[winner] / times[shipped] if times[shipped] else 0.0)
    ratio = statistics.median(ratios)
    return (winner if ratio <= _GAIN else shipped), ratio


def rows(winners: dict[tuple[int, int | None], dict[str, Plan]], dropout: bool) -> str:
    """Entries of `_PLANS` for (D, most keys) -> kernel -> plan."""
    lines = []
    for (D, most_keys), plans in winners.items():
        fields = ", ".join(str(dataclasses.astuple(plans[kernel])) for kernel in KERNELS)
        lines.append(f"        ({D}, {most_keys}, {dropout}): _plans({fields}),")
    return "\n".join(lines)


def _time_ms(run: Callable[[], object], flush: torch.Tensor) -> float:
    """Median time of `run`, replayed from a CUDA graph, with a cold L2 cache."""
    run()
    replayed = Replayed(run, torch.cuda.Stream())
    raise_clocks(flush.device, run)
    times = []
    for _ in range(_REPEATS):
        flush.zero_()
        times.append(replayed.milliseconds())
    return statistics.median(times)


def _launcher(kernel: str, B, H, T, D, dtype, dropout_p) -> Callable[[Plan | None], Tensors]:
    """What runs `kernel` with a plan; of the backward, the other kernel keeps its own plan."""
    qkv = torch.randn(B, T, 3, H, D, device="cuda", dtype=dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    gradients = torch.empty_like(qkv).permute(2, 0, 3, 1, 4)
    o = torch.empty_like(q)
    options = torch.tensor([1, 2, 0], device="cuda"), D**-0.5, dropout_p, 16
    lse = attention_kernels.forward(q, k, v, o, *options)

    def run(plan: Plan | None) -> Tensors:
        if kernel == "forward":
            attention_kernels.forward(q, k, v, o, *options, blocks=plan)
            return (o,)
        blocks = {f"{kernel}_blocks": plan}
        attention_kernels.backward(o, q, k, v, o, lse, *gradients, *options, **blocks)
        return gradients

    return run


def agree(results: Tensors, expected: Tensors) -> bool:
    """Whether results of two plans differ by no more than rounding; a compiler may err, too."""
    return all(
        bool((a.float() - b.float()).abs().max() <= 2**-5 * b.float().abs().max())
        for a, b in zip(results, expected, strict=True)
    )


def _measure(kernel: str, size, D: int, plan: Plan, dtype, dropout_p: float) -> float | None:
    """Milliseconds at size (B, H, T), or None if the plan asks for too much or computes wrong."""
    from triton.errors import TritonError

    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    run = _launcher(kernel, *size, D, dtype, dropout_p)
    try:
        expected = tuple(tensor.clone() for tensor in run(None))
        if not agree(run(plan), expected):
            print(f"  {plan}: not the shipped plan's results", file=sys.stderr, flush=True)
            return None
        return _time_ms(functools.partial(run, plan), flush)
    except (TritonError, RuntimeError) as error:  # OutOfResources, or the compiler gave up
        if isinstance(error, torch.AcceleratorError):  # then nothing can run any more
            raise
        return None


def main(arguments: list[str] | None = None) -> int:
    """Print the rows for this GPU; 2 without one."""
    parser = Parser(prog="python -m kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--head_size", type=int, nargs="+", choices=HEAD_SIZES, default=HEAD_SIZES)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all; none by default")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds must be above 0; got {options.seconds:g}")
    if not 0 <= options.dropout < 1:
        parser.error(f"--dropout must be in [0, 1); got {options.dropout:g}")
    if not (torch.cuda.is_available() and backend.HAS_TRITON):
        print("tune: needs a CUDA or ROCm GPU and triton; found none", file=sys.stderr)
        return 2
    dtype, architecture = getattr(torch, options.dtype), backend.architecture(torch.device("cuda"))
    dropout, winners = options.dropout > 0, {}
    wanted = list(itertools.product(dict.fromkeys(options.head_size), SIZES, KERNELS))
    end = time.monotonic() + options.seconds
    print(f"{architecture}:", flush=True)
    for number, (D, most_keys, kernel) in enumerate(wanted):
        size = SIZES[most_keys]
        shipped = attention_kernels.plan(kernel, architecture, D, size[2], dtype, dropout)
        plans = nearest_first(candidates(kernel, architecture), shipped)

        def time_of(plan, kernel=kernel, size=size, D=D):
            measured = _measure(kernel, size, D, plan, dtype, options.dropout)
            said = "cannot run" if measured is None else f"{measured:.3f} ms"
            print(f"  {plan}: {said}", file=sys.stderr, flush=True)
            return measured

        share = (end - time.monotonic()) / (len(wanted) - number)
        winner, tried = best(plans, time_of, share)
        if winner != shipped:
            fastest = winner
            winner, ratio = rematch(fastest, shipped, time_of)
            print(f"  {fastest} / shipped: {ratio:.3f}", file=sys.stderr, flush=True)
        winners.setdefault((D, most_keys), {})[kernel] = winner
        said = f"{winner}, {tried} of {len(plans)} candidates tried"
        print(f"{kernel} D={D} T={size[2]}: {said}", file=sys.stderr, flush=True)
        if kernel == KERNELS[-1]:  # what is measured is not lost with what is not
            print(rows({(D, most_keys): winners[D, most_keys]}, dropout), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
