"""Killed at random moments: what is on the disk loads, and going on changes nothing.

One process imports torch and forks a training run for each line that it reads; kill -9 hits
the fork, most often while a checkpoint is being written, since every step writes one.
"""

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptcore import trainer
from gptcore.checkpoint import checkpoint_folders, open_checkpoint
from gptcore.config import ConfigError
from gptcore.flags import parse_settings
from gptcore.log import read_metrics

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
ROOT = Path(__file__).parents[2]
STEPS = 30
FLAGS = (
    f"--preset=baby-cpu --max_iters={STEPS} --eval_interval=10 --checkpoint_interval=1 "
    "--log_interval=1 --eval_iters=1 --sample_tokens=0 --device=cpu --dtype=float32"
).split()
FORKS = """
import json, os, sys
import matplotlib.backends.backend_agg, torch._dynamo  # what a run would import in the end
from gptcore import trainer
import train
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        os._exit(train.main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Runs train.py with some flags, each in a fork of a process that has imported torch."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, "-c", FORKS],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def start(self, *flags) -> int:
        """The process number of a new run; to be followed by `exit_code`."""
        self.server.stdin.write(json.dumps(flags) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def exit_code(self) -> int:
        """Of the run, when it has ended; minus the signal that killed it."""
        return int(self.server.stdout.readline())

    def close(self):
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait(60)


@pytest.fixture(scope="module")
def runs():
    runs = Runs()
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def whole(runs, text_file, tmp_path_factory):
    """Flags and the folder of a run that nobody disturbed."""
    flags, folder = [*FLAGS, f"--data={text_file}"], tmp_path_factory.mktemp("whole") / "run"
    runs.start(*flags, f"--out_dir={folder}")
    assert runs.exit_code() == 0
    return flags, folder


def tensors(folder):
    return [
        (folder / "last" / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors")
    ]


def newest_step(folder):
    """Of the whole checkpoints `last` that lie in a run folder."""
    steps = [-1]
    for candidate in checkpoint_folders(folder, "last"):
        try:
            steps.append(open_checkpoint(candidate).progress.step)
        except ConfigError:
            continue
    return max(steps)


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(runs, whole, tmp_path, kills):
    flags, undisturbed = whole
    expected, moments = tensors(undisturbed), random.Random(kills)
    found = {"killed": 0, "with a checkpoint": 0, "while one was being written": 0}
    for number in range(kills):
        folder = tmp_path / str(number)
        child, step = runs.start(*flags, f"--out_dir={folder}"), moments.randrange(STEPS)
        while last_logged(folder) < step:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))  # some steps, checkpoints, or an evaluation
        with contextlib.suppress(ProcessLookupError):  # it may just have ended
            os.kill(child, signal.SIGKILL)
        code = runs.exit_code()
        assert code in (-signal.SIGKILL, 0)
        found["killed"] += code != 0
        found["while one was being written"] += (folder / "last.new").exists()
        if (step := newest_step(folder)) >= 0:
            found["with a checkpoint"] += 1
            assert open_checkpoint(folder, "last").progress.step == step
        runs.start(*flags, f"--out_dir={folder}", "--resume")
        assert runs.exit_code() == 0
        assert tensors(folder) == expected, f"kill {number}"
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            path.name for path in undisturbed.iterdir()
        )
    print(f"\n{kills} kills: {found}")
    assert found["killed"] >= 0.9 * kills and found["with a checkpoint"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_saves_within_a_step(runs, whole, tmp_path, number):
    flags, undisturbed = whole
    folder = tmp_path / "run"
    rarely = ("--eval_interval=1000000", "--checkpoint_interval=1000000", "--max_iters=1000000")
    child = runs.start(*flags, *rarely, f"--out_dir={folder}")
    while (before := last_logged(folder)) < 20:
        time.sleep(0.02)
    os.kill(child, number)
    assert runs.exit_code() == 1
    # A step may have ended between looking and killing, and one was under way.
    assert open_checkpoint(folder, "last").progress.step == last_logged(folder) <= before + 3
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in undisturbed.iterdir()
    )


def last_logged(folder) -> int:
    """The newest step in metrics.jsonl."""
    return max((record["step"] for record in read_metrics(folder / "metrics.jsonl")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "rounds"),
    [(["--preset=cpu", "--optimizer=adamw"], 80), (["--preset=notebook", "--batch_size=4"], 14)],
    ids=["cpu", "notebook"],
)
def test_what_a_checkpoint_costs(text_file, tmp_path, flags, rounds):
    """A step with a save in it and one without, in turns; and a save that is waited for."""
    out = [f"--data={text_file}", f"--out_dir={tmp_path / 'run'}", "--device=cpu"]
    run = trainer.prepare(parse_settings([*flags, *out]))
    calls = {
        "step": [trainer.training_step],
        "saving step": [lambda run: trainer.save(run, "last"), trainer.training_step],
        "the rest of it": [lambda run: run.writer.wait()],
        "copy": [lambda run: trainer.save(run, "last")],
        "writing": [lambda run: run.writer.wait()],
    }
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, kinds in calls.items():
            start = time.perf_counter()
            for call in kinds:
                call(run)
            times[name].append(1e3 * (time.perf_counter() - start))
    times = {name: values[1:] for name, values in times.items()}  # the first makes buffers
    ms = {name: statistics.median(values) for name, values in times.items()}
    kinds = zip(*map(times.get, ("step", "saving step", "the rest of it")), strict=True)
    low, cost, high = statistics.quantiles([b + c - a for a, b, c in kinds], n=4)
    interval = run.config.checkpoint_interval or run.config.eval_interval
    size = sum(path.stat().st_size for path in (run.folder / "last").iterdir()) / 1e6
    print(
        f"\n{' '.join(flags)}: {size:.1f} MB, step {ms['step']:.1f} ms; a save adds {cost:.1f} ms "
        f"(quartiles {low:.1f} to {high:.1f}), {cost / ms['step']:.1%} of a step, and every "
        f"{interval} steps {cost / ms['step'] / interval:.3%}; {ms['copy']:.1f} ms of copying are "
        f"waited for, {ms['writing']:.1f} ms of writing are not"
    )
    assert ms["copy"] < (ms["copy"] + ms["writing"]) / 2
