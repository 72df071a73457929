"""The learning-rate range test: raise the rate step by step until training breaks.

A short run whose rate grows by the same factor each step (`--schedule exponential`). The loss
falls where rates are useful and rises where they are too high. Suggested are the rate where the
smoothed loss stops falling, as the limit, and a tenth of it to start with (Smith 2017,
arXiv:1506.01186; the tenth is fastai's).
"""

import csv
import math
import statistics
from argparse import SUPPRESS
from pathlib import Path

from gptcore.config import ConfigError, RunError
from gptcore.files import first_free
from gptcore.flags import Parser, add_training_flags, take_settings
from gptcore.pool import terminate_as_interrupt

DIVERGED = 4.0  # stop when the smoothed loss is this many times the lowest, above it
SMOOTHING = 0.9  # of the exponential average
# The loss has stopped falling where this part of its whole fall is left: in a flat valley, where
# exactly its minimum lies is chance.
LEVEL = 0.02
# Settings of training that the test chooses, and those that say nothing to it.
OWN = ("schedule", "learning_rate", "min_lr", "max_iters", "lr_decay_iters", "resume")
REFUSED = (
    *("profile", "on_nonfinite", "checkpoint_interval", "log", "log_interval", "sample_tokens"),
    *("eval_interval", "eval_mode", "eval_tokens", "eval_iters"),
)


def add_arguments(parser: Parser) -> None:
    """The test's own flags, then those of training."""
    add = parser.add_argument_group("range test").add_argument
    add("--start_lr", type=float, default=1e-6, help="the first learning rate [1e-6]")
    add("--end_lr", type=float, default=1.0, help="the last learning rate [1]")
    add("--num_iter", type=int, default=200, help="steps from one to the other [200]")
    hidden = dict.fromkeys((*OWN, *REFUSED), SUPPRESS)
    add_training_flags(parser, {"out_dir": "folder; default runs/lr_range-N", **hidden})


def lr_range(arguments) -> int:
    """find a learning rate: loss against a rising rate, plotted, with a suggestion"""
    start, end, steps = arguments.start_lr, arguments.end_lr, arguments.num_iter
    settings = take_settings(vars(arguments))
    if not 0 < start < end < math.inf:
        raise ConfigError(f"--start_lr must be above 0 and below --end_lr; got {start}, {end}")
    if steps < 10:
        raise ConfigError(f"--num_iter must be at least 10; got {steps}")
    for name in OWN:
        if name in settings.given:
            raise ConfigError(f"lr_range sets {name} itself; leave --{name} out")
    for name in REFUSED:
        if name in settings.given:
            raise ConfigError(f"--{name} says nothing to lr_range; leave it out")
    settings.given.update(schedule="exponential", min_lr=start, learning_rate=end, max_iters=steps)
    settings.given["sample_tokens"] = 0  # asks for no memory
    folder = Path(settings.given.setdefault("out_dir", str(first_free("runs/lr_range"))))
    if folder.exists():
        raise ConfigError(f"lr_range: folder {folder} exists; give another --out_dir")
    try:
        with terminate_as_interrupt():
            rates, losses = measure(settings)
    except KeyboardInterrupt:
        print("interrupted; nothing to go on with: give the command again, with another --out_dir")
        raise
    smooth = smoothed(losses)
    limit = limit_of(rates, losses, smooth)
    save(rates, losses, smooth, limit, folder)
    if limit is not None and smooth[-1] == min(smooth):
        raise RunError(
            f"the smoothed loss was still falling at the last learning rate, {rates[-1]:.2g}; give "
            "a higher --end_lr, or a larger --num_iter"
        )
    if limit is None:
        raise RunError(
            f"the smoothed loss never fell clearly below the first losses, see {folder}/"
            "lr_range.png; give a lower --start_lr, a higher --end_lr or a larger --num_iter"
        )
    print(
        f"the smoothed loss stops falling at {limit:.2g}\n"
        f"suggestion  --learning_rate {limit / 10:.1g}, or up to {limit:.1g} as the peak of a "
        f"schedule with warm-up\nplot        {folder / 'lr_range.png'}, numbers in lr_range.csv"
    )
    return 0


def measure(settings) -> tuple[list[float], list[float]]:
    """Learning rate and loss of each step, until the loss has risen far above its lowest.

    Raises: ConfigError on bad settings; RunError if the first steps already break.
    """
    from gptcore import memory
    from gptcore.log import announce
    from gptcore.machine import matmul_rate
    from gptcore.optim import learning_rate
    from gptcore.trainer import compiler_errors, prepare, torch_as_it_comes, training_step

    rates, losses = [], []
    with torch_as_it_comes(), compiler_errors():
        run = prepare(settings)
        update = run.update
        announce(run, matmul_rate(run.device, update.dtype))
        again = "the same command, with another --out_dir"
        with memory.advised(run.config, run.model.config, run.device, update.dtype, again):
            while run.step < run.config.max_iters:
                rate = learning_rate(run.step, run.config)
                loss = training_step(run).item()
                if not math.isfinite(loss):
                    break
                rates.append(rate)
                losses.append(loss)
                smooth = smoothed(losses)
                if smooth[-1] > DIVERGED * min(smooth):
                    break
    if len(losses) < 10:
        raise RunError(f"the loss broke after {len(losses)} steps; give a lower --start_lr")
    return rates, losses


def smoothed(losses: list[float]) -> list[float]:
    """Exponential averages, corrected for their start."""
    average, result = 0.0, []
    for count, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        result.append(average / (1 - SMOOTHING**count))
    return result


def limit_of(rates: list[float], losses: list[float], smooth: list[float]) -> float | None:
    """The rate where the smoothed loss stops falling; None if nothing was learnt.

    That is, if it never falls two standard deviations below the first losses: a tenth, at least 10.
    """
    first = losses[: max(10, len(losses) // 10)]
    start, lowest = statistics.fmean(first), min(smooth)
    if lowest >= start - 2 * statistics.stdev(first):
        return None
    level = lowest + LEVEL * (start - lowest)
    return next(rate for rate, loss in zip(rates, smooth, strict=True) if loss <= level)


def save(rates, losses, smooth, limit: float | None, folder: Path) -> None:
    """lr_range.csv and lr_range.png.

    Raises: RunError if the disk refuses.
    """
    try:
        with open(folder / "lr_range.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["learning_rate", "loss", "smoothed_loss"])
            writer.writerows(zip(rates, losses, smooth, strict=True))
        plot(rates, losses, smooth, limit, folder / "lr_range.png")
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}") from error


def plot(rates, losses, smooth, limit: float | None, image: Path) -> None:
    """Loss against learning rate, and what is suggested."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="0.8", lw=1, label="loss")
    axes.plot(rates, smooth, lw=2, label="smoothed")
    if limit is not None:
        axes.axvline(limit / 10, color="C3", label=f"a tenth of that: {limit / 10:.2g}")
        axes.axvline(limit, color="C3", ls="--", label=f"stops falling: {limit:.2g}")
    top = max(losses[0], smooth[0]) * 1.3
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss (nats per token)")
    axes.set_ylim(min(losses) - 0.05 * (top - min(losses)), top)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120)
