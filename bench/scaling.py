"""How does a training step grow with batch, context, width, depth, and with threads?

Question
    Does the time of a step follow its FLOPs as each axis grows, and what do more threads buy?
Method
    One axis at a time around the preset nanogpt-cpu (CPU) or notebook (GPU), interleaved with
    the seeds' model and the textbook batched one. Threads: the same step with 1, 2, 4, ...
    threads up to all that torch uses, in turns.
Formula
    As for `step`: tokens/s; the least time is FLOPs over the measured matrix-product rate.
"""

from typing import Any

import torch

from bench import render, step
from bench.harness import Case, Options, run_cases
from bench.ops import sweep_points
from bench.timing import ROW, measure, paired_ratio, summarise

AXES = {"B": "batch_size", "T": "block_size", "C": "n_embd", "L": "n_layer"}


def cases(options: Options) -> list[Case]:
    """Sweeps over B, T, C and L."""
    if options.device.type == "cuda":
        preset, centre = "notebook", {"B": 64, "T": 256, "C": 384, "L": 6}
        axes = {
            "C": (192, 384, 768, 1536),
            "T": (64, 256, 1024),
            "B": (16, 64, 256),
            "L": (3, 6, 12),
        }
    else:
        preset, centre = "nanogpt-cpu", {"B": 12, "T": 64, "C": 128, "L": 4}
        axes = {"C": (64, 128, 256), "T": (32, 64, 256), "B": (3, 12, 48), "L": (2, 4, 8)}
    found = []
    for names, point in sweep_points(axes, **centre):
        given = {AXES[axis]: value for axis, value in point.items()}
        label = " ".join(f"{axis}{value}" for axis, value in point.items())
        size = step.Size(label, preset, given)
        quick = "C" in names and point["C"] <= centre["C"]
        rest = {"sweeps": names, "quick": quick, "shape": {"kind": "step"}}
        found.append(step.step_case(size, options, only=("naive", "eager"), **rest))
    return found


def answer(options: Options, stopwatch, ceilings, show) -> dict[str, Any]:
    """The sweeps, then threads."""
    content = run_cases(cases(options), options, stopwatch, ceilings, show)
    if options.device.type == "cpu" and torch.get_num_threads() > 1:
        content["tables"] = [threads(options, stopwatch)]
    return content


def threads(options: Options, stopwatch) -> dict[str, Any]:
    """One step of gptcore with growing numbers of threads, in turns."""
    most = torch.get_num_threads()
    counts = sorted({min(2**i, most) for i in range(most.bit_length() + 1)})
    sizes = [step.Size("nanogpt-cpu", "nanogpt-cpu", {})]
    if not options.quick:
        sizes.append(step.Size("notebook B8", "notebook", {"batch_size": 8}))
    rows = [["threads", *(f"{size.name}: ms" for size in sizes), *("speed-up" for _ in sizes)]]
    columns, speedups = [], []
    for size in sizes:
        ours = next(iter(step.step_case(size, options).open())).start()

        def with_threads(count, ours=ours):
            def call():
                torch.set_num_threads(count)
                ours()

            return call

        calls = {str(count): with_threads(count) for count in counts}
        for warm_up in calls.values():
            warm_up()
        samples = measure(calls, stopwatch, seconds=options.seconds / 10, flush=False, row=ROW)
        torch.set_num_threads(most)
        columns.append([render.quantity(summarise(ms).median) for ms in samples.ms.values()])
        one = samples.ms[str(counts[0])]
        speedups.append([f"{paired_ratio(one, ms).median:.2f}" for ms in samples.ms.values()])
    rows += [list(row) for row in zip(map(str, counts), *columns, *speedups, strict=True)]
    print(f"\nthreads\n{render.align(rows)}")
    return {"title": "threads", "rows": rows}
