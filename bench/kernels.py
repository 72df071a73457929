"""How long does each kernel of ours take, launch by launch?

Question
    What does every kernel that `kernels.codegen` compiles really take on this GPU, beside its
    static floor and bound? The times are also the record's "kernel_times", from which
    `python -m kernels.codegen` fills its column "measured" once the record is in bench/results.
Method
    Every case of `kernels.budgets` runs forward and backward once, and its launches are noted as
    they are shipped. Each is then started again and again by itself, the L2 overwritten in
    between; the time is the profiler's, of the kernel alone, and the median counts.
Formula
    GB/s = bytes of all tensor arguments, each once, over the median; and of the copy rate.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import render
from bench.harness import Budget, Options, first_line
from bench.timing import Call, Stopwatch
from kernels import backend
from kernels.budgets import CASES, Case
from kernels.codegen import Launch, distinct_launches
from kernels.gpus import product
from kernels.timing import raise_clocks

ROUNDS, QUICK_ROUNDS = 30, 10
LAUNCHES = (1, 4, 16)  # for each round, until a profile has as many records as rounds

Timer = Callable[[Launch, int], list[float]]  # launch, rounds -> microseconds of each round


def profiled(stopwatch: Stopwatch) -> Timer:
    """A timer that reads the profiler's record of the kernel, from its first to its last cycle.

    A profile may lack its first records, the more the longer the GPU has idled in this process
    (pytorch/pytorch#192021): then more launches are made, and the last ones count.
    """

    def recorded(launch: Launch, call: Call, launches: int) -> list[float]:
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
            # Within, as to begin leaves the GPU idle; of all launches the last ones count.
            raise_clocks(stopwatch.device, call)
            for _ in range(launches):
                stopwatch.flush()
                call()
            torch.cuda.synchronize(stopwatch.device)
        return [
            event.time_range.elapsed_us()
            for event in trace.events()
            if event.device_type == DeviceType.CUDA and event.name == launch.name
        ]

    def time(launch: Launch, rounds: int) -> list[float]:
        call = restart(launch)
        call()
        found = []
        for factor in LAUNCHES:
            if len(found) < rounds:
                found = recorded(launch, call, factor * rounds)
        return found[-rounds:]

    return time


def restart(launch: Launch) -> Call:
    """What starts the same kernel on the same arguments once more."""
    return lambda: backend.launch(launch.kernel, launch.grid, *launch.args, **launch.kwargs)


def launches(case: Case, device: torch.device) -> list[tuple[int, Launch]]:
    """The launches of a case on `device` that differ in code, numbered as codegen does."""
    found: list[Launch] = []
    with backend.recording(lambda *launch: found.append(Launch(*launch))):
        dataclasses.replace(case, device=str(device))()
    return distinct_launches(found)


def kernel_times(
    case: Case, gpu: str, device: torch.device, timer: Timer, rounds: int
) -> list[dict[str, Any]]:
    """The "kernel_times" of a case, one for each of its launches."""
    times = []
    for number, launch in launches(case, device):
        us = timer(launch, rounds)
        if not us:
            raise RuntimeError(f"kernel_times: {launch.name} must show in the profile; got nothing")
        time = {"gpu": gpu, "op": case.op, "case": case.name, "kernel": launch.name}
        time |= {"number": number, "us": statistics.median(us)}
        times.append(time | {"bytes": launch.bytes, "samples_us": us})
    return times


def answer(
    options: Options,
    stopwatch: Stopwatch,
    ceilings: dict[str, float],
    show: Callable,
    timer: Timer | None = None,
) -> dict[str, Any]:
    """Times of every kernel, as one table; nothing but a remark where there is no GPU."""
    content: dict[str, Any] = {"cases": [], "tables": [], "absent": {}, "broken": []}
    content["left_out"] = []
    if timer is None and options.device.type != "cuda":
        content["absent"]["kernels"] = f"runs on a GPU; this is a {options.device.type}"
        print(f"  kernels: {content['absent']['kernels']}")
        return content
    timer = timer or profiled(stopwatch)
    name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "CPU"
    gpu = product(name)
    budget = Budget(float("inf") if options.full else options.seconds)
    times: list[dict[str, Any]] = []
    for case in CASES:
        if budget.left <= 0 and times:
            content["left_out"].append(f"{case.op} {case.name}")
            continue
        try:
            rounds = QUICK_ROUNDS if options.quick else ROUNDS
            times += kernel_times(case, gpu, options.device, timer, rounds)
        except torch.OutOfMemoryError:
            content["absent"][f"{case.op} {case.name}"] = "out of memory"
        except Exception as error:  # a result, not the end
            content["absent"][f"{case.op} {case.name}"] = first_line(error)
            content["broken"].append(f"{case.op} {case.name}")
    rows = [["", "us", "GB/s", "% of copy"]]
    for time in times:
        rate = time["bytes"] / time["us"] / 1e3
        cells = render.quantity(time["us"]), render.quantity(rate)
        share = f"{100 * rate / ceilings['copy_gbps']:.0f}"
        rows.append([f"{time['op']} {time['case']} {time['kernel']}", *cells, share])
    title = f"kernels on one {gpu}, cold L2; floors and bounds: python -m kernels.codegen"
    print(f"\n{title}\n{render.align(rows)}")
    for what, reason in content["absent"].items():
        print(f"  {what}: {reason}")
    return content | {"tables": [{"title": title, "rows": rows}], "kernel_times": times}
