"""How many seconds of training to a given validation loss?

Question
    How soon does `train.py` reach the target on the whole validation split, over several seeds;
    and nanoGPT's own train.py at the same size?
Method
    Every run is a process of its own: `python train.py --preset P --seed S`, as users start it;
    its metrics.jsonl is watched, and it is stopped at the first evaluation that reaches the
    target. With --nanogpt DIR, nanoGPT's train.py runs, unmodified, on the same text and split,
    by the command of its README, in turns with the runs of gptcore. nanoGPT fixes its seed and
    prints an estimate of the validation loss (its eval_iters batches); its best checkpoint is
    evaluated here on the whole split as well. On a GPU each trains for one step first, uncounted,
    so that the caches of Triton and torch.compile on this machine's disk are full for both.
Formula
    seconds: from the end of the evaluation before the first step to the end of the evaluation
    that reached the target, by the clock of the run (gptcore) or of its output (nanoGPT); the
    evaluations between count, start-up does not, and what a process compiles in spite of the
    caches does.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import render
from bench.harness import OURS, Options, Skip
from bench.record import ROOT
from gptcore.config import ConfigError, RunError
from gptcore.presets import PRESETS

# What nanoGPT's CPU recipe prints after its 2,000 steps, an estimate over 20 batches. The whole
# split, by which gptcore's runs are judged, gives 1.8983 for the same weights.
NANOGPT_CPU_LOSS = 1.8857
NOTEBOOK_LOSS = 1.4804  # the best validation loss of the seeds' notebook
NANOGPT_COMMANDS = {
    "cpu": (
        *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100"),
        *("--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
        *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
    ),
    "cuda": ("--log_interval=100",),
}
_NANOGPT_EVALUATION = re.compile(r"step (\d+): train loss ([\d.]+), val loss ([\d.]+)")
NANOGPT_SEED = 1337
LEAST_SECONDS = 20.0  # in fewer no run gets anywhere
_ONE_STEP = {OURS: ("--max_iters", "1"), "nanogpt": ("--max_iters=1",)}

Run = dict[str, Any]


def preset_of(options: Options) -> str:
    """The recipe asked for, or the fastest one for this device."""
    if options.preset is not None:
        return options.preset
    return "speedrun-cpu" if options.device.type == "cpu" else "speedrun"


def target_of(options: Options) -> float:
    """The loss asked for, or the one on record for this kind of device."""
    if options.target is not None:
        return options.target
    return NANOGPT_CPU_LOSS if options.device.type == "cpu" else NOTEBOOK_LOSS


def check_preset(name: str | None) -> None:
    """Raises: ConfigError for an unknown preset."""
    if name is not None and name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")


def data_of(options: Options) -> str:
    """The text that runs are given: no target here says anything about train.py's other one.

    Raises: Skip where Tiny Shakespeare cannot be had.
    """
    from gptcore.data import load_text

    if options.data != "auto":
        return options.data
    try:
        load_text("tinyshakespeare")
    except ConfigError as error:
        raise Skip(str(error)) from error
    return "tinyshakespeare"


def train_command(
    options: Options, seed: int, folder: Path, flags: tuple[str, ...] = ()
) -> list[str]:
    """The command of one run of gptcore, `flags` last."""
    command = [sys.executable, str(ROOT / "train.py"), "--preset", preset_of(options)]
    command += ["--seed", str(seed), "--device", str(options.device), "--data", data_of(options)]
    command += ["--out_dir", str(folder), "--sample_tokens", "0"]
    if options.dtype_given:
        command += ["--dtype", str(options.dtype).removeprefix("torch.")]
    return [*command, *flags]


def follow(metrics: Path, process: subprocess.Popen, seconds: float) -> Iterator[Run]:
    """The evaluations of a run, as they are written, until its process or the time ends."""
    from gptcore.log import read_metrics

    seen, start = 0, time.perf_counter()
    while True:
        ended = process.poll() is not None or time.perf_counter() - start > seconds
        evaluations = [r for r in read_metrics(metrics) if r["kind"] == "eval"]
        yield from evaluations[seen:]
        seen = len(evaluations)
        if ended:
            return
        time.sleep(0.05)


def gptcore_run(
    options: Options, seed: int, target: float | None = None, flags: tuple[str, ...] = ()
) -> Run:
    """One run to the target, by default the question's, or to its end, or to the time allowed.

    Raises: RunError if the run broke short of the target; Skip if nothing was evaluated in time.
    """
    curve, begun, dtype, reached = [], None, None, False
    target = target_of(options) if target is None else target
    with tempfile.TemporaryDirectory(prefix="bench-run-") as folder:
        out_dir = Path(folder) / "run"
        with open(Path(folder) / "log", "w+") as log:
            process = subprocess.Popen(
                train_command(options, seed, out_dir, flags), stdout=log, stderr=subprocess.STDOUT
            )
            allowed = options.run_seconds or float("inf")
            try:
                for evaluation in follow(out_dir / "metrics.jsonl", process, allowed):
                    begun = evaluation["elapsed_s"] if begun is None else begun
                    if evaluation["val_loss"] is None:  # was no number
                        continue
                    curve.append([evaluation["elapsed_s"] - begun, evaluation["val_loss"]])
                    steps = evaluation["step"]
                    reached = evaluation["val_loss"] <= target
                    if reached:
                        break
            finally:
                ended = process.poll() is not None
                _stop(process)
            if ended and process.returncode and not reached:
                log.seek(0)
                said = log.read().strip().splitlines() or [f"exit code {process.returncode}"]
                raise RunError(f"time_to_loss: train.py must run; got {said[-1]}")
            if not curve:
                raise Skip(f"no evaluation within {allowed:.0f} s")
            dtype = json.loads((out_dir / "config.json").read_text())["train"]["dtype"]
    seconds, val_loss = curve[-1]
    return {
        "who": OURS,
        "seed": seed,
        "seconds": seconds,
        "steps": steps,
        "val_loss": val_loss,
        "reached": reached,
        "dtype": dtype,
        "curve": curve,
    }


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def nanogpt_run(options: Options, seed: int, flags: tuple[str, ...] = ()) -> Run:
    """nanoGPT's train.py to the target by its own estimate, or to its end; it fixes its seed.

    Args:
        flags: after those of its README.
    """
    if options.nanogpt is None:
        raise Skip("no folder named: --nanogpt DIR")
    target, curve, steps = target_of(options), [], 0
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-nanogpt-")))
        corpus = _prepare_nanogpt(options, work)
        flags = *NANOGPT_COMMANDS[options.device.type], *flags
        errors = stack.enter_context(open(work / "stderr", "w+"))
        process = subprocess.Popen(
            [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *flags],
            cwd=work,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        allowed = options.run_seconds or float("inf")
        begun, started = time.perf_counter(), None
        try:
            for line in process.stdout:  # it prints every log_interval steps
                now = time.perf_counter()
                match = _NANOGPT_EVALUATION.match(line)
                if match is not None:
                    started = now if started is None else started
                    steps = int(match[1])
                    curve.append([now - started, float(match[3])])
                # Its checkpoint is whole when it goes on after an evaluation, or ends.
                elif line.startswith("iter") and curve and curve[-1][1] <= target:
                    break
                if curve and now - begun > allowed:
                    break
        finally:
            _stop(process)
            process.stdout.close()
        if not curve:
            errors.seek(0)
            said = errors.read().strip().splitlines() or ["nothing"]
            raise RunError(f"time_to_loss: nanoGPT's train.py must print losses; got {said[-1]}")
        exact = _nanogpt_exact_loss(options, work, corpus)
    seconds, val_loss = curve[-1]
    return {
        "who": "nanogpt",
        "seed": NANOGPT_SEED,
        "seconds": seconds,
        "steps": steps,
        "val_loss": val_loss,
        "exact_val_loss": exact,
        "reached": val_loss <= target,
        "curve": curve,
    }


def _prepare_nanogpt(options: Options, work: Path):
    """A folder where nanoGPT's train.py finds its files and our text, split as ours is."""
    import torch

    from gptcore.data import Corpus, load_text
    from gptcore.tokenizer import tokenizer_for

    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(options.nanogpt / name, work / name)
    shutil.copytree(options.nanogpt / "config", work / "config")
    text = load_text(data_of(options))
    tokenizer = tokenizer_for("char", text.content)
    corpus = Corpus.build(text, tokenizer, val_fraction=0.1, device=torch.device("cpu"))
    data = work / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    for split in ("train", "val"):
        getattr(corpus, split).numpy().astype("uint16").tofile(data / f"{split}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": tokenizer.vocab_size}))
    return corpus


