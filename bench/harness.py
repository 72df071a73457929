"""From a question to a record: build contestants, check them, time them in turns, compare.

A question is a module whose docstring says what it asks, by what method, and what a rate counts.
It has `cases(options) -> list[Case]`, which `run_cases` times, or `answer(options, stopwatch,
ceilings, show)`, which measures by itself and returns the record; and may have `tables(content)`
and `plot(content, folder, stem)`. A case is cheap until it is opened, so that listing them
allocates nothing. Nothing that fails its check is timed; it is reported instead.

Speed is given against `OURS`: ratio > 1 means that a peer takes longer.
"""

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.timing import (
    ROW,
    BrokenCall,
    Call,
    Stopwatch,
    measure,
    paired_ratio,
    replayed,
    summarise,
)
from kernels.checks import Comparison, Measured, compare_all, hold_rule

OURS = "gptcore"
PEER_RATIO = 8.0  # a peer's error against plain PyTorch's, at most; ours must obey the 2x rule

Tensors = dict[str, torch.Tensor]


class Skip(Exception):
    """A contestant cannot run here; the message says why, in words for the table."""


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    device: torch.device
    dtype: torch.dtype
    seconds: float
    quick: bool = False
    full: bool = False
    peers: tuple[str, ...] | None = None  # None: those worth their time on this device
    nanogpt: Path | None = None
    target: float | None = None
    seeds: int = 1
    preset: str | None = None
    data: str = "auto"
    dtype_given: bool = False
    run_seconds: float | None = None  # how long one training run may take

    def wants(self, peer: str) -> bool:
        """Whether `peer`, or the family before its dash, was asked for (or nothing was)."""
        return self.peers is None or any(
            peer == name or peer.startswith(name + "-") for name in self.peers
        )


@dataclass(frozen=True)
class Work:
    """What must be computed and moved, whoever does it."""

    flops: float
    bytes: float
    tokens: int = 0


@dataclass(frozen=True)
class Check:
    """Whether a contestant computes what it should, and in a word how well."""

    passed: bool
    text: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    `start()` returns the call to be timed; it and `check()` raise Skip where they cannot run.

    Args:
        warm_ups: untimed calls until each is like the next.
        here: like start, in this process, where `start` has another do and time the work.
        dtype: that it computes in, where that is not the case's.
    """

    name: str
    start: Callable[[], Call]
    check: Callable[[], Check]
    warm_ups: int = 1
    here: Callable[[], Call] | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Case:
    """One shape in one direction: who competes, and for how much work.

    Args:
        shape: axis name -> size; plots draw time against the axes that `sweeps` names.
        contestants: the names that `open` yields, as far as they are asked for.
        unit: "TFLOP/s", "GB/s" or "tokens/s".
        quick: part of --quick; full: part of --full only.
        flush: False where a call passes the caches many times over. Where True a call is an op, on
            a GPU replayed from a CUDA graph; else a step, with all that issues it.
        config: fields of the GPTConfig where a whole model is measured.
    """

    name: str
    shape: dict[str, Any]
    dtype: str
    work: Work
    unit: str
    open: Callable[[], Iterable[Contestant]]
    contestants: tuple[str, ...] = (OURS,)
    phase: str = ""
    sweeps: tuple[str, ...] = ()
    quick: bool = False
    full: bool = False
    flush: bool = True
    config: dict[str, Any] | None = None


@dataclass
class Bound:
    """An op bound to its inputs: what to call, and the leaves whose gradients are wanted."""

    forward: Callable[[], Any]
    leaves: Tensors


def named_results(bound: Bound, gradients: list[torch.Tensor]) -> Tensors:
    """Outputs o0, o1, ... and gradients dNAME of a bound op."""
    outputs = as_tuple(bound.forward())
    results = {f"o{i}": o.detach() for i, o in enumerate(outputs)}
    leaves = list(bound.leaves.values())
    if leaves:
        gradients = torch.autograd.grad(outputs, leaves, gradients)
        results |= {f"d{n}": g for n, g in zip(bound.leaves, gradients, strict=True)}
    return results


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    """One output or several, as several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def timed_call(bound: Bound, gradients: list[torch.Tensor], phase: str) -> Call:
    """The call of one phase: "forward" keeps nothing, "forward+backward" takes gradients."""
    if phase == "forward":

        def call():
            with torch.no_grad():
                bound.forward()
    else:
        leaves = list(bound.leaves.values())

        def call():
            torch.autograd.grad(as_tuple(bound.forward()), leaves, gradients)

    return call


