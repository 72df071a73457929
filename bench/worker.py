"""A peer in a process of its own, as somebody running the notebook or nanoGPT would have it.

gptcore's trainer has malloc keep freed memory (`gptcore.machine.keep_freed_memory`), for the whole
process; a peer beside it would profit. The parent sends what to train as one line of JSON, then a
line, how many steps it wants timed; the worker answers with milliseconds a step. In between it
sleeps on its input.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import Options
from gptcore.config import GPTConfig, TrainConfig

ALLOCATOR_VARIABLES = ("THP_MEM_ALLOC_ENABLE", "LD_PRELOAD", "GLIBC_TUNABLES")
SETTLE = 3e-3  # seconds; OpenMP's threads look for more work for about one millisecond


def is_allocator_variable(name: str) -> bool:
    """Whether an environment variable makes malloc another one than a plain process has."""
    return name in ALLOCATOR_VARIABLES or name.startswith("MALLOC_")


class Worker:
    """Parent's side: `begin` has the worker build a peer, `step_ms` run steps of it."""

    def __init__(self):
        environment = {
            name: value for name, value in os.environ.items() if not is_allocator_variable(name)
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._end = weakref.finalize(self, _end, self._process)

    def begin(self, peer: str, config: GPTConfig, train: TrainConfig, options: Options) -> None:
        """Build `peer`, one of models.STEPS, of this size and run its first step; forget others."""
        import torch

        self._ask(
            {
                "peer": peer,
                "config": dataclasses.asdict(config),
                "train": dataclasses.asdict(train),
                "dtype": str(options.dtype).removeprefix("torch."),
                "nanogpt": options.nanogpt and str(options.nanogpt),
                "threads": torch.get_num_threads(),
            }
        )

    def _ask(self, message) -> float:
        with contextlib.suppress(BrokenPipeError):  # no answer will come, and that is said below
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"worker: must answer; it ended with {self._process.wait()}")
        return float(answer)

    def step_ms(self, steps: int = 1) -> float:
        """Milliseconds of each of more steps, begun and left with no thread of OpenMP spinning."""
        time.sleep(SETTLE)
        ms = self._ask(steps)
        time.sleep(SETTLE)
        return ms

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._end()


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    process.wait()


_workers: dict[str, Worker] = {}


def worker_of(peer: str) -> Worker:
    """The process of `peer`, a name, one for all cases: to start one takes seconds."""
    if peer not in _workers or not _workers[peer].alive:
        _workers[peer] = Worker()
    return _workers[peer]


def main() -> None:
    """Worker's side."""
    step = None
    for line in sys.stdin:
        message = json.loads(line)
        steps = 1
        if isinstance(message, int):
            steps = message
        else:
            step = None  # first let go of what it holds
            step = _begin(message)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        print((time.perf_counter() - start) * 1e3 / steps, flush=True)


def _begin(task: dict[str, Any]) -> Callable[[], None]:
    """The step of the peer that `task` describes."""
    import torch

    from bench import models

    torch.set_num_threads(task["threads"])
    options = Options(
        device=torch.device("cpu"),
        dtype=getattr(torch, task["dtype"]),
        seconds=0.0,
        nanogpt=task["nanogpt"] and Path(task["nanogpt"]),
    )
    config, train = GPTConfig(**task["config"]), TrainConfig(**task["train"])
    torch.manual_seed(train.seed)
    model = models.BUILD[task["peer"]](models.GPT(config), options)
    shape = train.sequences, config.block_size
    batch = tuple(torch.randint(config.vocab_size, shape) for _ in range(2))
    return models.STEPS[task["peer"]](model, train, batch, options)


if __name__ == "__main__":
    main()
