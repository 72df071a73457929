"""Pictures of a sweep: parallel coordinates, learning curves."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from gptcore.log import read_metrics

COLORS = colormaps["viridis"]  # dark is good
LABELLED = 8  # curves named in the legend


def plot_parallel(results: list[dict[str, Any]], image: Path) -> None:
    """One vertical axis a setting and one for the loss, one line a trial, the best drawn thick."""
    good = [r for r in results if not r["error"]]
    if not good:
        return
    names = list(good[0]["settings"])
    axes_values = {name: [r["settings"][name] for r in good] for name in names}
    axes_values["validation loss"] = [r["best_val_loss"] for r in good]
    colors = _colors(good)
    figure = Figure(figsize=(1.8 * len(axes_values) + 1.5, 4.5), layout="constrained")
    axes = figure.subplots()
    heights = {}
    for x, (name, values) in enumerate(axes_values.items()):
        heights[name], ticks = _axis(values)
        axes.axvline(x, color="0.6", lw=1, zorder=1)
        for height, label in ticks:
            axes.plot([x - 0.02, x + 0.02], [height, height], color="0.4", lw=1, zorder=1)
            behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            axes.text(
                *(x - 0.04, height, label),
                ha="right",
                va="center",
                fontsize=8,
                bbox=behind,
                zorder=4,
            )
    placed = [_apart(heights[name]) for name in names] + [heights["validation loss"]]
    bend = (1 - np.cos(np.pi * np.linspace(0, 1, 30))) / 2
    for row, r in reversed(list(enumerate(good))):
        points = [column[row] for column in placed]
        pieces = list(zip(points[:-1], points[1:], strict=True))
        y = np.concatenate([a + (b - a) * bend for a, b in pieces])
        x = np.concatenate([i + np.linspace(0, 1, len(bend)) for i in range(len(pieces))])
        best = row == 0
        axes.plot(x, y, color=colors(r), lw=3 if best else 1.2, alpha=1 if best else 0.7, zorder=3)
    axes.set(xlim=(-0.45, len(axes_values) - 0.9), ylim=(-0.05, 1.05), yticks=[])
    axes.set_xticks(range(len(axes_values)), axes_values)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(image, dpi=120)


def plot_curves(folder: Path, results: list[dict[str, Any]], image: Path) -> None:
    """Validation loss against steps, one curve a trial, the best drawn thick."""
    good = [r for r in results if not r["error"]]
    if not good:
        return
    colors = _colors(good)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for row, r in enumerate(good):
        metrics = read_metrics(folder / "trials" / r["trial"] / "metrics.jsonl")
        records = [m for m in metrics if m["kind"] == "eval"]
        label = ", ".join(f"{name} {_label(value)}" for name, value in r["settings"].items())
        axes.plot(
            [m["step"] for m in records],
            [m["val_loss"] for m in records],
            color=colors(r),
            lw=2.5 if row == 0 else 1,
            marker=".",
            label=label if row < LABELLED else None,
            zorder=len(good) - row,
        )
    axes.set(xlabel="step", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="best first", title_fontsize=8)
    norm = Normalize(*_limits(good))
    figure.colorbar(ScalarMappable(norm, COLORS), ax=axes, label="best validation loss")
    figure.savefig(image, dpi=120)


def _limits(results: list[dict[str, Any]]) -> tuple[float, float]:
    losses = [r["best_val_loss"] for r in results]
    return min(losses), max(losses)


def _colors(results: list[dict[str, Any]]):
    """result -> color by its loss."""
    low, high = _limits(results)
    return lambda r: COLORS((r["best_val_loss"] - low) / (high - low) if high > low else 0.0)


def _axis(values: list[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in [0, 1] of the values, and (height, label) of the ticks."""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    distinct = sorted(set(values)) if numbers else sorted(set(values), key=str)
    if not numbers or len(distinct) <= 2:
        place = {v: i / max(1, len(distinct) - 1) for i, v in enumerate(distinct)}
        return [place[v] for v in values], [(place[v], _label(v)) for v in distinct]
    low, high = distinct[0], distinct[-1]
    scale = math.log if low > 0 and high >= 8 * low else float

    def height(v):
        return (scale(v) - scale(low)) / (scale(high) - scale(low))

    shown = distinct
    if len(distinct) > 6:
        even = np.linspace(scale(low), scale(high), 5)
        shown = [math.exp(v) if scale is math.log else float(v) for v in even]
    return [height(v) for v in values], [(height(v), _label(v)) for v in shown]


def _apart(heights: list[float]) -> list[float]:
    """The same heights, equal ones a little apart in their order: their lines can be followed."""
    apart = list(heights)
    for height in set(heights):
        rows = [row for row, h in enumerate(heights) if h == height]
        width = min(0.06, 0.015 * (len(rows) - 1))
        for row, offset in zip(rows, np.linspace(-width / 2, width / 2, len(rows)), strict=True):
            apart[row] = height + float(offset)
    return apart


def _label(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