def check_tensors(
    actual: Tensors,
    plain: Tensors,
    exact: Tensors,
    *,
    ours: bool,
    others: Iterable[Measured] = (),
) -> Check:
    """Hold results against float64, plain PyTorch of the same dtype setting the measure.

    Only names that all three have are compared: a peer may keep its weights in another layout.
    `others` are results on other inputs, asked for where ours break the rule on these.
    """
    names = [name for name in exact if name in actual]
    first = ({name: actual[name].to(plain[name].dtype) for name in names}, plain, exact)
    measured = tuple({name: results[name] for name in names} for results in first)
    comparisons = hold_rule(measured, others) if ours else compare_all(*measured)
    allowed = [c.passed if ours else _within(c, PEER_RATIO) for c in comparisons]
    ratios = [c.error_rms / max(c.plain_rms, c.tiny_rms) for c in comparisons]
    ratios += [c.error_max / max(c.plain_max, c.tiny_max) for c in comparisons]
    worst = max(ratios, key=lambda ratio: (math.isnan(ratio), ratio))
    failed = tuple(str(c) for c, ok in zip(comparisons, allowed, strict=True) if not ok)
    return Check(not failed, f"{worst:.2g}x plain", failed)


def _within(c: Comparison, ratio: float) -> bool:
    return c.error_max <= ratio * (c.plain_max + c.tiny_max) and c.error_rms <= ratio * (
        c.plain_rms + c.tiny_rms
    )


def started(contestant: Contestant, case: Case, device: torch.device) -> tuple[Call, str | None]:
    """The call to be timed, warm; and why an op is not replayed on a GPU, where it is not."""
    call = contestant.start()
    for _ in range(contestant.warm_ups):
        call()
    if case.flush and device.type == "cuda":
        try:
            return replayed(call, device), None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return call, first_line(error)
    return call, None


def _failure(error: Exception) -> dict[str, Any]:
    """What is on record of a contestant that raised: a result, not the end of the benchmark."""
    if isinstance(error, Skip | torch.OutOfMemoryError):
        reason = str(error) if isinstance(error, Skip) else "out of memory"
        return {"status": "skipped", "reason": reason}
    return {"status": "failed", "reason": first_line(error)}


def run_case(
    case: Case, options: Options, stopwatch: Stopwatch, ceilings: dict[str, float], seconds: float
) -> dict[str, Any]:
    """Check and time one case; its record holds every contestant, timed or not."""
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for contestant in case.open():
        result: dict[str, Any] = {"name": contestant.name}
        if contestant.dtype is not None:
            result["dtype"] = str(contestant.dtype).removeprefix("torch.")
        results[contestant.name] = result
        try:
            check = contestant.check()
            result["check"] = {"passed": check.passed, "text": check.text}
            if not check.passed:
                result |= {"status": "failed", "reason": "; ".join(check.details) or check.text}
                continue
            call, reason = started(contestant, case, stopwatch.device)
            if reason:
                result["not_replayed"] = reason
        except Exception as error:
            result |= _failure(error)
        else:
            calls[contestant.name] = call
    record = {
        "case": case.name,
        "phase": case.phase,
        "dtype": case.dtype,
        "shape": case.shape,
        "sweeps": list(case.sweeps),
        "unit": case.unit,
        "work": {"flops": case.work.flops, "bytes": case.work.bytes, "tokens": case.work.tokens},
        **({"config": case.config} if case.config else {}),
        **limit(case.work, ceilings),
        "results": list(results.values()),
    }
    how = {"max_rounds": 8 if options.quick else 50, "flush": case.flush}
    how["row"] = 0.0 if case.flush else ROW
    samples = None
    while calls and samples is None:
        try:
            samples = measure(calls, stopwatch, seconds=seconds, **how)
        except BrokenCall as broken:  # that ran when it was warmed up, with less memory held
            results[broken.name] |= _failure(broken.__cause__)
            del calls[broken.name]
            gc.collect()
    if samples is None:
        return record
    record |= {"calls_per_sample": samples.calls, "cold": samples.cold}
    for name, ms in samples.ms.items():
        summary = summarise(ms)
        result = results[name]
        result |= {
            "status": "timed",
            "median_ms": summary.median,
            "q25_ms": summary.q25,
            "q75_ms": summary.q75,
            "rate": rate(case, summary.median),
        }
        alike = ("not_replayed" in result) == ("not_replayed" in results.get(OURS, {}))
        if OURS in samples.ms and alike:  # a replay against launches would say nothing
            ratio = paired_ratio(ms, samples.ms[OURS])
            result |= {"ratio": ratio.median, "ratio_q25": ratio.q25, "ratio_q75": ratio.q75}
        result["samples_ms"] = ms
    hold_against(record, ceilings)
    return record


