"""Records as tables for a terminal, tables for Markdown, and plots.

Everything here reads the dictionaries that are written as JSON, so that a report made later from
the files says what the terminal said.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
OURS_STYLE = {"color": "#c02020", "marker": "o", "linewidth": 2.2, "zorder": 3}
PEER_COLOURS = (  # tab10 and tab20b without reds, so that ours stands out
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2"),
    *("#7f7f7f", "#bcbd22", "#17becf", "#393b79", "#637939", "#8c6d31"),
)
PEER_MARKERS = tuple("svD^<>PX*hdp")


def quantity(value: float) -> str:
    """Three significant digits, no exponent where none is needed."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" + "|---:" * (len(rows[0]) - 1) + "|")
    return "\n".join(lines)


def case_rows(case: Record) -> list[list[str]]:
    """Header and one row for every contestant that was timed."""
    rows = [["", "median ms", "spread", case["unit"], "% of limit", "time / ours", "error"]]
    for result in case["results"]:
        if result["status"] != "timed":
            continue
        ratio = result.get("ratio")
        rows.append(
            [
                result["name"] + (f", {result['dtype']}" if "dtype" in result else ""),
                quantity(result["median_ms"]),
                f"{(result['q75_ms'] - result['q25_ms']) / result['median_ms']:.1%}",
                quantity(result["rate"]),
                f"{result['percent_of_limit']:.0f}",
                f"{ratio:.2f}" if ratio is not None else "",
                result["check"]["text"],
            ]
        )
    return rows


def case_title(case: Record) -> str:
    """What a table is about, and the least time the machine's rates allow."""
    work = case["work"]
    title = (
        f"{case['case']} {case['dtype']}: {work['flops'] / 1e9:.3g} GFLOP, "
        f"{work['bytes'] / 1e6:.3g} MB, at least {quantity(case['limit_ms'])} ms ({case['bound']})"
    )
    if not case.get("cold", True) and case.get("calls_per_sample", 1) > 1:
        title += f"; {case['calls_per_sample']} calls a sample, caches warm"
    return title


def absent(case: Record) -> list[str]:
    """Who was not timed, or not like the others, and why."""
    return [
        f"{result['name']} {result['status']}: {result['reason']}"
        if result["status"] != "timed"
        else f"{result['name']} timed with all that issues it: {result['not_replayed']}"
        for result in case["results"]
        if result["status"] != "timed" or "not_replayed" in result
    ]


def case_text(case: Record, seen: set[str] | None = None) -> str:
    """A case for the terminal; reasons already in `seen` are not said again."""
    seen = set() if seen is None else seen
    lines = ["", case_title(case)]
    rows = case_rows(case)
    if len(rows) > 1:
        lines.append(align(rows))
    for reason in absent(case):
        if reason not in seen:
            seen.add(reason)
            lines.append(f"  {reason}")
    return "\n".join(lines)


def timed(case: Record, name: str) -> Record | None:
    """The result of a contestant, if it was timed."""
    return next((r for r in case["results"] if r["name"] == name and r["status"] == "timed"), None)


def sweeps(cases: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """(axis, what is held fixed) -> the cases of that sweep, in the order of the axis."""
    found: dict[tuple[str, str], list[Record]] = {}
    for case in cases:
        for axis in case["sweeps"]:
            shape = case["shape"]
            dropout = f" p={shape['p']:g}" if shape.get("p") else ""
            fixed = f"{shape.get('kind', '')}{dropout} {case['phase']}".strip()
            found.setdefault((axis, fixed), []).append(case)
    return {
        key: sorted(group, key=lambda case: case["shape"][key[0]])
        for key, group in found.items()
        if len(group) > 1
    }


def growth(axis: str, group: list[Record], name: str) -> str | None:
    """By what factors time and least time grow over the last step of a sweep."""
    points = [(c, r) for c in group if (r := timed(c, name)) is not None]
    if len(points) < 2:
        return None
    (first, a), (last, b) = points[-2:]
    factor = last["shape"][axis] / first["shape"][axis]
    time = b["median_ms"] / a["median_ms"]
    work = last["limit_ms"] / first["limit_ms"]
    return (
        f"{axis} {first['shape'][axis]} -> {last['shape'][axis]} (x{factor:.3g}): "
        f"time x{time:.2f}, least time x{work:.2f}"
    )


def growth_text(cases: Iterable[Record], ours: str) -> str:
    """One line a sweep: does the cost grow as it should?"""
    lines = []
    for (axis, fixed), group in sweeps(cases).items():
        line = growth(axis, group, ours)
        if line:
            lines.append(f"{fixed}: {line}")
    return "\n".join(lines)


# ---- plots -----------------------------------------------------------------------------------


def figure(title: str, xlabel: str, ylabel: str):
    """A figure and its axes."""
    from matplotlib.figure import Figure  # slow to import; needs no display

    drawing = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = drawing.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_prop_cycle(color=PEER_COLOURS, marker=PEER_MARKERS)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    return drawing, axes


def save(drawing, path: Path) -> Path:
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=110)
    return path


