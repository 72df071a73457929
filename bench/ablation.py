"""What does each change of a recipe give?

Question
    By how much does the loss at the end of a recipe change when one of its choices is taken back?
Method
    `python train.py --preset P --max_iters 290` with one choice replaced, the same seeds; a run of
    the whole recipe and one of each variant in turns, seed after seed. Another batch size sees as
    many tokens in more or fewer steps. It is asked by name only: variants times seeds trainings.
Formula
    difference: mean over seeds of (exact validation loss of the variant - that of the recipe with
    the same seed); spread: standard deviation of these differences, and of the recipe's own
    losses. Nothing is timed: several trainings may share the machine.
"""

import statistics
from typing import Any

from bench import render
from bench.harness import Options, Skip
from bench.time_to_loss import Run, gptcore_run, preset_of
from gptcore.config import GPTConfig, RunError
from gptcore.flags import parse_settings

WHOLE = "whole recipe"
STEPS = 290
VARIANTS: dict[str, tuple[str, ...]] = {  # what replaces a choice -> flags
    WHOLE: (),
    "learned positions": ("--position=learned", "--qk_norm=false"),
    "query-key norm": ("--qk_norm=true",),
    "no query-key norm": ("--qk_norm=false",),
    "no token shift": ("--token_shift=false",),
    "ReLU^2": ("--activation=relu2",),
    "ReLU": ("--activation=relu",),
    "tied head": ("--tied_head=true",),
    "untied head": ("--tied_head=false",),
    "no biases": ("--bias=false", "--qkv_bias=false", "--head_bias=false"),
    "no bias of queries, keys, values": ("--qkv_bias=false",),
    "biases": ("--bias=true", "--qkv_bias=true", "--head_bias=true"),
    "AdamW, rate 0.006, warm-up 80": (
        *("--optimizer=adamw", "--learning_rate=6e-3", "--warmup_iters=80"),
    ),
    "AdamW at nanoGPT's rates": (
        *("--optimizer=adamw", "--learning_rate=1e-3", "--warmup_iters=80"),
        *("--schedule=cosine", "--min_lr=1e-4"),
    ),
    "momentum 0.95": ("--beta1=0.95",),
    "projections begun as in GPT-2": ("--init=gpt2",),
    "initial weights of 0.02": ("--init_std=0.02",),
    "initial weights of 0.12": ("--init_std=0.12",),
    "no warm-up": ("--warmup_iters=0",),
    "dropout 0.1": ("--dropout=0.1",),
    "no weight decay": ("--weight_decay=0",),
    "no clipping": ("--grad_clip=0",),
}


BATCHES = {"half the batch, twice the steps": 0.5, "twice the batch, half the steps": 2}
RATES = {"half the learning rate": 0.5, "twice the learning rate": 2}


def variants(preset: str) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Steps and flags of every variant's runs, which are evaluated at their end.

    What the preset has already is left out.
    """

    def settings(*given):
        config, fields = parse_settings([f"--preset={preset}", *given]).merged()
        return config, GPTConfig(**fields)

    config, _ = whole = settings()
    rate, flags = config.learning_rate, dict(VARIANTS)
    flags["cosine to a tenth"] = "--schedule=cosine", f"--min_lr={rate / 10:g}"
    flags |= {name: (f"--learning_rate={rate * factor:g}",) for name, factor in RATES.items()}
    flags = {
        name: given for name, given in flags.items() if name == WHOLE or settings(*given) != whole
    }
    steps = dict.fromkeys(flags, STEPS)
    for name, factor in BATCHES.items():
        steps[name] = int(STEPS / factor)
        batch_size, warmup_iters = config.batch_size * factor, config.warmup_iters / factor
        flags[name] = f"--batch_size={batch_size:.0f}", f"--warmup_iters={warmup_iters:.0f}"
    return {
        name: (count, (f"--max_iters={count}", f"--eval_interval={count}", *flags[name]))
        for name, count in steps.items()
    }


def answer(options: Options, stopwatch, ceilings, show) -> dict[str, Any]:
    """Every variant with every seed, and their table."""
    runs: list[Run] = []
    absent, broken = {}, []
    for seed in range(options.seeds):
        for variant, (steps, flags) in variants(preset_of(options)).items():
            name = f"{variant}, seed {seed}"
            try:
                run = gptcore_run(options, seed, target=0.0, flags=flags)
                if run["steps"] < steps:
                    raise Skip(f"out of time after its evaluation at step {run['steps']}")
            except (Skip, RunError) as reason:
                absent[name] = str(reason)
                broken += [name] if isinstance(reason, RunError) else []
                print(f"{name} left out: {reason}")
                continue
            runs.append({**run, "variant": variant})
            print(f"{name}: {run['val_loss']:.4f}, {run['seconds']:.1f} s")
    title = f"preset {preset_of(options)} and one choice replaced, {STEPS} steps, "
    title += f"{options.seeds} seeds"
    rows = table(runs)
    print(f"\n{title}\n{render.align(rows)}")
    return {
        "cases": [],
        "preset": preset_of(options),
        "variants": runs,
        "absent": absent,
        "broken": broken,
        "tables": [{"title": title, "rows": rows}],
    }


def table(runs: list[Run]) -> list[list[str]]:
    """One row a variant: its loss, and what taking the choice back costs.

    Only seeds count with which the whole recipe, too, came to its end.
    """
    whole = {run["seed"]: run["val_loss"] for run in runs if run["variant"] == WHOLE}
    rows = [["", "runs", "val loss", "difference", "spread"]]
    for variant in dict.fromkeys(run["variant"] for run in runs):
        group = [run for run in runs if run["variant"] == variant and run["seed"] in whole]
        if not group:
            continue
        differences = [run["val_loss"] - whole[run["seed"]] for run in group]
        spread = f"{statistics.stdev(differences):.4f}" if len(group) > 1 else "-"
        mean = statistics.mean(run["val_loss"] for run in group)
        first = variant == WHOLE
        if first:
            losses = [run["val_loss"] for run in group]
            spread = f"{statistics.stdev(losses):.4f}" if len(group) > 1 else "-"
        difference = "" if first else f"{statistics.mean(differences):+.4f}"
        rows.append([variant, str(len(group)), f"{mean:.4f}", difference, spread])
    return rows