def hold_against(record: dict[str, Any], ceilings: dict[str, float]) -> None:
    """Set the least time of a case, and what percentage of each median it is."""
    record |= limit(Work(**record["work"]), ceilings)
    for result in record["results"]:
        if result["status"] == "timed":
            result["percent_of_limit"] = 100 * record["limit_ms"] / result["median_ms"]


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:200]


def limit(work: Work, ceilings: dict[str, float]) -> dict[str, Any]:
    """The least time the measured rates allow for this work, and which of them sets it."""
    compute_ms = work.flops / ceilings["matmul_tflops"] / 1e9
    memory_ms = work.bytes / ceilings["copy_gbps"] / 1e6
    bound = "compute" if compute_ms > memory_ms else "memory"
    return {"limit_ms": max(compute_ms, memory_ms), "bound": bound}


def rate(case: Case, ms: float) -> float:
    """What was done a second, in the unit of the case."""
    amount = {
        "TFLOP/s": case.work.flops / 1e12,
        "GB/s": case.work.bytes / 1e9,
        "tokens/s": case.work.tokens,
    }[case.unit]
    return amount / ms * 1e3


@dataclass
class Budget:
    """Seconds shared out over what is still to come."""

    seconds: float
    clock: Callable[[], float] = time.perf_counter
    started: float = field(init=False)

    def __post_init__(self):
        self.started = self.clock()

    @property
    def left(self) -> float:
        """Seconds until the end, below zero once it is past."""
        return self.seconds - (self.clock() - self.started)


def distinct(cases: list[Case]) -> list[Case]:
    """Each name once: a case that is also a point of a sweep belongs to both."""
    found: dict[str, Case] = {}
    for case in cases:
        first = found.get(case.name)
        if first is not None:
            sweeps = tuple(dict.fromkeys((*first.sweeps, *case.sweeps)))
            full, quick = first.full and case.full, first.quick or case.quick
            case = dataclasses.replace(first, sweeps=sweeps, quick=quick, full=full)
        found[case.name] = case
    return list(found.values())


def run_cases(
    cases: list[Case],
    options: Options,
    stopwatch: Stopwatch,
    ceilings: dict[str, float],
    show: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run cases in their order until the time is up; those left out are named, never dropped.

    A case whose like took more than twice what is left is not begun.
    """
    wanted = [
        case
        for case in distinct(cases)
        if options.full or (case.quick if options.quick else not case.full)
    ]
    budget = Budget(float("inf") if options.full else options.seconds)
    records, left_out = [], []
    for number, case in enumerate(wanted):
        typical = (budget.seconds - budget.left) / len(records) if records else 0.0
        if records and budget.left <= typical / 2:
            left_out.append(case.name)
            continue
        share = 20.0 if options.full else max(budget.left, 0) / (len(wanted) - number) / 2
        records.append(run_case(case, options, stopwatch, ceilings, min(share, 20.0)))
        show(records[-1])
        gc.collect()
        torch.compiler.reset()
    return {"cases": records, "left_out": left_out}
