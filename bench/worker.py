"""The naive model in a process of its own, as somebody running the notebook would have it.

The parent sends the configuration as one line of JSON, then a line for every step it wants
timed; the worker answers each with milliseconds. Between steps it sleeps on its input.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time

from gptcore.config import GPTConfig, TrainConfig

ALLOCATOR_VARIABLES = ("THP_MEM_ALLOC_ENABLE", "LD_PRELOAD", "GLIBC_TUNABLES")


class Worker:
    """Parent's side: `step_ms()` has the worker run one step and says how long it took."""

    def __init__(self, config: GPTConfig, train: TrainConfig):
        import torch

        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ALLOCATOR_VARIABLES and not name.startswith("MALLOC_")
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._ask(
            {
                "config": dataclasses.asdict(config),
                "batch_size": train.sequences,
                "learning_rate": train.learning_rate,
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

    def step_ms(self) -> float:
        """Milliseconds of one more step."""
        return self._ask("step")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __del__(self):
        if hasattr(self, "_process"):
            self.close()


def main() -> None:
    """Worker's side."""
    import torch

    from gptcore.naive import NaiveGPT

    task = json.loads(sys.stdin.readline())
    torch.set_num_threads(task["threads"])
    config = GPTConfig(**task["config"])
    torch.manual_seed(1337)
    model = NaiveGPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task["learning_rate"])
    shape = task["batch_size"], config.block_size
    idx, targets = (torch.randint(config.vocab_size, shape) for _ in range(2))

    def step():
        _, loss = model(idx, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    step()
    print(0, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print((time.perf_counter() - start) * 1e3, flush=True)


if __name__ == "__main__":
    main()
