"""The process of a sweep that trains: requests come in on stdin, results go out on stdout.

A request is one line of JSON, {"preset", "given", "log"}; its result one line,
{"error", "bad_input", and of a finished run "step", "val_loss", ...}.
"""

import contextlib
import gc
import json
import os
import sys
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
    try:
        for line in sys.stdin:
            request = json.loads(line)
            with (
                open(request["log"], "a", encoding="utf-8") as log,
                contextlib.redirect_stdout(log),
                contextlib.redirect_stderr(log),
            ):
                result = trained(Settings(request["preset"], request["given"]))
            print(json.dumps(result), file=results, flush=True)
    except KeyboardInterrupt:
        return 1
    return 0


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
