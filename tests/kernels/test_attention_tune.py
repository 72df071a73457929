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
    assert tune.best(TIMES, TIMES.get) == BALANCED
    assert tune.best([FAST_LONG, TOO_BIG], TIMES.get) == FAST_LONG


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_without_a_gpu():
    command = [sys.executable, "-m", "kernels.tune"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "tune: needs a CUDA or ROCm GPU and triton; found none\n"
