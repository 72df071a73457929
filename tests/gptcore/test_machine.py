"""What the machine is asked for."""

import itertools
import math
import os
import re
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path

import pytest
import torch

from gptcore import machine
from gptcore.config import ConfigError
from kernels import timing

FAULTS = """
import resource, sys
import torch
from gptcore import machine
if sys.argv[1] == "keep":
    assert machine.keep_freed_memory()
faults = []
for _ in range(20):  # aligned requests leave splinters; after a few freed memory joins up again
    torch.ones(16_000_000)  # 64 MB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-5])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is what is asked")
def test_freed_memory_is_kept():
    """Page faults of four allocations, each freed before the next, with and without."""

    def faults(argument):
        command = [sys.executable, "-c", FAULTS, argument]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert faults("keep") < 200
    assert faults("leave") > 200


def test_a_users_settings_of_malloc_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert machine.keep_freed_memory() is False


V1 = "4:memory:/a\n2:cpu,cpuacct:/a/b\n"


@pytest.mark.parametrize(
    ("cpus", "files", "cores"),
    [
        ({0, 1, 2, 3}, {}, 4),
        ({1, 3}, {}, 2),
        ({0, 1, 2, 3}, {"siblings": "0-1 0-1 2-3 2-3"}, 2),
        ({0, 2}, {"siblings": "0-1 0-1 2-3 2-3"}, 2),
        ({0, 1}, {"siblings": "0,4 1,5"}, 2),
        ({0, 1, 2, 3}, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 4),
        ({0, 1, 2, 3}, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
        ({0, 1, 2, 3}, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        (
            {0, 1, 2, 3},
            {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000"},
            3,
        ),
        (
            {0, 1, 2, 3},
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "50000",
            },
            2,
        ),
    ],
    ids="plain affinity hyperthreads one-of-each other-form max quota half above v1".split(),
)
def test_cores_are_those_the_process_may_use(tmp_path, monkeypatch, cpus, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus, raising=False)
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    for cpu, siblings in enumerate(files.get("siblings", "").split()):
        files = {**files, topology.format(cpu): siblings}
    write_all(tmp_path, files)
    assert machine.core_count(tmp_path) == cores


def write_all(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


MEMINFO = {"proc/meminfo": "MemTotal: 8 kB\nMemFree: 1 kB\nMemAvailable: 4 kB\nHugePages_Total: 0"}


@pytest.mark.parametrize(
    ("files", "memory"),
    [
        ({}, (math.inf, math.inf)),
        (MEMINFO, (4096, 8192)),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/a",
                "sys/fs/cgroup/a/memory.max": "max",
                "sys/fs/cgroup/a/memory.current": "2000",
                "sys/fs/cgroup/memory.max": "5000",
                "sys/fs/cgroup/memory.current": "3000",
                "sys/fs/cgroup/memory.stat": "anon 7\ninactive_file 500",
            },
            (2500, 5000),
        ),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "3000",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "3000",
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "3100",
            },
            (0, 3000),
        ),
    ],
    ids=["unknown", "plain", "v2", "v1"],
)
def test_memory_is_what_the_process_may_have(tmp_path, files, memory):
    write_all(tmp_path, files)
    assert machine.memory_bytes(tmp_path) == memory


@pytest.mark.parametrize(("variable", "threads"), [(None, 1), ("", 1), ("7", 3)])
def test_threads_are_limited_unless_the_user_has_said_how_many(monkeypatch, variable, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(machine, "core_count", lambda: 1)
    torch.set_num_threads(3)
    machine.limit_threads()
    assert torch.get_num_threads() == threads
    words = machine.describe(torch.device("cpu"))
    assert words.startswith(f"CPU, 1 core, {threads} thread")
    assert words.endswith("as OMP_NUM_THREADS says") == bool(variable)


def test_fewer_threads_than_cores_stay_so(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "core_count", lambda: 8)
    torch.set_num_threads(2)
    machine.limit_threads()
    assert torch.get_num_threads() == 2


def test_the_gpu_that_is_named_becomes_the_current_one(monkeypatch):
    """A CUDA graph is captured on a stream of the current device: on another it would be empty."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert machine.pick_device("cuda:1") == torch.device("cuda:1")
    assert machine.pick_device("cuda") == torch.device("cuda")
    machine.pick_device("cpu:0")
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(ConfigError, match="sees 2 GPUs"):
        machine.pick_device("cuda:2")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_peak_of_a_process_is_not_that_of_its_parent(monkeypatch):
    """With which getrusage begins: it counts only where the kernel says no more."""
    usage, cpu = types.SimpleNamespace(ru_maxrss=7 << 30), torch.device("cpu")
    monkeypatch.setattr("resource.getrusage", lambda who: usage)
    held = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert machine.peak_memory_bytes(cpu) == pytest.approx(1024 * int(held[1]), rel=0.01)
    monkeypatch.setattr(machine, "_lines", lambda path: {})
    assert machine.peak_memory_bytes(cpu) == 7 << 40


def read_from(monkeypatch, seconds):
    """Let machine read this clock."""
    for module in (machine, timing):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=seconds))


META = torch.device("meta")


@pytest.mark.parametrize(
    ("rate", "work"),
    [
        (lambda: machine.matmul_rate(META, torch.float32), 2 * 1024**3),
        (lambda: machine.copy_rate(META), 2 * 2**27),
    ],
    ids=["matmul", "copy"],
)
def test_a_rate_is_work_over_the_seconds_of_the_fastest_call(monkeypatch, rate, work):
    """Calls take 0.2, 0.05 and 0.3 s in turns."""
    ticks = itertools.accumulate(itertools.cycle([0.01, 0.2, 0.01, 0.05, 0.01, 0.3]))
    read_from(monkeypatch, ticks.__next__)
    assert rate() == pytest.approx(work / 0.05)


def test_a_rate_is_found_in_seconds_where_one_product_takes_that_long(monkeypatch):
    """As in bfloat16 on a CPU that does not multiply it."""
    now, calls = [0.0], []
    read_from(monkeypatch, lambda: now[0])

    def product():
        calls.append(1)
        now[0] += 2.25

    assert machine._least_seconds(META, lambda: product) == 2.25
    assert len(calls) == 1


def test_a_gpu_is_measured_at_its_clocks_and_its_peak_forgets_that(monkeypatch):
    """The first call takes a second, the others 20 ms: three to raise clocks, six tens count."""
    now, calls, at_reset = [0.0], [], []

    def build():
        def call():
            now[0] += 0.02 if calls else 1.0
            calls.append(now[0])

        calls_itself = weakref.ref(call)

        def reset(device):
            at_reset.extend((device, calls_itself(), len(calls)))

        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
        return call

    read_from(monkeypatch, lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    gpu = torch.device("cuda:1")
    assert machine._least_seconds(gpu, build) == pytest.approx(0.02)
    assert at_reset == [gpu, None, 1 + 3 + 60]


def test_a_reading_holds_what_was_there(device):
    """However late it is looked at; a GPU's is the device's own clock."""
    x = torch.ones(2, 2, device=device)
    first = machine.Reading(device)
    x *= 2
    second = machine.Reading(device, x, x.sum())
    time.sleep(0.01)
    x.zero_()
    assert second.numbers() == [[[2, 2], [2, 2]], 8] and first.numbers() == []
    assert 0 < second.seconds_since(first) < machine.Reading(device).seconds_since(first)
