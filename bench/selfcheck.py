"""Does the harness report what is so? Ops slowed on purpose by known factors, and twins.

Question
    Is an op that does its work k times reported k times slower, and do two runs of the same op
    agree to within the spread they report?
Method
    A matrix product and a LayerNorm, each as itself, as its twin and repeated 2 and 5 times, in
    turns, caches warm, on a GPU replayed as ops are. The two runs alternate in blocks, so that a
    clock that drifts meets both.
Rule
    The median ratio of the k-fold op lies within 5% of k, or k lies within the quartiles of the
    ratio; the medians of the two runs, and of the twins, differ by no more than the larger spread.
    Where the quartiles are over 20% apart and the medians over 5%, nothing has been shown, and
    that is said.
"""

from typing import Any

import torch
import torch.nn.functional as F

from bench import render
from bench.timing import Call, Stopwatch, Summary, measure, paired_ratio, replayed, summarise

FACTORS = (2, 5)
TOLERANCE = 0.05
NOISY = 0.2  # of the median
BLOCKS = 8


def repeated(call: Call, times: int) -> Call:
    """A call that does the work of `call` `times` times."""

    def repeat():
        for _ in range(times):
            call()

    return repeat


def ops(device: torch.device) -> dict[str, Call]:
    """Two ops of a fraction of a millisecond, next to which nothing that starts them counts."""
    n, rows, channels = (4096, 1 << 16, 2048) if device.type == "cuda" else (384, 384, 512)
    a, b, c = (torch.randn(n, n, device=device) for _ in range(3))
    x, weight = torch.randn(rows, channels, device=device), torch.ones(channels, device=device)
    return {
        "matrix product": lambda: torch.mm(a, b, out=c),
        "layer norm": lambda: F.layer_norm(x, weight.shape, weight),
    }


def two_runs(
    contestants: dict[str, Call], stopwatch: Stopwatch, seconds: float
) -> tuple[dict[str, list[float]], ...]:
    """The samples of two runs of `seconds` each, in alternating blocks: A B, B A, A B, ..."""
    runs = tuple({name: [] for name in contestants} for _ in range(2))
    for block in range(BLOCKS):
        for run in runs if block % 2 == 0 else runs[::-1]:
            samples = measure(
                contestants,
                stopwatch,
                seconds=seconds / BLOCKS,
                max_rounds=200 // BLOCKS,
                flush=False,
            )
            for name, ms in samples.ms.items():
                run[name] += ms
    return runs


def slowed(ratio: Summary, factor: float) -> str:
    """Whether `ratio` says `factor`: "good", "WRONG" or "noisy"."""
    if abs(ratio.median / factor - 1) <= TOLERANCE:
        return "good"
    if ratio.spread > NOISY * ratio.median:
        return "noisy"
    return "good" if ratio.q25 <= factor <= ratio.q75 else "WRONG"


def agree(a: Summary, b: Summary) -> str:
    """Whether two runs differ by no more than the larger of their spreads."""
    difference, spread = abs(a.median - b.median), max(a.spread, b.spread)
    if difference > spread:
        return "WRONG"
    lower = min(a.median, b.median)
    return "noisy" if spread > NOISY * lower and difference > TOLERANCE * lower else "good"


def selfcheck(stopwatch: Stopwatch, *, seconds: float = 3.0) -> dict[str, Any]:
    """Run it, print it, and return the record, "passed" included."""
    rows = [["", "median ms", "spread", "time / itself", "should be", ""]]
    findings = []

    def note(label, summary, ratio, expected, verdict):
        rows.append(
            [
                label,
                render.quantity(summary.median),
                f"{summary.spread / summary.median:.1%}",
                f"{ratio.median:.3f} [{ratio.q25:.3f}, {ratio.q75:.3f}]",
                f"{expected:g}",
                verdict,
            ]
        )
        findings.append(
            {
                "what": label,
                "median_ms": summary.median,
                "spread_ms": summary.spread,
                "ratio": ratio.median,
                "expected": expected,
                "verdict": verdict,
            }
        )

    for name, op in ops(stopwatch.device).items():
        contestants = {name: op, "twin": op} | {f"{k} times": repeated(op, k) for k in FACTORS}
        if stopwatch.device.type == "cuda":
            contestants = {n: replayed(c, stopwatch.device) for n, c in contestants.items()}
        runs = [
            {key: (ms, summarise(ms)) for key, ms in run.items()}
            for run in two_runs(contestants, stopwatch, seconds)
        ]
        base, first = runs[0][name]
        again, second = runs[1][name]
        for k in FACTORS:
            ms, summary = runs[0][f"{k} times"]
            ratio = paired_ratio(ms, base)
            note(f"{name}, {k} times", summary, ratio, k, slowed(ratio, k))
        ms, twin = runs[0]["twin"]
        note(f"{name}, its twin", twin, paired_ratio(ms, base), 1, agree(first, twin))
        n = min(len(base), len(again))
        note(
            f"{name}, another run",
            second,
            paired_ratio(again[:n], base[:n]),
            1,
            agree(first, second),
        )
    print(render.align(rows))
    verdicts = {finding["verdict"] for finding in findings}
    if verdicts == {"good"}:
        print("the harness reports what is so")
    elif "WRONG" in verdicts:
        print("the harness is wrong, or was disturbed; run it again on a calm machine")
    else:
        print("too noisy to tell; run it again on a calm machine")
    return {"passed": verdicts == {"good"}, "findings": findings}