def _nanogpt_exact_loss(options: Options, work: Path, corpus) -> float | None:
    """The whole validation split under nanoGPT's last checkpoint; None if it saved none."""
    import torch

    from bench import models, peers

    path = work / "out-shakespeare-char" / "ckpt.pt"
    if not path.is_file():
        return None
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    module = peers.nanogpt(options)
    with models.silenced():
        model = module.GPT(module.GPTConfig(**checkpoint["model_args"]))
    names = {name.removeprefix("_orig_mod."): w for name, w in checkpoint["model"].items()}
    model.load_state_dict(names)
    model.eval()
    loss = tokens = 0
    with torch.no_grad():
        for idx, targets in corpus.validation(64, checkpoint["model_args"]["block_size"]):
            targets = targets.masked_fill(targets < 0, -1)  # what nanoGPT does not count
            count = (targets >= 0).sum().item()
            loss += model(idx, targets)[1].item() * count
            tokens += count
    return loss / tokens


def answer(options: Options, stopwatch, ceilings, show) -> dict[str, Any]:
    """The runs, gptcore's and nanoGPT's in turns, and their table."""
    runs: list[Run] = []
    absent: dict[str, str] = {}
    broken: list[str] = []
    runners = {OURS: gptcore_run}
    if options.wants("nanogpt"):
        runners["nanogpt"] = nanogpt_run
    if options.run_seconds is not None and options.run_seconds < LEAST_SECONDS:
        reason = f"{options.run_seconds:.0f} s are left; alone: python -m bench time_to_loss"
        absent = dict.fromkeys(runners, reason)
    for seed in range(NANOGPT_SEED, NANOGPT_SEED + options.seeds):
        for who, runner in runners.items():
            if who in absent:
                continue
            try:
                if seed == NANOGPT_SEED and options.device.type == "cuda":
                    runner(options, seed, flags=_ONE_STEP[who])
                runs.append(runner(options, seed))
            except (Skip, RunError) as reason:  # the other's runs are not lost with it
                absent[who] = str(reason)
                broken += [who] if who == OURS and isinstance(reason, RunError) else []
            else:
                _show_run(runs[-1])
    content = {
        "cases": [],
        "target": target_of(options),
        "preset": preset_of(options),
        "runs": runs,
        "absent": absent,
        "broken": broken,
    }
    for table in tables(content):
        print(f"\n{table['title']}\n{render.align(table['rows'])}")
    for name, reason in absent.items():
        print(f"  {name} skipped: {reason}")
    return content


