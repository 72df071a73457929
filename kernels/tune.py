"""Measure attention's launch plans on this GPU and print the rows to check in.

    python -m kernels.tune [--dropout 0.2] [--dtype bfloat16] [--head_size 64 128] [--seconds 600]

For each head size D and each of the three kernels, candidates are timed (median of repeated
launches, L2 flushed in between) at B64 H6 T256 and B4 H12 T4096, first the shipped plan, then its
neighbours, until all are or the time is up; the plan with the least summed relative time wins. The
printed rows, of other head sizes as they are shipped, go into `_PLANS` of
`kernels.attention_kernels`.
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

KERNELS = ("forward", "dq", "dkdv")
HEAD_SIZES = (64, 128, 256)
SIZES = ((64, 6, 256), (4, 12, 4096))  # B, H, T
_REPEATS = 20


def candidates() -> list[Plan]:
    """Every plan worth a measurement."""
    blocks = itertools.product((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3))
    return [Plan(*block) for block in blocks if block[0] * block[1] <= 128 * 128 // 2]


def nearest_first(shipped: Plan) -> list[Plan]:
    """The candidates by how many doublings and halvings they are from the shipped plan."""

    def distance(plan: Plan) -> float:
        pairs = zip(dataclasses.astuple(plan), dataclasses.astuple(shipped), strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs)

    return sorted(candidates(), key=distance)


def best(
    plans: Iterable[Plan],
    times: Callable[[Plan], list[float] | None],
    seconds: float = math.inf,
) -> tuple[Plan, int]:
    """The plan whose times, each relative to the fastest of its size, add up to the least.

    Args:
        times: returns one time a size, or None for a plan that cannot run.
        seconds: after which no other plan is tried, once one has run.
    Returns: the plan, and how many were tried.
    Raises: RuntimeError if no plan can run.
    """
    measured, tried, end = {}, 0, time.monotonic() + seconds
    for plan in plans:
        if measured and time.monotonic() >= end:
            break
        tried += 1
        if (result := times(plan)) is not None:
            measured[plan] = result
    if not measured:
        raise RuntimeError("tune: at least one plan must run; got none")
    fastest = [min(column) for column in zip(*measured.values(), strict=True)]

    def relative(plan: Plan) -> float:
        return sum(t / f for t, f in zip(measured[plan], fastest, strict=True))

    return min(measured, key=relative), tried


def rows(architecture: str, winners: dict[tuple[str, int], Plan]) -> str:
    """The entry of `_PLANS` for (kernel, D) -> plan."""
    lines = [f'    "{architecture}": (']
    for D in HEAD_SIZES:
        plans = (winners[kernel, D] for kernel in KERNELS)
        fields = (f"Plan({p.block_m}, {p.block_n}, {p.warps}, {p.stages})" for p in plans)
        pairs = (f'"{kernel}": {field}' for kernel, field in zip(KERNELS, fields, strict=True))
        lines.append(f"        {{{', '.join(pairs)}}},")
    return "\n".join([*lines, "    ),"])


def _time_ms(run: Callable[[], None], flush: torch.Tensor) -> float:
    """Median time of `run`, replayed from a CUDA graph, with a cold L2 cache.

    Python may take longer to launch a kernel of so many arguments than a small one takes to run,
    and a graph to start than the kernel: on CUDA the events are in the graph.
    """
    run()
    graph, inside = torch.cuda.CUDAGraph(), torch.version.hip is None  # ROCm's cannot hold events
    start, stop = (torch.cuda.Event(enable_timing=True, external=inside) for _ in range(2))

    def between(call: Callable[[], None]) -> None:
        start.record()
        call()
        stop.record()

    with torch.cuda.graph(graph):
        between(run) if inside else run()
    times = []
    for _ in range(_REPEATS):
        flush.zero_()
        graph.replay() if inside else between(graph.replay)
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def _launcher(kernel: str, B, H, T, D, dtype, dropout_p) -> Callable[[Plan], None]:
    """What runs `kernel` with a plan; of the backward, the other kernel keeps its own plan."""
    qkv = torch.randn(B, T, 3, H, D, device="cuda", dtype=dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    gradients = torch.empty_like(qkv).permute(2, 0, 3, 1, 4)
    o = torch.empty_like(q)
    options = torch.tensor([1, 2, 0], device="cuda"), D**-0.5, dropout_p, 16
    lse = attention_kernels.forward(q, k, v, o, *options)

    def run(plan: Plan) -> None:
        if kernel == "forward":
            attention_kernels.forward(q, k, v, o, *options, blocks=plan)
        else:
            blocks = {f"{kernel}_blocks": plan}
            attention_kernels.backward(o, q, k, v, o, lse, *gradients, *options, **blocks)

    return run


def _measure(kernel: str, D: int, plan: Plan, dtype, dropout_p: float) -> list[float] | None:
    """Milliseconds at each of SIZES, or None if the plan asks for too much."""
    from triton import OutOfResources

    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    times = []
    for size in SIZES:
        run = _launcher(kernel, *size, D, dtype, dropout_p)
        try:
            times.append(_time_ms(functools.partial(run, plan), flush))
        except OutOfResources:
            return None
    return times


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
    winners = {
        (kernel, D): attention_kernels.plan(kernel, architecture, D, dtype, options.dropout > 0)
        for kernel, D in itertools.product(KERNELS, HEAD_SIZES)
    }
    wanted = list(itertools.product(KERNELS, dict.fromkeys(options.head_size)))
    end = time.monotonic() + options.seconds
    for number, (kernel, D) in enumerate(wanted):
        plans = nearest_first(winners[kernel, D])

        def times(plan, kernel=kernel, D=D):
            measured = _measure(kernel, D, plan, dtype, options.dropout)
            said = " ".join(f"{ms:.3f}" for ms in measured) + " ms" if measured else "cannot run"
            print(f"  {plan}: {said}", file=sys.stderr, flush=True)
            return measured

        share = (end - time.monotonic()) / (len(wanted) - number)
        winners[kernel, D], tried = best(plans, times, share)
        said = f"{kernel} D={D}: {winners[kernel, D]}, {tried} of {len(plans)} candidates tried"
        print(said, file=sys.stderr, flush=True)
    print(rows(architecture, winners))
    return 0


if __name__ == "__main__":
    sys.exit(main())
