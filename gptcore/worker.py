"""The process of a sweep that trains: requests come in on stdin, results go out on stdout.

A request is one line of JSON, {"preset", "given", "log"}; its result one line,
{"error", "bad_input", and of a finished run "step", "val_loss", ...}.
"""

import _thread
import contextlib
import gc
import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch

from gptcore.config import ConfigError, RunError
from gptcore.flags import Settings
from gptcore.log import read_metrics
from gptcore.trainer import train

KEPT = ("step", "val_loss", "val_accuracy", "best_val_loss", "best_step", "elapsed_s")


def main() -> int:
    """Serve until stdin ends or a signal comes; a run that is interrupted is saved first."""
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
    lines: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(lines,), daemon=True).start()
    try:
        while line := lines.get():
            request = json.loads(line)
            with (
                open(request["log"], "a", encoding="utf-8") as log,
                contextlib.redirect_stdout(log),
                contextlib.redirect_stderr(log),
            ):
                result = trained(Settings(request["preset"], request["given"]))
            print(json.dumps(result), file=results, flush=True)
    except (KeyboardInterrupt, BrokenPipeError):
        return 1
    return 0


def _receive(lines: queue.SimpleQueue) -> None:
    """Hand on what stdin says; at its end, as when the sweep was killed, interrupt the training."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # without a lock held as Python ends
        for line in stdin:
            lines.put(line)
    _thread.interrupt_main()
    lines.put(None)  # wakes who waits for a line


def trained(settings: Settings) -> dict[str, Any]:
    """Train; what came of it."""
    try:
        folder = train(settings)
        end = [r for r in read_metrics(Path(folder) / "metrics.jsonl") if r["kind"] == "end"][-1]
        return {"error": None, "bad_input": False, **{name: end[name] for name in KEPT}}
    except (ConfigError, RunError) as error:
        return {"error": str(error), "bad_input": isinstance(error, ConfigError)}
    except Exception as error:  # one broken trial, out of memory say, must not end the others
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".split("\n")[0], "bad_input": False}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
