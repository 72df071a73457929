"""Timing that can be believed: interleaved samples, medians with their spread, measured ceilings.

Method
    All contestants of a case take turns, one sample each a round, and the order turns too, so
    that a clock that drifts, a neighbour that wakes up and a chip that warms up meet all of them
    alike. A ratio is the median of the ratios within rounds, not the ratio of two medians.
    On CUDA a sample lies between two events, the L2 overwritten before it; an op is captured in a
    CUDA graph, events and all, and replayed, because Python may take longer to issue small kernels
    than they take to run. On the CPU the caches are overwritten before each sample, unless the
    fastest contestant takes less than SHORT seconds: then every sample is many calls in a row on
    warm caches, because a clock cannot see one. Steps of whole models run as they are, as many in a
    row as last ROW seconds: the first one after another contestant's takes up to twice its time,
    and nobody trains that way.
"""

import contextlib
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gptcore.machine import copy_rate, matmul_rate
from kernels.timing import Replayed, raise_clocks

SHORT = 2e-4  # seconds; below it a CPU sample holds several calls
SAMPLE = 1e-3  # seconds such a sample lasts at least
ROW = 0.1  # seconds that a sample of steps lasts at least
MIN_ROUNDS = 5
FEW_ROUNDS = 3  # where MIN_ROUNDS would take over twice the time that is left

Call = Callable[[], object]


class Stopwatch:
    """Times calls on one device.

    Args:
        device: where the calls compute.
        clock: seconds, rising; used on the CPU. Tests give their own.
        cache_bytes: overwritten before a cold sample; default twice the last-level cache.
    """

    def __init__(
        self,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
        cache_bytes: int | None = None,
    ):
        self.device, self.clock = device, clock
        size = 2 * last_level_cache(device) if cache_bytes is None else cache_bytes
        self._cache = torch.empty(size // 4, dtype=torch.int32, device=device)

    def flush(self) -> None:
        """Overwrite the last-level cache."""
        self._cache.zero_()

    def once(self, call: Call) -> float:
        """Seconds of one call, synchronised before and after."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = self.clock()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock() - start

    def sample(self, call: Call, calls: int = 1, cold: bool = True) -> float:
        """Milliseconds per call over `calls` calls in a row."""
        if isinstance(call, SelfTimed):
            return call(calls)
        if cold:
            self.flush()
        if isinstance(call, Replayed):
            return call.milliseconds()
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / calls
        start = self.clock()
        for _ in range(calls):
            call()
        return (self.clock() - start) * 1e3 / calls


def replayed(call: Call, device: torch.device) -> Replayed:
    """`call` as a CUDA graph: its kernels back to back, without what issues them.

    It runs a few times first, for whatever compiles or allocates on first use, and once to see
    that it never waits for the GPU: a capture that breaks leaves torch's generator and allocator
    in its midst.
    Raises: RuntimeError if it cannot be captured.
    """
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the mode, which is a prototype
        for mode in ("default", "default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    current.wait_stream(side)
    return Replayed(call, side)


class BrokenCall(Exception):
    """A contestant's call raised while it was measured; the error is the cause.

    Attributes:
        name: the contestant's.
    """

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class SelfTimed:
    """A call that does its own timing, in a process of its own: calls in a row -> ms of each."""

    def __init__(self, call: Callable[[int], float]):
        self._call = call

    def __call__(self, calls: int = 1) -> float:
        return self._call(calls)


@dataclass(frozen=True)
class Samples:
    """What `measure` saw: milliseconds of each contestant, round by round."""

    ms: dict[str, list[float]]
    calls: int  # per sample
    cold: bool


def measure(
    contestants: Mapping[str, Call],
    stopwatch: Stopwatch,
    *,
    seconds: float,
    max_rounds: int = 50,
    flush: bool = True,
    row: float = 0.0,
) -> Samples:
    """Time contestants in turns.

    Args:
        contestants: by name; at least one. They run once to warm up before they come here.
        seconds: how long to go on, but never less than MIN_ROUNDS rounds (FEW_ROUNDS of calls
            that take very long).
        flush: False where the work itself passes the caches many times over.
        row: seconds that the calls of one sample last at least; ROW for steps of whole models.
    Raises: BrokenCall.
    """
    once = {}
    for name, call in contestants.items():
        with _named(name):
            once[name] = min(stopwatch.once(call) for _ in range(2))
    calls, cold = 1, flush
    fastest = min(once.values())
    if row:
        calls = math.ceil(row / max(fastest, 1e-7))
    elif stopwatch.device.type == "cpu" and fastest < SHORT:
        calls, cold = max(1, math.ceil(SAMPLE / max(fastest, 1e-7))), False
    round_seconds = sum(once.values()) * calls
    if cold:
        round_seconds += len(contestants) * stopwatch.once(stopwatch.flush)
    least = MIN_ROUNDS if MIN_ROUNDS * round_seconds <= 2 * max(seconds, 1) else FEW_ROUNDS
    rounds = max(least, min(max_rounds, int(seconds / max(round_seconds, 1e-9))))
    names = list(contestants)
    ms: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    raise_clocks(stopwatch.device, contestants[names[0]])
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                with _named(name):
                    ms[name].append(stopwatch.sample(contestants[name], calls, cold))
    finally:
        gc.enable()
    return Samples(ms, calls, cold)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise BrokenCall(name) from error


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of some samples."""

    median: float
    q25: float
    q75: float

    @property
    def spread(self) -> float:
        """The interquartile range: half of all samples lie within it."""
        return self.q75 - self.q25


def summarise(samples: list[float]) -> Summary:
    """Median and quartiles; a single sample has no spread."""
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0])
    q25, median, q75 = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(median, q25, q75)


def paired_ratio(samples: list[float], base: list[float]) -> Summary:
    """samples / base, round by round: how many times longer the first took."""
    return summarise([a / b for a, b in zip(samples, base, strict=True)])


def last_level_cache(device: torch.device) -> int:
    """Bytes of the L2 of a GPU or the largest cache of a CPU; 32 MiB where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [
        int(text[:-1]) * units[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in units
    ]
    return max(sizes, default=32 << 20)


def ceilings(stopwatch: Stopwatch, dtype: torch.dtype) -> dict[str, float]:
    """What this machine does right now at its best, to hold every other rate against.

    Returns: copy_gbps (bytes read plus written by a copy past the caches), matmul_tflops (a
    square product in `dtype`), dispatch_us (one call on a tensor of one element).
    """
    one = torch.zeros(1, device=stopwatch.device)
    calls = [stopwatch.sample(lambda: one.add_(1), 1000, cold=False) for _ in range(7)]
    return {
        "copy_gbps": copy_rate(stopwatch.device) / 1e9,
        "matmul_tflops": matmul_rate(stopwatch.device, dtype) / 1e12,
        "dispatch_us": 1e3 * statistics.median(calls),
    }
