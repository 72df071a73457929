"""`python -m kernels.tune`: choosing and printing plans, with invented times."""

import subprocess
import sys

import pytest
import torch

from kernels import attention_kernels, tune
from kernels.attention_kernels import Plan

FAST_SHORT, FAST_LONG, BALANCED, TOO_BIG = (Plan(m, 64, 4, 2) for m in (16, 32, 64, 128))
TIMES = {FAST_SHORT: [1.0, 30.0], FAST_LONG: [3.0, 10.0], BALANCED: [1.1, 11.0], TOO_BIG: None}


def test_best_weighs_sizes_alike():
    assert tune.best(TIMES, TIMES.get) == (BALANCED, 4)
    assert tune.best([FAST_LONG, TOO_BIG], TIMES.get) == (FAST_LONG, 2)


def test_best_stops_when_its_time_is_up_and_one_plan_ran():
    plans = [TOO_BIG, FAST_SHORT, FAST_LONG, BALANCED]
    assert tune.best(plans, TIMES.get, seconds=0) == (FAST_SHORT, 2)


def test_best_needs_one_plan_that_runs():
    with pytest.raises(RuntimeError, match="at least one plan must run"):
        tune.best([TOO_BIG], TIMES.get)


def test_rows_are_an_entry_of_the_table():
    winners = {
        (kernel, D): Plan(D, 32, i + 1, 2)
        for i, kernel in enumerate(tune.KERNELS)
        for D in tune.HEAD_SIZES
    }
    text = tune.rows("sm_90", winners)
    entry = eval("{" + text + "}", {"Plan": Plan})["sm_90"]
    for (kernel, D), plan in winners.items():
        assert entry[(D > 64) + (D > 128)][kernel] == plan


def test_candidates_hold_the_checked_in_plans():
    shipped = {
        p for rows in attention_kernels._PLANS.values() for row in rows for p in row.values()
    }
    assert shipped <= set(tune.candidates())


def test_candidates_come_by_their_distance_from_the_shipped_plan():
    plans = tune.nearest_first(Plan(64, 64, 8, 1))
    assert plans[0] == Plan(64, 64, 8, 1) and sorted(map(str, plans)) == sorted(
        map(str, tune.candidates())
    )
    one_away = [Plan(32, 64, 8, 1), Plan(64, 32, 8, 1), Plan(64, 64, 4, 1), Plan(64, 64, 8, 2)]
    one_away += [Plan(64, 128, 8, 1), Plan(128, 64, 8, 1)]
    assert plans[1:7] == one_away and plans[7] == Plan(64, 64, 8, 3)
    assert plans[-1] == Plan(128, 16, 4, 3)


@pytest.fixture
def gpu(monkeypatch):
    """An sm_90 that takes a second a plan, and less time the more keys a plan has."""
    now, measured = [0.0], []

    def measure(kernel, D, plan, dtype, dropout_p):
        now[0] += 1.0
        measured.append((kernel, D))
        return [1 / plan.block_n, 1.0]

    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.backend, "HAS_TRITON", True)
    monkeypatch.setattr(tune.backend, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tune, "_measure", measure)
    return measured


def test_within_its_seconds_each_kernel_has_an_equal_share(gpu, capsys):
    assert tune.main(["--head_size", "64", "128", "--seconds", "42"]) == 0
    assert gpu == [(kernel, D) for kernel in tune.KERNELS for D in (64, 128) for _ in range(7)]
    out, err = capsys.readouterr()
    assert err.count(", 7 of 66 candidates tried\n") == 6 and err.count(": 0.0") == 42
    tuned = eval("{" + out + "}", {"Plan": Plan})["sm_90"]
    shipped = attention_kernels._PLANS["sm_90"]
    assert tuned[2] == shipped[2]
    assert tuned[0]["forward"] == max(
        tune.nearest_first(shipped[0]["forward"])[:7], key=lambda plan: plan.block_n
    )


def test_without_a_limit_every_candidate_is_tried(gpu, capsys):
    assert tune.main([]) == 0
    assert len(gpu) == 9 * 66 and capsys.readouterr().err.count("66 of 66 candidates tried") == 9


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_without_a_gpu():
    command = [sys.executable, "-m", "kernels.tune"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "tune: needs a CUDA or ROCm GPU and triton; found none\n"
