"""How much memory does a step take, and how does it grow with T?

Question
    What is the peak of the allocator over one attention forward and backward, and over one
    training step, and does it grow with T or with T squared?
Method
    One call after the warm-ups that its timing has, too; the most bytes that torch's allocator
    held at once beyond what it held before (inputs, weights, optimizer state). On CUDA from the
    allocator's own counters, and over all calls but the first: an update that is replayed asks for
    its memory when it is captured. On the CPU by adding up the profiler's memory events.
Formula
    MB = 1e6 bytes.
"""

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import attention, render, step
from bench.harness import OURS, Budget, Case, Options, Skip, first_line

TITLES = {
    "core": "attention core B4-H6-D64, forward+backward",
    "step": "training step",
    "notebook": "training step of the notebook's model, 64 sequences, dropout 0.2",
}


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that `call` holds at once beyond those held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    options = {"profile_memory": True, "acc_events": True}
    with profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def warm_peak_bytes(call: Callable[[], Any], warm_ups: int, device: torch.device) -> int:
    """`peak_bytes` of the call after the warm-ups; on CUDA of all but the first."""
    first = 1 if device.type == "cuda" else warm_ups

    def rest():
        for _ in range(warm_ups + 1 - first):
            call()

    for _ in range(first):
        call()
    return peak_bytes(rest, device)


def cases(options: Options) -> list[Case]:
    """Attention's sweep over T, then whole steps of growing block size."""
    cuda = options.device.type == "cuda"
    found = [
        dataclasses.replace(case, sweeps=("T",))
        for case in attention.cases(options)
        if "T" in case.sweeps and not case.shape["p"] and (case.quick or not options.quick)
    ]
    if options.quick and not cuda:
        found = [case for case in found if case.shape["T"] < 512]
    preset, Ts = ("notebook", (128, 256, 512, 1024)) if cuda else ("nanogpt-cpu", (64, 128, 256))
    for T in Ts[:2] if options.quick else Ts:
        size = step.Size(f"step T{T}", preset, {"block_size": T, "dropout": 0.0})
        found.append(step.step_case(size, options, sweeps=("T",), shape={"kind": "step"}))
    if options.full and not cuda:
        notebook = step.Size("notebook", "notebook", {})
        found.append(step.step_case(notebook, options, shape={"kind": "notebook"}))
    return found


def answer(options: Options, stopwatch, ceilings, show) -> dict[str, Any]:
    """Peaks of every contestant, as a table a sweep; nothing is timed."""
    budget = Budget(float("inf") if options.full else options.seconds)
    peaks: dict[str, dict[str, dict[str, float]]] = {}  # kind -> T -> name -> MB
    absent: dict[str, str] = {}
    left_out, broken = [], []
    for case in cases(options):
        kind, T = case.shape["kind"], str(case.shape["T"])
        if budget.left <= 0 and peaks:
            left_out.append(case.name)
            continue
        for contestant in case.open():
            try:
                call = (contestant.here or contestant.start)()
                peak = warm_peak_bytes(call, contestant.warm_ups, options.device) / 1e6
            except Skip as reason:
                absent[contestant.name] = str(reason)
            except torch.OutOfMemoryError:
                absent[f"{contestant.name} at T {T}"] = "out of memory"
            except Exception as error:  # a broken peer is a result, not the end
                absent[contestant.name] = first_line(error)
                broken += [OURS] if contestant.name == OURS else []
            else:
                peaks.setdefault(kind, {}).setdefault(T, {})[contestant.name] = peak
        gc.collect()
    tables = []
    for kind, by_T in peaks.items():
        names = list(dict.fromkeys(name for row in by_T.values() for name in row))
        rows = [["MB", *(f"T {T}" for T in by_T), "growth"]]
        for name in names:
            values = [row.get(name) for row in by_T.values()]
            cells = [render.quantity(value) if value is not None else "" for value in values]
            known = [value for value in values if value]
            grown = f"x{known[-1] / known[-2]:.2f}" if len(known) > 1 else ""
            rows.append([name, *cells, grown])
        tables.append({"title": TITLES[kind], "rows": rows})
        print(f"\n{TITLES[kind]}\n{render.align(rows)}")
    for name, reason in absent.items():
        print(f"  {name}: {reason}")
    return {
        "cases": [],
        "peaks_mb": peaks,
        "tables": tables,
        "absent": absent,
        "broken": broken,
        "left_out": left_out,
    }


def plot(content: dict[str, Any], folder: Path, stem: str = "") -> list[Path]:
    """Memory against T."""
    paths = []
    for kind, by_T in content["peaks_mb"].items():
        if len(by_T) < 2:
            continue
        drawing, axes = render.figure(f"peak memory: {TITLES[kind]}", "T", "MB")
        for name in dict.fromkeys(name for row in by_T.values() for name in row):
            points = [(int(T), row[name]) for T, row in by_T.items() if name in row]
            style = render.OURS_STYLE if name == OURS else {}
            axes.plot(*zip(*points, strict=True), label=name, **style)
        render.log_axis(axes, [int(T) for T in by_T])
        axes.legend(fontsize=8)
        paths.append(render.save(drawing, folder / f"{stem}memory-{kind}.png"))
    return paths
