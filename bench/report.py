"""python -m bench report: the JSON files of a folder become RESULTS.md, beside the folder."""

import importlib
from pathlib import Path
from typing import Any

from bench import record as recording
from bench import render
from bench.harness import OURS
from bench.run import plots
from gptcore.config import ConfigError

Record = dict[str, Any]

INTRODUCTION = """# Results

Written by `python -m bench report` from the JSON files in `{folder}/`, which hold the raw samples;
do not edit. Contestants took turns, one sample each a round. Columns: median of all samples;
spread, the interquartile range over the median; rate; percent of the least time that the copy and
matrix-product rates allow, measured on the machine beside them; time over gptcore's, the
median of the ratios within rounds (above 1, gptcore is faster); error against float64, in units
of plain PyTorch's error in the same dtype, or of one rounding where plain PyTorch is exact.
"""


def report(folder: Path) -> int:
    """Write RESULTS.md and the plots; exit code 0."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ConfigError(f"--results must hold JSON files of python -m bench; got {folder}")
    try:
        records = {path.stem: recording.read(path) for path in files}
    except ValueError as error:
        raise ConfigError(str(error)) from error
    parts = [INTRODUCTION.format(folder=folder.name)]
    for stem, record in records.items():
        pictures = plots(record, folder, f"{stem}-")
        parts.append(section(stem, record, pictures, folder))
    target = folder.parent / "RESULTS.md"
    target.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {target}")
    return 0


def section(stem: str, record: Record, pictures: list[Path], folder: Path) -> str:
    """One invocation: where it ran, then question by question."""
    environment, git = record["environment"], record["git"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    dirty = " with uncommitted changes" if git["dirty"] else ""
    lines = [
        f"## {environment['device']}, {record['date'][:10]}",
        "",
        f"`{record['command']}`",
        "",
        f"{versions}; {environment['threads']} threads; revision "
        f"`{str(git['revision'])[:12]}`{dirty}; raw data [{stem}.json]({folder.name}/{stem}.json)",
        "",
    ]
    unused = list(pictures)
    for question, content in record["questions"].items():
        tables = tables_of(question, content)
        if not content["cases"] and not tables:
            continue
        lines += [f"### {question}", "", ceilings_line(content), ""]
        for case in content["cases"]:
            lines += case_lines(case)
        for table in tables:
            lines += [table["title"], "", render.markdown(table["rows"]), ""]
        grown = render.growth_text(content["cases"], OURS)
        if grown:
            lines += ["Growth over the last step of each sweep:", ""]
            lines += [f"- {line}" for line in grown.splitlines()] + [""]
        lines += absent_lines(content)
        mine = [path for path in unused if path.name.startswith(f"{stem}-{question}")]
        unused = [path for path in unused if path not in mine]
        lines += [f"![{path.stem}]({folder.name}/{path.name})\n" for path in mine]
    lines += [f"![{path.stem}]({folder.name}/{path.name})\n" for path in unused]
    if "selfcheck" in record:
        lines += selfcheck_lines(record["selfcheck"])
    return "\n".join(lines)


def tables_of(question: str, content: Record) -> list[Record]:
    """Titles and rows beside those of the cases; none with a header alone."""
    module = importlib.import_module(f"bench.{question}")
    tables = module.tables(content) if hasattr(module, "tables") else content.get("tables", [])
    return [table for table in tables if len(table["rows"]) > 1]


def ceilings_line(content: Record) -> str:
    """What the machine did before and, in records that say so, after."""
    ceilings = content["ceilings"]
    when = "before and after, the faster" if "ceilings_measured" in content else "just before"
    return (
        f"Measured {when}: copy {ceilings['copy_gbps']:.3g} GB/s, matrix product "
        f"{ceilings['matmul_tflops']:.3g} TFLOP/s, one call {ceilings['dispatch_us']:.2g} us."
    )


def case_lines(case: Record) -> list[str]:
    """The table of a case, if anything was timed."""
    rows = render.case_rows(case)
    if len(rows) == 1:
        return []
    return [render.case_title(case), "", render.markdown(rows), ""]


def absent_lines(content: Record) -> list[str]:
    """Who was not timed, or not like the others, and why; what was left out.

    Each reason stands once, with the number of its cases.
    """
    counts: dict[str, int] = {}
    for case in content["cases"]:
        for reason in render.absent(case):
            counts[reason] = counts.get(reason, 0) + 1
    for name, reason in content.get("absent", {}).items():
        counts[f"{name} skipped: {reason}"] = 1
    lines = [f"- {reason} ({n} cases)" if n > 1 else f"- {reason}" for reason, n in counts.items()]
    if content.get("left_out"):
        lines.append(f"- left out for time: {', '.join(content['left_out'])}")
    return ["Not timed, or not like the others:", "", *lines, ""] if lines else []


def selfcheck_lines(selfcheck: Record) -> list[str]:
    """What the harness said about itself."""
    rows = [["slowed on purpose", "median ms", "spread ms", "reported", "true", ""]]
    rows += [
        [
            finding["what"],
            render.quantity(finding["median_ms"]),
            render.quantity(finding["spread_ms"]),
            f"{finding['ratio']:.3f}",
            f"{finding['expected']:g}",
            finding["verdict"],
        ]
        for finding in selfcheck["findings"]
    ]
    return [render.markdown(rows), ""]
