"""The learning-rate range test: raise the rate step by step until training breaks.

A short run whose rate grows by the same factor each step (`--schedule exponential`). The loss
falls where rates are useful and rises where they are too high. Suggested are the rate where the
smoothed loss falls fastest, a safe constant rate, and a tenth of where it is lowest, about the
highest peak that a schedule can pass through (Smith 2017, arXiv:1506.01186).
"""

import csv
import math
from pathlib import Path

from gptcore.config import ConfigError, RunError
from gptcore.flags import Parser, add_training_flags, take_settings

DIVERGED = 4.0  # stop when the smoothed loss is this many times the lowest, above it
SMOOTHING = 0.9  # of the exponential average


def add_arguments(parser: Parser) -> None:
    """The test's own flags, then those of training."""
    add = parser.add_argument_group("range test").add_argument
    add("--start_lr", type=float, default=1e-6, help="the first learning rate [1e-6]")
    add("--end_lr", type=float, default=1.0, help="the last learning rate [1]")
    add("--num_iter", type=int, default=200, help="steps from one to the other [200]")
    add_training_flags(parser)


def lr_range(arguments) -> int:
    """find a learning rate: loss against a rising rate, plotted, with a suggestion"""
    start, end, steps = arguments.start_lr, arguments.end_lr, arguments.num_iter
    settings = take_settings(vars(arguments))
    if not 0 < start < end < math.inf:
        raise ConfigError(f"--start_lr must be above 0 and below --end_lr; got {start}, {end}")
    if steps < 10:
        raise ConfigError(f"--num_iter must be at least 10; got {steps}")
    for name in ("schedule", "learning_rate", "min_lr", "max_iters", "lr_decay_iters", "resume"):
        if name in settings.given:
            raise ConfigError(f"lr_range sets {name} itself; leave --{name} out")
    settings.given.update(schedule="exponential", min_lr=start, learning_rate=end, max_iters=steps)
    folder = Path(settings.given.setdefault("out_dir", str(_free_folder())))
    if folder.exists():
        raise ConfigError(f"lr_range: folder {folder} exists; give another --out_dir")
    rates, losses = measure(settings)
    smooth = smoothed(losses)
    with open(folder / "lr_range.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["learning_rate", "loss", "smoothed_loss"])
        writer.writerows(zip(rates, losses, smooth, strict=True))
    steepest, lowest = suggestions(rates, smooth)
    plot(rates, losses, smooth, (steepest, lowest / 10), folder / "lr_range.png")
    print(
        f"loss falls fastest at {steepest:.2g}, is lowest at {lowest:.2g} (smoothed, "
        f"{len(rates)} steps)\n"
        f"suggestion  --learning_rate {steepest:.1g}, or up to {lowest / 10:.1g} as the peak of a "
        f"schedule with warm-up\nplot        {folder / 'lr_range.png'}, numbers in lr_range.csv"
    )
    return 0


def measure(settings) -> tuple[list[float], list[float]]:
    """Learning rate and loss of each step, until the loss has risen far above its lowest.

    Raises: ConfigError on bad settings; RunError if the first steps already break.
    """
    from gptcore.log import announce
    from gptcore.machine import matmul_rate
    from gptcore.optim import learning_rate
    from gptcore.trainer import prepare, training_step

    run = prepare(settings)
    announce(run, matmul_rate(run.device, run.update.dtype))
    rates, losses = [], []
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


def suggestions(rates: list[float], smooth: list[float]) -> tuple[float, float]:
    """The rate where the loss falls fastest as the rate grows, and where it is lowest."""
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    last = max(lowest, 2)
    slopes = [smooth[i + 1] - smooth[i - 1] for i in range(1, last)]
    steepest = 1 + min(range(len(slopes)), key=slopes.__getitem__)
    return rates[steepest], rates[lowest]


def plot(rates, losses, smooth, suggested: tuple[float, float], image: Path) -> None:
    """Loss against learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="0.8", lw=1, label="loss")
    axes.plot(rates, smooth, lw=2, label="smoothed")
    for rate, label, style in zip(
        suggested, ("falls fastest", "a tenth of the lowest"), ("-", "--"), strict=True
    ):
        axes.axvline(rate, color="C3", ls=style, label=f"{label}: {rate:.2g}")
    top = max(losses[0], smooth[0]) * 1.3
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss (nats per token)")
    axes.set_ylim(min(losses) - 0.05 * (top - min(losses)), top)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120)


def _free_folder() -> Path:
    """The first runs/lr_range-N that is free."""
    number = 1
    while (folder := Path("runs") / f"lr_range-{number}").exists():
        number += 1
    return folder
