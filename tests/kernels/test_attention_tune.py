"""`python -m kernels.tune`: choosing and printing plans, with invented times."""

import contextlib
import dataclasses
import itertools
import math
import subprocess
import sys
import types

import pytest
import torch

from kernels import attention_kernels, tune
from kernels.attention_kernels import Plan

SLOW, FAST, SLOWER, TOO_BIG = (Plan(m, 64, 4, 2) for m in (16, 32, 64, 128))
TIMES = {SLOW: 3.0, FAST: 1.0, SLOWER: 4.0, TOO_BIG: None}


def test_best_is_the_fastest():
    assert tune.best(TIMES, TIMES.get) == (FAST, 4)
    assert tune.best([SLOWER, TOO_BIG], TIMES.get) == (SLOWER, 2)


def test_best_stops_when_its_time_is_up_and_one_plan_ran():
    assert tune.best([TOO_BIG, SLOW, FAST, SLOWER], TIMES.get, seconds=0) == (SLOW, 2)


def test_best_needs_one_plan_that_runs():
    with pytest.raises(RuntimeError, match="at least one plan must run"):
        tune.best([TOO_BIG], TIMES.get)


@pytest.mark.parametrize(
    ("ratios", "kept", "median"),
    [
        ([0.9] * 5, FAST, 0.9),
        ([0.99] * 5, SLOW, 0.99),
        ([0.5, 0.5, 1.2, 1.1, 1.1], SLOW, 1.1),
        ([1.3, 0.5, 0.9, 1.4, 0.9], FAST, 0.9),
        (None, SLOW, math.inf),
    ],
)
def test_a_plan_must_beat_the_shipped_one_in_turns(ratios, kept, median):
    """One lucky measurement among a hundred is not enough; who is first takes turns, too."""
    asked = []

    def time_of(plan):
        asked.append(plan)
        if plan == SLOW:
            return 2.0
        return None if ratios is None else 2.0 * ratios[(len(asked) - 1) // 2]

    assert tune.rematch(FAST, SLOW, time_of) == (kept, median)
    assert asked == ([SLOW, FAST, FAST, SLOW] * 2 + [SLOW, FAST] if ratios else [SLOW, FAST])


def test_what_the_shipped_plan_cannot_do_any_other_may():
    assert tune.rematch(FAST, TOO_BIG, TIMES.get) == (FAST, 0.0)


def entries(text):
    """What `tune.rows` printed, as the table has it."""
    return eval("{" + text + "}", {"_plans": attention_kernels._plans})


def test_rows_are_entries_of_the_table(monkeypatch):
    """Put there they count, for what they were measured at and no other."""
    winners = {
        (D, most_keys): {
            kernel: Plan(D, 32, i + 1, 2, 168, most_keys is None)
            for i, kernel in enumerate(tune.KERNELS)
        }
        for D, most_keys in itertools.product((64, 128), tune.SIZES)
    }
    table = entries(tune.rows(winners, dropout=True))
    assert table == {(*key, True): plans for key, plans in winners.items()}
    before = attention_kernels._PLANS["sm_80"]
    monkeypatch.setitem(attention_kernels._PLANS, "sm_89", table)
    for D, T, dropout in itertools.product((1, 64, 128, 256), (1, 512, 513), (True, False)):
        for kernel in tune.KERNELS:
            plan = attention_kernels.plan(kernel, "sm_89", D, T, torch.bfloat16, dropout)
            row = max(64, D), (512 if T <= 512 else None)
            known = winners.get(row) if dropout else None
            assert plan == (known or before[row[0], None, None])[kernel]


def test_the_least_row_that_fits_counts():
    """On sm_90 few keys with dropout have one of their own; a head size of 40 has no cap."""

    def plan(kernel, D, T, dropout):
        return attention_kernels.plan(kernel, "sm_90", D, T, torch.bfloat16, dropout)

    short = Plan(64, 64, 4, 2, registers=128, one_loop=True)
    assert plan("forward", 64, 512, True) == plan("forward", 32, 1, True) == short
    assert plan("forward", 40, 512, True) == dataclasses.replace(short, registers=None)
    assert plan("forward", 64, 513, True) == plan("forward", 64, 512, False)
    assert (
        plan("dkdv", 64, 256, False).num_stages == 2 and plan("dkdv", 64, 513, True).num_stages == 1
    )


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_candidates_hold_the_checked_in_plans(kernel):
    for architecture, rows in attention_kernels._PLANS.items():
        shipped = {plans[kernel] for plans in rows.values()}
        assert shipped <= set(tune.candidates(kernel, architecture))


def test_candidates_come_by_their_distance_from_the_shipped_plan():
    candidates = tune.candidates("forward", "sm_90")
    plans = tune.nearest_first(candidates, Plan(64, 64, 8, 1))
    assert plans[0] == Plan(64, 64, 8, 1) and sorted(map(str, plans)) == sorted(
        map(str, candidates)
    )
    one_away = {Plan(32, 64, 8, 1), Plan(64, 32, 8, 1), Plan(64, 64, 4, 1), Plan(64, 64, 8, 2)}
    one_away |= {Plan(64, 128, 8, 1), Plan(128, 64, 8, 1), Plan(64, 64, 8, 1, one_loop=True)}
    assert set(plans[1:8]) == one_away
    assert plans[-1] == Plan(128, 16, 4, 3, 128, one_loop=True)
    assert {plan.registers for plan in tune.candidates("dq", "gfx942")} == {None}
    assert not any(plan.one_loop for plan in tune.candidates("dkdv", "sm_90"))


@pytest.mark.parametrize(
    ("error", "same"), [(0.0, True), (1e-3, True), (0.1, False), (math.nan, False)]
)
def test_a_plan_that_computes_something_else_is_seen(error, same):
    expected = torch.randn(40), torch.randn(3, 5)
    assert tune.agree((expected[0], expected[1] + error), expected) == same


@pytest.fixture
def gpu(monkeypatch):
    """An sm_90 that takes a second a plan, and less time the more keys a plan has."""
    now, measured = [0.0], []

    def measure(kernel, size, D, plan, dtype, dropout_p):
        now[0] += 1.0
        measured.append((D, size[2], kernel))
        return 1 / plan.block_n

    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.backend, "HAS_TRITON", True)
    monkeypatch.setattr(tune.backend, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tune, "_measure", measure)
    monkeypatch.setattr(tune, "rematch", lambda winner, shipped, time_of: (winner, 0.5))
    return measured


