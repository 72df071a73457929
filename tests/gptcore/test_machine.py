"""What the machine is asked for."""

import subprocess
import sys

import pytest

from gptcore import machine

FAULTS = """
import resource, sys
import torch
from gptcore import machine
if sys.argv[1] == "keep":
    assert machine.keep_freed_memory()
faults = []
for _ in range(6):
    torch.ones(16_000_000)  # 64 MB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[1])
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