def log_axis(axes, xs: list[float]) -> None:
    """Both axes logarithmic, the points of x named, y at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.minorticks_off()


def plot_sweeps(question: str, cases: list[Record], ours: str, folder: Path, stem="") -> list[Path]:
    """Time against each axis, one line a contestant with its quartiles, and the least time."""
    paths = []
    for (axis, fixed), group in sweeps(cases).items():
        held = {k: v for k, v in group[0]["shape"].items() if k not in (axis, "kind", "p")}
        if axis in ("C", "D"):
            held = {k: v for k, v in held.items() if k not in ("C", "D")}
        what = " ".join(dict.fromkeys(fixed.split()))
        title = f"{question}: {what}, {group[0]['dtype']}, " + " ".join(
            f"{k}={v}" for k, v in held.items()
        )
        drawing, axes = figure(title, axis, "ms (median, quartiles)")
        names = dict.fromkeys(r["name"] for case in group for r in case["results"])
        for name in names:
            points = [(c["shape"][axis], r) for c in group if (r := timed(c, name)) is not None]
            if not points:
                continue
            xs = [x for x, _ in points]
            style = OURS_STYLE if name == ours else {}
            (line,) = axes.plot(xs, [r["median_ms"] for _, r in points], label=name, **style)
            axes.fill_between(
                xs,
                [r["q25_ms"] for _, r in points],
                [r["q75_ms"] for _, r in points],
                color=line.get_color(),
                alpha=0.2,
            )
        xs = [case["shape"][axis] for case in group]
        axes.plot(
            xs,
            [c["limit_ms"] for c in group],
            "k--",
            marker="",
            label="least time (measured rates)",
        )
        log_axis(axes, xs)
        axes.legend(fontsize=8)
        name = "-".join([stem + question, *fixed.replace("+", "-").replace("=", "").split(), axis])
        paths.append(save(drawing, folder / f"{name}.png"))
    return paths


def plot_roofline(record: Record, ours: str, folder: Path, stem="") -> list[Path]:
    """FLOP/s of every case of ours against its FLOPs a byte, under the measured ceilings."""
    points: dict[str, list[tuple[float, float]]] = {}
    roofs = []
    for question, content in record["questions"].items():
        for case in content.get("cases", ()):
            result, work = timed(case, ours), case["work"]
            if result is None or not work["bytes"] or not work["flops"]:
                continue
            rate = work["flops"] / result["median_ms"] / 1e6  # GFLOP/s
            points.setdefault(question, []).append((work["flops"] / work["bytes"], rate))
            roofs.append(content["ceilings"])
    if not points:
        return []
    copy = max(roof["copy_gbps"] for roof in roofs)
    peak = 1e3 * max(roof["matmul_tflops"] for roof in roofs)
    drawing, axes = figure(f"roofline: {record['environment']['device']}", "FLOP / byte", "GFLOP/s")
    intensities = [x for group in points.values() for x, _ in group]
    low, high = min(*intensities, peak / copy) / 2, max(*intensities, peak / copy) * 2
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    axes.plot(
        xs,
        [min(peak, copy * x) for x in xs],
        "k-",
        marker="",
        label="measured copy and matmul rates",
    )
    for question, group in points.items():
        axes.plot(*zip(*group, strict=True), linestyle="", alpha=0.7, label=question)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return [save(drawing, folder / f"{stem}roofline.png")]
