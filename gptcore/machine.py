"""The machine a run is on: device, precision, how fast it multiplies, how much memory went."""

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gptcore.config import ConfigError
from kernels.backend import resolve
from kernels.timing import raise_clocks


def pick_device(name: str) -> torch.device:
    """The device that `--device` names; "auto" is the GPU if there is one.

    A GPU becomes the current one: streams that CUDA graphs are captured on, and events, are made
    there, wherever the tensors are.

    Raises: ConfigError if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; "
            "use --device cpu or install the build of torch for your GPU"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def check_backend(backend: str, device: torch.device) -> None:
    """Raises: ConfigError if `backend` of the fused ops cannot run on `device`."""
    try:
        resolve(f"device {device}", backend, torch.empty(0, device=device))
    except RuntimeError as error:
        works = "eager" if device.type == "cuda" else "auto"
        raise ConfigError(f"{error}; give --backend {works}") from error


def keep_freed_memory() -> bool:
    """Let malloc keep the memory that tensors up to 1 GB free; True where that is possible.

    By default glibc maps each large tensor afresh and unmaps it when it is freed, so that every
    step pays for the same page faults. A user who has set one of glibc's MALLOC_ variables is left
    alone.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, 2**31 - 1))


def limit_threads() -> None:
    """Let torch use no more threads than `core_count`, unless OMP_NUM_THREADS says how many.

    By default there is one for each hyperthread, whatever a container's quota is: two on one core
    wait for each other at the end of every op, and a quota stops all of them at once.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(min(torch.get_num_threads(), core_count()))


def core_count(root: Path = Path("/")) -> int:
    """Cores this process may use: those of its affinity, hyperthreads once, up to its quota.

    Args:
        root: of the file system that says so.
    """
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        return os.cpu_count() or 1
    folder = root / "sys/devices/system/cpu"
    cores = {
        _words(folder / f"cpu{cpu}/topology/thread_siblings_list") or cpu
        for cpu in os.sched_getaffinity(0)
    }
    return max(1, int(min(len(cores), _cpu_quota(root))))


def _cpu_quota(root: Path) -> float:
    """CPUs that the control groups of this process allow it; infinite where none says.

    Version 2 says "quota period" in cpu.max, version 1 has a file for each.
    """
    least = math.inf
    for group in _groups(root, "cpu"):
        v1 = _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        for quota in (_words(group / "cpu.max"), v1):
            if len(quota) == 2 and quota[0] not in ("max", "-1"):
                least = min(least, int(quota[0]) / int(quota[1]))
    return least


def memory_bytes(root: Path = Path("/")) -> tuple[float, float]:
    """(free, all) memory for this process, up to what its control groups allow it.

    What only keeps pages of files counts as free. Infinite where nobody says.

    Args:
        root: of the file system that says so.
    """
    lines = _lines(root / "proc/meminfo")
    free, total = (1024 * lines.get(name, math.inf) for name in ("MemAvailable:", "MemTotal:"))
    for group in _groups(root, "memory"):
        for limit, usage, pages in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            words = _words(group / limit) + _words(group / usage)
            if len(words) == 2 and words[0] != "max":
                most, used = map(int, words)
                used -= _lines(group / "memory.stat").get(pages, 0)
                free, total = min(free, max(0, most - used)), min(total, most)
    return free, total


def _lines(path: Path) -> dict[str, int]:
    """Of a file with a name and a number a line, perhaps with a unit; empty where there is none."""
    words = _words(path)
    return {a: int(b) for a, b in zip(words, words[1:], strict=False) if b.isdecimal()}


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups this process is in, of either version, and those above."""
    mount = root / "sys/fs/cgroup"
    for line in _words(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        version2 = number == "0" and not controllers
        if version2 or controller in controllers.split(","):
            top = mount if version2 else mount / controller
            own = top / path.lstrip("/")
            yield from (own, *own.parents)[: len(own.parts) - len(top.parts) + 1]


def _words(path: Path) -> tuple[str, ...]:
    """The words of a small file, none where there is no such file."""
    try:
        return tuple(path.read_text().split())
    except OSError:
        return ()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, best of a few: what MFU is measured against."""
    n = 8192 if device.type == "cuda" else 1024

    def product() -> Callable[[], object]:
        a = torch.randn(n, n, device=device, dtype=dtype)
        return lambda: a @ a

    return 2 * n**3 / _least_seconds(device, product)


def copy_rate(device: torch.device) -> float:
    """Bytes/s read and written by a copy past the caches, best of a few."""
    size = 1 << 30 if device.type == "cuda" else 1 << 27

    def copy() -> Callable[[], object]:
        source = torch.ones(size // 4, device=device)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)

    return 2 * size / _least_seconds(device, copy)


def _least_seconds(device: torch.device, build: Callable[[], Callable[[], object]]) -> float:
    """Seconds of one call of what `build` returns, at the fastest of six times.

    Two seconds end it: a CPU that does not multiply bfloat16 takes them for one product. A GPU
    makes ten calls a time, next to which a launch and a wait are nothing. The peak of its memory
    starts anew after them, without the tensors that `build` made.
    """
    call, best, calls = build(), math.inf, 10 if device.type == "cuda" else 1
    spent = 0.0
    raise_clocks(device, call)
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds / calls), spent + seconds
        if spent > 2:
            break
    del call
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return best


class Reading:
    """Numbers of a device and the moment it had them, for which nothing waits until it must.

    On a GPU they are copied to pinned memory behind the work that is queued so far.
    """

    def __init__(self, device: torch.device, *tensors: torch.Tensor):
        self.event = None
        if device.type == "cuda":
            self.copies = [
                torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for x in tensors
            ]
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        else:
            self.copies = [x.detach().clone() for x in tensors]
            self.at = time.perf_counter()

    def numbers(self) -> list[Any]:
        """Of each tensor, as nested lists; waits until the device was there."""
        if self.event is not None:
            self.event.synchronize()
        return [copy.tolist() for copy in self.copies]

    def seconds_since(self, earlier: "Reading") -> float:
        """From the moment of another reading to this one's; waits like `numbers`."""
        if self.event is None:
            return self.at - earlier.at
        self.event.synchronize()
        return 1e-3 * earlier.event.elapsed_time(self.event)


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory held so far: of the GPU's allocator, or of this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = _lines(Path("/proc/self/status")).get("VmHWM:")
    if held is not None:  # on Linux, where getrusage begins with the peak of the parent process
        return 1024 * held
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores, threads = core_count(), torch.get_num_threads()
    asked = ", as OMP_NUM_THREADS says" if os.environ.get("OMP_NUM_THREADS") else ""
    return f"CPU, {_many(cores, 'core')}, {_many(threads, 'thread')}{asked}"


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" + "s" * (count != 1)
