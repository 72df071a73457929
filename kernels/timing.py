"""The time of one call on a GPU: between two events of its own CUDA graph, at working clocks.

Python may take longer to issue small kernels than they take to run, and a graph longer to start.
"""

import time
from collections.abc import Callable

import torch


class Replayed:
    """A call captured in a CUDA graph, with an event at either end.

    The events are recorded in the graph itself, so that no sample holds what a replay issues before
    it: a graph that draws random numbers is handed seed and offset by two kernels more. ROCm's
    graphs cannot record events, and have them around a replay.

    Args:
        call: warm; whatever it compiles or allocates on first use is there.
        stream: to capture on. Not torch's own for captures, which is of the device that came first.
    """

    def __init__(self, call: Callable[[], object], stream: torch.cuda.Stream):
        self._graph, self._device = torch.cuda.CUDAGraph(), stream.device
        self._inside = torch.version.hip is None
        self._events = tuple(
            torch.cuda.Event(enable_timing=True, external=self._inside) for _ in range(2)
        )
        with torch.cuda.graph(self._graph, stream=stream):
            self._between(call) if self._inside else call()

    def _between(self, call: Callable[[], object]) -> None:
        self._events[0].record()
        call()
        self._events[1].record()

    def __call__(self) -> None:
        self._graph.replay()

    def milliseconds(self) -> float:
        """Of one replay, for which it waits."""
        self() if self._inside else self._between(self)
        torch.cuda.synchronize(self._device)
        return self._events[0].elapsed_time(self._events[1])


def raise_clocks(device: torch.device, call: Callable[[], object]) -> None:
    """Keep a GPU at `call` for 50 ms: while it was idle its clocks fell."""
    if device.type != "cuda":
        return
    call()  # the first may take that long to load its kernel
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    while time.perf_counter() - start < 0.05:
        call()
        torch.cuda.synchronize(device)
