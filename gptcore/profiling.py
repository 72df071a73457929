"""--profile: where the time of a training step goes, beside the least it could take.

A dozen or so steps of the run are timed, as many are traced by torch.profiler, and training goes
on. Every microsecond of the traced steps belongs to one kind of work, so that the kinds add up to
the wall clock: on a CPU by the op that the main thread is in, on a GPU by the kernel that runs,
which is also what a replayed CUDA graph shows; what is left are the gaps.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function
from tqdm import tqdm

from gptcore import machine
from gptcore.config import ConfigError, TrainConfig
from gptcore.distributed import World
from gptcore.roofline import (
    ATTENTION,
    DATA,
    GAPS,
    KINDS,
    OPTIMIZER,
    OTHER,
    PRODUCTS,
    Profile,
    work_of,
)
from kernels import rng

if TYPE_CHECKING:
    from gptcore.log import Log
    from gptcore.trainer import Run

WARM_UP, TIMED, TRACED = 8, 12, 12  # steps: lazy initialisation and graph capture come first

_PRODUCT_OPS = frozenset(
    f"aten::{name}"
    for name in "mm addmm addmm_ bmm baddbmm baddbmm_ addmv mv dot _addmm_activation".split()
)
# These look at or pass on tensors; what they take themselves is dispatch.
_DISPATCH_OPS = frozenset(
    f"aten::{name}"
    for name in (
        "alias as_strided chunk clone contiguous detach empty empty_like empty_strided expand "
        "flatten layer_norm lift_fresh linear matmul narrow new_empty permute reshape resize_ "
        "resolve_conj resolve_neg select set_ slice split squeeze t to _to_copy transpose unbind "
        "unflatten unfold unsqueeze _unsafe_view view"
    ).split()
)
_KERNELS = (  # names of GPU kernels, cuBLAS's and hipBLASLt's among them
    (ATTENTION, "attention|flash|fmha"),
    (PRODUCTS, "gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|cijk|linear_act_kernel|triton_tem"),
    (OPTIMIZER, "multi_tensor_apply|adam|lpnorm"),
    (DATA, "memcpy htod"),
)


def first_step(config: TrainConfig, step: int, world: World) -> int:
    """After which step of a run that starts at `step` to begin: nothing else may come between.

    Raises: ConfigError where there is no such step, or several processes train.
    """
    if world.parallel:
        raise ConfigError("--profile watches one process; leave torchrun or --profile out")
    count = TIMED + TRACED
    intervals = config.eval_interval, config.checkpoint_interval or config.eval_interval
    for first in range(step + WARM_UP, config.max_iters - count + 1):
        if all(at % interval for at in range(first, first + count) for interval in intervals):
            return first
    raise ConfigError(
        f"--profile needs {WARM_UP} steps and then {count} without an evaluation or a checkpoint; "
        f"got steps {step} to {config.max_iters}, eval_interval {intervals[0]}, "
        f"checkpoint_interval {intervals[1]}"
    )


def watch(run: Run, log: Log, matmul_rate: float) -> Iterator[None]:
    """To be advanced after every step; prints the profile and draws roofline.png when it has one.

    Does nothing without --profile. Closing it early ends what was begun.
    """
    if not run.config.profile:
        return
    copy_rate = machine.copy_rate(run.device)
    activity = ProfilerActivity.CUDA if run.device.type == "cuda" else ProfilerActivity.CPU

    def steps(count: int) -> Generator[None, None, float]:
        """Advanced after every step; returns the mean seconds of the next `count`."""
        machine.synchronize(run.device)
        start = time.perf_counter()
        for _ in range(count):
            yield
        machine.synchronize(run.device)
        return (time.perf_counter() - start) / count

    for _ in range(first_step(run.config, run.step - 1, run.world) - run.step):
        yield
    timed_s = yield from steps(TIMED)
    profiler = torch.profiler.profile(activities=[activity], acc_events=True)
    with _labelled(run.update), profiler as trace:
        traced_s = yield from steps(TRACED)
    events = trace.events()
    on_gpu, muon = run.device.type == "cuda", run.config.optimizer == "muon"
    seconds = of_gpu(events, muon=muon) if on_gpu else of_cpu(events)
    seconds = {kind: total / TRACED for kind, total in seconds.items()}
    profile = Profile(
        seconds=seconds | {GAPS: traced_s - sum(seconds.values()) + seconds[GAPS]},
        work=work_of(run.model, run.config, run.update.dtype),
        traced_s=traced_s,
        timed_s=timed_s,
        tokens=run.config.sequences * run.model.config.block_size,
        matmul_rate=matmul_rate,
        copy_rate=copy_rate,
    )
    image = run.folder / "roofline.png"
    profile.plot(image)
    tqdm.write(f"{profile.table()}\n  {image}")
    log.restart_clock()


@contextlib.contextmanager
def _labelled(update) -> Iterator[None]:
    """Mark in the trace, on the host, what no name of an op gives away."""
    marks = (
        (update, "_batch", DATA),
        (update, "_fetch", DATA),
        (update.guard, "inspect", OPTIMIZER),
        (rng, "_keep_numpy", OTHER),  # dropout masks: no op of torch's
        (rng.MasksAhead, "_draw", OTHER),
    )
    before = [vars(owner).get(name) for owner, name, _ in marks]
    for owner, name, kind in marks:
        setattr(owner, name, record_function(kind)(getattr(owner, name)))
    replay = update.replay.labelled(ATTENTION) if update.replay else contextlib.nullcontext()
    try:
        with replay:
            yield
    finally:
        for (owner, name, _), function in zip(marks, before, strict=True):
            if function is None:
                delattr(owner, name)  # a method of its class again
            else:
                setattr(owner, name, function)


def of_cpu(events: Iterable) -> dict[str, float]:
    """Seconds by kind of the ops that the thread of the optimizer was in, each its own time.

    Whatever happens in attention, the optimizer or a marked range is theirs.
    """
    events = list(events)
    thread = next(event.thread for event in events if event.name.startswith("Optimizer.step"))
    seconds = dict.fromkeys(KINDS, 0.0)
    pending = [(e, None) for e in events if e.thread == thread and e.cpu_parent is None]
    while pending:
        event, inside = pending.pop()
        inside = inside or _range_kind(event.name)
        seconds[inside or _op_kind(event.name)] += event.self_cpu_time_total / 1e6
        pending += [(child, inside) for child in event.cpu_children]
    return seconds


def _range_kind(name: str) -> str | None:
    """The kind of all that happens within a range of this name."""
    if name in KINDS:
        return name
    if name.startswith("Optimizer."):
        return OPTIMIZER
    return ATTENTION if "attention" in name.lower() else None


def _op_kind(name: str) -> str:
    """The kind of an op's own time; autograd's ranges take time for Python and dispatch alone."""
    if name in _PRODUCT_OPS:
        return PRODUCTS
    computes = name.startswith(("aten::", "kernels::")) or "Compiled" in name
    return OTHER if computes and name not in _DISPATCH_OPS else GAPS


def of_gpu(events: Iterable, *, muon: bool = False) -> dict[str, float]:
    """Seconds by kind in which the GPU ran a kernel, each counted once where several overlap.

    Small kernels between the optimizer and the next forward pass, or product, draw the batch; those
    between two kernels of the optimizer clip the gradient.

    Args:
        muon: products between two kernels of the optimizer are its own.
    """
    seconds = dict.fromkeys(KINDS, 0.0)
    kernels = [
        (event.time_range.start, event.time_range.end, event.name.lower())
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    # waiting: seconds by kind since the optimizer, if it came last
    busy_until, waiting = 0.0, None
    may_wait = (OTHER, PRODUCTS) if muon else (OTHER,)
    for start, end, name in sorted(kernels):
        kind = next((kind for kind, names in _KERNELS if re.search(names, name)), OTHER)
        took = max(0.0, end - max(start, busy_until)) / 1e6
        busy_until = max(busy_until, end)
        begins = re.search("embed|gather|layer_norm", name)
        if waiting is not None and kind in may_wait and not begins:
            waiting[kind] += took
            continue
        if kind != DATA:
            _settle(waiting, seconds, kind)
            waiting = dict.fromkeys(may_wait, 0.0) if kind == OPTIMIZER else None
        seconds[kind] += took
    _settle(waiting, seconds, DATA)
    return seconds


def _settle(waiting: dict[str, float] | None, seconds: dict[str, float], then: str) -> None:
    """Add what came after the optimizer to `seconds`, by the kind of what came `then`."""
    for kind, waited in (waiting or {}).items():
        if then == OPTIMIZER:
            seconds[OPTIMIZER] += waited
        else:
            seconds[DATA if kind == OTHER else kind] += waited
