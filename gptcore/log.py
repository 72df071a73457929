"""What a run writes and shows: metrics.jsonl, loss.png and the terminal.

metrics.jsonl holds one object a line: {"kind": "train", "step", "loss", "lr", "step_ms",
"tokens_per_s", "mfu"}, {"kind": "eval", "step", "train_loss", "val_loss", "val_accuracy",
"elapsed_s"} and, last, {"kind": "end", ...}; where something was wrong also {"kind": "skipped",
"step"}, {"kind": "spike", "step", "grad_norm", "median"} and {"kind": "rollback", "step",
"came_from", "learning_rate"}. A value that is no number is null.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import shlex
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from gptcore import machine
from gptcore.files import replace_bytes, replace_text
from gptcore.guard import LOOK_EVERY, Watch
from gptcore.optim import learning_rate
from gptcore.trackers import open_tracker

if TYPE_CHECKING:
    from gptcore.config import GPTConfig, TrainConfig
    from gptcore.data import Corpus
    from gptcore.evaluation import Evaluation
    from gptcore.tasks import Arithmetic
    from gptcore.trainer import Run

# By device type, the readings that a look between evaluations leaves in flight, not to wait.
LEFT = {"cuda": 1}
PLOT_EVERY_S = 60.0
PLOTTED = 1000  # evaluations at most; more are no clearer, and the memory for them would grow


def resume_command(run: Run) -> str:
    """What to type to go on."""
    return shlex.join(["python", "train.py", "--out_dir", str(run.folder), "--resume"])


def looks_after(step: int, config: TrainConfig) -> bool:
    """Whether the losses and norms up to `step` are looked at."""
    return step % config.log_interval == 0 or step % LOOK_EVERY == 0


class Log:
    """metrics.jsonl, loss.png and the terminal; keeps the run's clock."""

    def __init__(self, run: Run, step_seconds_at_rate: float):
        self.run, self.step_seconds_at_rate = run, step_seconds_at_rate
        self.path = run.folder / "metrics.jsonl"
        settings = json.loads(run.config_json)
        self.track = open_tracker(
            "none" if run.world.rank else run.config.log,
            run.folder,
            settings["train"] | settings["model"],
            run.step,
        )
        self.bar: tqdm | None = None
        self.watch = Watch()
        self.sent_for: deque[tuple[int, machine.Reading]] = deque()
        self.skipped: list[int] = []  # updates not reported yet
        self.started = time.perf_counter() - run.elapsed_s
        self.plotted = time.perf_counter()
        self.restart_clock()

    @contextlib.contextmanager
    def progress_bar(self):
        """Steps done, steps a second and the time left; silent where there is no terminal.

        Behind them, as of the last train line: loss, tokens a second, MFU and peak memory.
        """
        run = self.run
        with tqdm(
            total=run.config.max_iters,
            initial=run.step,
            unit="step",
            disable=True if run.world.rank else None,
            leave=False,
        ) as self.bar:
            yield

    def restart_clock(self) -> None:
        """Begin a new stretch of steps: what happened before is not their time."""
        self._read(0)
        self.clock, self.clock_step = machine.Reading(self.run.device), self.run.step

    def stepped(self, loss: torch.Tensor) -> None:
        """After each step; every log_interval steps what goes into a train line is sent for."""
        run = self.run
        self.bar.update()
        run.elapsed_s = time.perf_counter() - self.started
        if looks_after(run.step, run.config):
            reading = machine.Reading(run.device, loss, run.update.guard.norms)
            self.sent_for.append((run.step, reading))

    def look(self, wait: bool) -> list[int]:
        """Write and show what was sent for; returns the updates that the guard skipped.

        Args:
            wait: for the device to come to the present step. Otherwise a GPU has work to do
                meanwhile, for what was sent for last is left for the next look.
        """
        self._read(0 if wait else LEFT.get(self.run.device.type, 0))
        if wait:
            self._judge(self.run.update.guard.look(self.run.step))
        skipped, self.skipped = self.skipped, []
        return skipped

    def _read(self, left: int) -> None:
        """Write what was sent for but the last `left` times."""
        while len(self.sent_for) > left:
            step, reading = self.sent_for.popleft()
            loss, norms = reading.numbers()
            if step % self.run.config.log_interval == 0:
                self._write_line(step, loss, reading)
            self._judge(self.run.update.guard.look(step, norms))

    def _write_line(self, step: int, loss: float, reading: machine.Reading) -> None:
        run, config = self.run, self.run.config
        seconds = reading.seconds_since(self.clock) / (step - self.clock_step)
        self.clock, self.clock_step = reading, step
        tokens_per_s = config.sequences * run.model.config.block_size / seconds
        mfu, memory = self.step_seconds_at_rate / seconds, machine.peak_memory_bytes(run.device)
        self.write(
            kind="train",
            step=step,
            loss=loss,
            lr=learning_rate(step - 1, config),
            step_ms=1e3 * seconds,
            tokens_per_s=tokens_per_s,
            mfu=mfu,
        )
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, MFU {mfu:.0%}"
            + (f", {memory / 2**20:,.0f} MiB" if memory else ""),
            refresh=False,
        )

    def _judge(self, looked: list[tuple[int, float]]) -> None:
        """Record and show what the guard saw."""
        skipped, spikes = self.watch.judge(looked)
        for spike in spikes:
            self.write(kind="spike", step=spike.step, grad_norm=spike.norm, median=spike.median)
        if spikes:
            worst = max(spikes, key=lambda spike: spike.norm / spike.median)
            times = f"{worst.norm / worst.median:.0f} times the running median"
            more = f", the largest of {len(spikes)} spikes" if len(spikes) > 1 else ""
            tqdm.write(f"step {worst.step}: gradient norm {worst.norm:.3g}, {times}{more}")
        for step in skipped:
            self.write(kind="skipped", step=step)
        self.skipped += skipped

    def rewound(self, came_from: int) -> None:
        """The run is back at a checkpoint: forget what it did since."""
        run = self.run
        self.sent_for.clear()
        self.skipped.clear()
        if not run.world.rank:
            trim_metrics(self.path, run.step, run.evaluated_step)
        lr = run.config.learning_rate
        self.write(kind="rollback", step=run.step, came_from=came_from, learning_rate=lr)
        tqdm.write(f"back from step {came_from} to {run.step}, learning rate now {lr:.3g}")
        self.bar.n = run.step
        self.bar.refresh()
        self.restart_clock()

    def evaluated(self, training: Evaluation, validation: Evaluation) -> None:
        """Record and show one evaluation."""
        run = self.run
        run.elapsed_s = time.perf_counter() - self.started
        self.write(
            kind="eval",
            step=run.step,
            train_loss=training.loss,
            val_loss=validation.loss,
            val_accuracy=validation.accuracy,
            **run.corpus.scores(validation),
            elapsed_s=run.elapsed_s,
        )
        tqdm.write(
            f"step {run.step}: train loss {training.loss:.4f}, val loss {validation.loss:.4f} "
            f"({self.bits_per_character(validation):.3f} bits per character), "
            f"accuracy {validation.accuracy:.1%}{self.solved(validation)}, "
            f"{run.elapsed_s:.1f} s"
        )
        if time.perf_counter() - self.plotted > PLOT_EVERY_S:
            self.plot()

    def bits_per_character(self, validation: Evaluation) -> float:
        """The loss in bits, per character whatever the tokens are."""
        return validation.loss / math.log(2) * self.run.corpus.tokens_per_character

    def solved(self, validation: Evaluation) -> str:
        """Of a task, how much of it, in words."""
        solved = self.run.corpus.scores(validation).get("val_exact_match")
        return "" if solved is None else f", {solved:.2%} of held-out problems solved"

    def finished(self, validation: Evaluation) -> None:
        """The last lines."""
        run = self.run
        run.elapsed_s = time.perf_counter() - self.started
        memory = machine.peak_memory_bytes(run.device)
        self.write(
            kind="end",
            step=run.step,
            val_loss=validation.loss,
            val_accuracy=validation.accuracy,
            **run.corpus.scores(validation),
            val_bits_per_character=self.bits_per_character(validation),
            best_val_loss=run.best_val_loss,
            best_step=run.best_step,
            elapsed_s=run.elapsed_s,
            peak_memory_bytes=memory,
        )
        if run.corpus.text.note:
            print(f"WARNING: {run.corpus.text.note}")
        sample = ["python", "-m", "gptcore", "sample", str(run.folder)]
        if start := run.corpus.example():
            sample += ["--start", start]
        whole, extent = extent_of(validation, run.corpus)
        print(
            f"{'exact ' if whole else ''}validation loss {validation.loss:.4f} over {extent} "
            f"({self.bits_per_character(validation):.3f} bits per character, "
            f"accuracy {validation.accuracy:.1%}{self.solved(validation)}) "
            f"after {run.step} steps in {run.elapsed_s:.1f} s"
            + (f", peak memory {memory / 2**20:,.0f} MiB" if memory else "")
            + f"\nrun folder  {run.folder}"
            f"\nsample it   {shlex.join(sample)}"
        )

    def write(self, **record) -> None:
        """Append one object to metrics.jsonl; a value that is no number becomes null."""
        if self.run.world.rank:
            return
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
        self.track(clean)

    def plot(self) -> None:
        """loss.png from metrics.jsonl."""
        if self.run.world.rank:
            return
        self.plotted = time.perf_counter()
        plot_losses(self.path, self.run.folder / "loss.png")


