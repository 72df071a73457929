"""Triton kernels run under the interpreter wherever there is no GPU."""

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any @triton.jit executes

import pytest  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's "&" has it, also for children
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Sums split over threads round differently; one thread rounds alike on every machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device():
    """Where kernels are tested: the GPU if there is one, else the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(config, items):
    """Tests marked `gpu` skip without one; `slow` ones run only when asked for by -m."""
    wants_slow = "slow" in (config.option.markexpr or "")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))
        if item.get_closest_marker("slow") and not wants_slow:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))