def _show_run(run: Run) -> None:
    said = "reached" if run["reached"] else "NOT reached"
    print(
        f"{run['who']} seed {run['seed']}: {said}, loss {run['val_loss']:.4f} after "
        f"{run['steps']} steps, {run['seconds']:.1f} s",
        flush=True,
    )


def tables(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Title and rows for the runs of a record, if there are any."""
    if not content["runs"]:
        return []
    title = f"to validation loss {content['target']:g}, preset {content['preset']}"
    if any(run["who"] == "nanogpt" for run in content["runs"]):
        title += "; nanogpt fixes its seed, and reaches the loss by its own estimate"
    return [{"title": title, "rows": rows(content["runs"])}]


def rows(runs: list[Run]) -> list[list[str]]:
    """Mean and, of values that differ, standard deviation over runs; one row a contestant.

    Where a run ended without having reached the loss, the seconds are only a lower bound.
    """
    header = ["", "runs", "seeds", "reached", "seconds", "steps", "val loss", "on whole split"]
    table = [[*header, "seconds / ours"]]
    ours = [run for run in runs if run["who"] == OURS]
    for who in dict.fromkeys(run["who"] for run in runs):
        group = [run for run in runs if run["who"] == who]
        seeds = len({run["seed"] for run in group})
        exact = [run.get("exact_val_loss", run["val_loss"]) for run in group]
        bound = "" if all(run["reached"] for run in group) else ">"
        cells = [
            bound + _spread([run["seconds"] for run in group], 1),
            _spread([run["steps"] for run in group], 0),
            _spread([run["val_loss"] for run in group], 4),
            "" if None in exact else _spread(exact, 4),  # no checkpoint was saved
        ]
        seconds = statistics.mean(run["seconds"] for run in group)
        reached = f"{sum(run['reached'] for run in group)}/{len(group)}"
        ratio = ""
        if ours and all(run["reached"] and run["seconds"] for run in ours):
            ratio = f"{bound}{seconds / statistics.mean(run['seconds'] for run in ours):.2f}"
        table.append([who, str(len(group)), str(seeds), reached, *cells, ratio])
    return table


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(set(values)) == 1 else f"{mean} +- {statistics.stdev(values):.{digits}f}"


def plot(content: dict[str, Any], folder: Path, stem: str = "") -> list[Path]:
    """Validation loss against seconds, every run."""
    runs = [run for run in content["runs"] if len(run["curve"]) > 1]
    if not runs:
        return []
    title = f"validation loss against seconds, preset {content['preset']}"
    drawing, axes = render.figure(title, "seconds", "validation loss")
    colours = {OURS: render.OURS_STYLE["color"], "nanogpt": "#2060c0"}
    for who in dict.fromkeys(run["who"] for run in runs):
        group = [run for run in runs if run["who"] == who]
        for number, run in enumerate(group):
            label = f"{who} ({len(group)} runs)" if not number else None
            points = zip(*run["curve"], strict=True)
            axes.plot(*points, marker=".", color=colours[who], label=label)
    axes.axhline(content["target"], color="k", linestyle="--", label=f"{content['target']:g}")
    losses = [loss for run in runs for _, loss in run["curve"]]
    axes.set_ylim(min(losses) - 0.05, min(max(losses), min(losses) + 1.5))
    axes.legend(fontsize=8)
    return [render.save(drawing, folder / f"{stem}time_to_loss.png")]