def each_metric(path: Path) -> Iterator[dict[str, Any]]:
    """The records of metrics.jsonl, one at a time; a line cut off by a crash is left out."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and type(record.get("step")) is int:
                if isinstance(record.get("kind"), str):
                    yield record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All of `each_metric`."""
    return list(each_metric(path))


def trim_metrics(path: Path, step: int, evaluated_step: int) -> None:
    """Forget what a run did after the checkpoint it resumes from."""
    last = {"end": -1, "eval": evaluated_step}
    kept = [r for r in read_metrics(path) if r["step"] <= last.get(r["kind"], step)]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def plot_losses(metrics: Path, image: Path) -> None:
    """Training and validation loss against steps, at up to PLOTTED evaluations and the last.

    Where three or more can be seen, the first one, of a model that has learnt nothing, may lie
    above the picture.
    """
    from matplotlib.figure import Figure  # slow to import

    count = sum(r["kind"] == "eval" for r in each_metric(metrics))
    every = max(1, math.ceil(count / PLOTTED))
    evaluations = enumerate(r for r in each_metric(metrics) if r["kind"] == "eval")
    names = ("step", "train_loss", "val_loss")
    points = [
        [r.get(name) for name in names]
        for number, r in evaluations
        if number % every == 0 or number == count - 1
    ]
    steps, *losses = zip(*points, strict=True) if points else ([], [], [])
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for values, label in zip(losses, ("training", "validation"), strict=True):
        axes.plot(steps, values, marker=".", label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    later = [loss for values in losses for loss in values[1:] if isinstance(loss, int | float)]
    later = [loss for loss in later if math.isfinite(loss)]
    if len(steps) > 2 and later:
        margin = 0.1 * (max(later) - min(later)) or 0.1
        axes.set_ylim(min(later) - margin, max(later) + margin)
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    replace_bytes(image, content.getvalue())
    del figure, axes
    gc.collect()  # what a figure leaves is a megabyte in cycles


def extent_of(validation: Evaluation, corpus: Corpus | Arithmetic) -> tuple[bool, str]:
    """Whether all there is to validate on was evaluated, and how much that is, in words."""
    count, whole, unit = corpus.extent(validation)
    of = "" if count == whole else f"of {whole:,} "
    return count == whole, f"{count:,} {of}{unit}"


def _shared(run: Run) -> str:
    """How many processes there are, in words."""
    world = run.world
    return f"; shared by {world.size} processes, {world.parallel}" if world.parallel else ""


def _shape_of(name: str, shape: GPTConfig) -> str:
    """Of a rung of the ladder what it has, in words."""
    parts = {
        f"{shape.n_layer} layers": ("gpt", "naive"),
        f"{shape.n_head} heads of {shape.D}": ("gpt", "naive", "multihead"),
        f"a head of {shape.D}": ("head",),
        f"{shape.n_embd} wide": ("gpt", "naive", "multihead", "head", "bigram-embedding"),
        f"block {shape.block_size}": (name,),
    }
    return ", ".join(words for words, names in parts.items() if name in names)


def announce(run: Run, rate: float) -> None:
    """What is about to be trained, on what."""
    config, corpus, shape = run.config, run.corpus, run.model.config
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    train_size, val_size = corpus.sizes.values()
    if corpus.text.note:
        print(f"WARNING: {corpus.text.note}")
    print(
        f"data    {corpus.text.source}: {train_size:,} training and {val_size:,} validation "
        f"{corpus.unit}, vocabulary {corpus.tokenizer.vocab_size} ({corpus.tokenizer.kind})"
        f"{corpus.remark}\n"
        f"model   {config.model}, {parameters:,} parameters: {_shape_of(config.model, shape)}\n"
        f"device  {machine.describe(run.device)}, matrix products {rate / 1e9:,.0f} GFLOP/s\n"
        f"step    {str(run.update.dtype).removeprefix('torch.')}: {run.dtype_reason}; "
        f"{run.update.how}{_shared(run)}\n"
        f"run     {run.folder}, steps {run.step} to {config.max_iters} of "
        f"{config.sequences} x {shape.block_size} tokens"
    )