def test_within_its_seconds_each_kernel_has_an_equal_share(gpu, capsys):
    assert tune.main(["--head_size", "64", "128", "--seconds", "84"]) == 0
    shares = itertools.product((64, 128), (256, 4096), tune.KERNELS)
    assert gpu == [share for share in shares for _ in range(7)]
    out, err = capsys.readouterr()
    assert err.count(", 7 of ") == 12 and err.count(": 0.0") == 84
    assert out.startswith("sm_90:\n")
    tuned = entries(out.removeprefix("sm_90:"))
    assert tuned.keys() == {(64, 512, True), (64, None, True), (128, 512, True), (128, None, True)}
    shipped = attention_kernels._PLANS["sm_90"][64, 512, True]["forward"]
    assert tuned[64, 512, True]["forward"] == max(
        tune.nearest_first(tune.candidates("forward", "sm_90"), shipped)[:7],
        key=lambda plan: plan.block_n,
    )


def test_the_row_is_of_the_plan_that_won_the_rematch(gpu, monkeypatch, capsys):
    matches = []

    def rematch(winner, shipped, time_of):
        matches.append((winner, shipped))
        return shipped, 1.5

    monkeypatch.setattr(tune, "rematch", rematch)
    assert tune.main(["--head_size", "64"]) == 0
    out, err = capsys.readouterr()
    tuned = entries(out.removeprefix("sm_90:"))
    assert tuned[64, 512, True] == attention_kernels._PLANS["sm_90"][64, 512, True]
    assert matches and all(winner != ours for winner, ours in matches)
    assert err.count(" / shipped: 1.500") == len(matches)


def test_without_a_limit_every_candidate_is_tried(gpu, capsys):
    assert tune.main(["--dropout", "0"]) == 0
    count = sum(len(tune.candidates(kernel, "sm_90")) for kernel in tune.KERNELS)
    assert len(gpu) == 6 * count and set(entries(capsys.readouterr().out[6:])) == {
        (D, most_keys, False) for D in tune.HEAD_SIZES for most_keys in tune.SIZES
    }


@pytest.mark.parametrize(
    "flags",
    [
        *(["--seconds", "0"], ["--seconds", "nan"], ["--head_size", "85"]),
        *(["--dropout", "1"], ["--dropout", "-0.1"], ["--dropout", "nan"]),
    ],
)
def test_bad_input_is_one_line_and_2(flags, gpu, capsys):
    with pytest.raises(SystemExit, match="2"):
        tune.main(flags)
    assert flags[0] in (err := capsys.readouterr().err) and err.count("\n") == 1 and not gpu


def test_what_was_measured_is_printed_before_the_rest(gpu, monkeypatch, capsys):
    """Whoever ends it early keeps the rows of what is done."""
    measure = tune._measure

    def interrupted(kernel, size, *more):
        if size[2] == 4096:
            raise KeyboardInterrupt
        return measure(kernel, size, *more)

    monkeypatch.setattr(tune, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--head_size", "64", "--seconds", "42"])
    assert entries(capsys.readouterr().out.removeprefix("sm_90:")).keys() == {(64, 512, True)}


@pytest.mark.parametrize(
    ("error", "result", "time"),
    [
        (RuntimeError("spilled"), 1.0, None),
        (torch.AcceleratorError("lost"), 1.0, "raised"),
        (None, 1.0, 2.0),
        (None, 1.5, None),
    ],
)
def test_a_candidate_that_cannot_run_or_errs_is_passed_by(error, result, time, monkeypatch):
    """But not an error of the device, after which nothing runs."""
    pytest.importorskip("triton", reason="needs triton")
    names = {"empty": lambda *_, **__: None, "int8": None}
    fake = types.SimpleNamespace(**names, AcceleratorError=torch.AcceleratorError)

    def time_ms(run, flush):
        if error is not None:
            raise error
        return 2.0

    def run(plan):
        return (torch.full((3,), 1.0 if plan is None else result),)

    monkeypatch.setattr(tune, "torch", fake)
    monkeypatch.setattr(tune, "_launcher", lambda *_: run)
    monkeypatch.setattr(tune, "_time_ms", time_ms)
    with pytest.raises(torch.AcceleratorError) if time == "raised" else contextlib.nullcontext():
        assert tune._measure("dq", (1, 1, 1), 64, SLOW, None, 0.0) == time


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_without_a_gpu():
    command = [sys.executable, "-m", "kernels.tune"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "tune: needs a CUDA or ROCm GPU and triton; found none\n"
