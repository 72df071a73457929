"""Schedules: equal to torch's own schedulers where torch has them, exact points elsewhere."""

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from gptcore.config import ConfigError, TrainConfig
from gptcore.flags import parse_settings
from gptcore.optim import apply_schedule, learning_rate, make_optimizer, momentum
from gptcore.trainer import train

MODEL = torch.nn.Linear(2, 2)


def of_torch(config: TrainConfig, scheduler, steps: int, **options):
    """(learning rate, momentum) of each update under torch's scheduler."""
    optimizer = make_optimizer(MODEL, config)
    schedule = scheduler(optimizer, **options)
    pairs = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        pairs.append((group["lr"], group["betas"][0] if "betas" in group else group["momentum"]))
        optimizer.step()
        schedule.step()
    return pairs


def ours(config: TrainConfig, steps: int):
    """(learning rate, momentum) of each update as `apply_schedule` sets them."""
    optimizer = make_optimizer(MODEL, config)
    pairs = []
    for step in range(steps):
        apply_schedule(optimizer, step, config)
        group = optimizer.param_groups[0]
        pairs.append((group["lr"], group["betas"][0] if "betas" in group else group["momentum"]))
    return pairs


def assert_same(actual, expected):
    torch.testing.assert_close(
        torch.tensor(actual, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-12,
        atol=1e-17,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [(7, None), (5, 9), (1, 1)], ids=["7-7", "5-9", "1-1"])
@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
@pytest.mark.parametrize("cycle_momentum", [True, False])
def test_cyclic_is_torchs(mode, steps, optimizer, cycle_momentum):
    config = TrainConfig(
        optimizer=optimizer,
        schedule="cyclic",
        min_lr=1e-3,
        learning_rate=0.1,
        cycle_mode=mode,
        step_size_up=steps[0],
        step_size_down=steps[1],
        cycle_gamma=0.97,
        cycle_momentum=cycle_momentum,
        warmup_iters=3,  # of no effect
    )
    expected = of_torch(
        config,
        CyclicLR,
        100,
        base_lr=1e-3,
        max_lr=0.1,
        mode=mode,
        step_size_up=steps[0],
        step_size_down=steps[1],
        gamma=0.97,
        cycle_momentum=cycle_momentum,
    )
    assert_same(ours(config, 100), expected)


def test_cycle_momentum_range_is_torchs():
    config = TrainConfig(
        schedule="cyclic", min_lr=0.1, learning_rate=1.0, step_size_up=4, base_momentum=0.5
    ).replace(max_momentum=0.7)
    options = {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 4}
    expected = of_torch(config, CyclicLR, 20, base_momentum=0.5, max_momentum=0.7, **options)
    assert_same(ours(config, 20), expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("total", [100, 7])
def test_onecycle_is_torchs(total, optimizer):
    config = TrainConfig(
        optimizer=optimizer, schedule="onecycle", learning_rate=0.1, max_iters=total
    ).replace(warmup_iters=5)
    steps = total - 1  # torch's scheduler refuses to go on after the last
    assert_same(
        ours(config, steps), of_torch(config, OneCycleLR, steps, max_lr=0.1, total_steps=total)
    )
    last = 0.1 / 25 / 1e4
    assert learning_rate(total - 1, config) == pytest.approx(last, rel=1e-12)
    assert learning_rate(10 * total, config) == pytest.approx(last, rel=1e-12)


def test_onecycle_shape_is_torchs():
    config = TrainConfig(
        schedule="onecycle", learning_rate=0.1, max_iters=50, pct_start=0.5, div_factor=4.0
    ).replace(final_div_factor=10.0, lr_decay_iters=40, base_momentum=0.6, max_momentum=0.8)
    options = {"max_lr": 0.1, "total_steps": 40, "pct_start": 0.5, "div_factor": 4.0}
    options |= {"final_div_factor": 10.0, "base_momentum": 0.6, "max_momentum": 0.8}
    assert_same(ours(config, 39), of_torch(config, OneCycleLR, 39, **options))


def test_wsd_warms_up_stays_and_falls():
    config = TrainConfig(
        schedule="wsd", learning_rate=1.0, min_lr=0.1, max_iters=100, warmup_iters=4
    )
    rates = [learning_rate(step, config) for step in range(120)]
    assert rates[:4] == [0.2, 0.4, 0.6, 0.8]
    assert rates[4:81] == [1.0] * 77
    assert rates[90] == pytest.approx(0.55)
    assert rates[100:] == [0.1] * 20


def test_exponential_multiplies_by_one_factor():
    config = TrainConfig(schedule="exponential", min_lr=1e-6, learning_rate=1.0, max_iters=101)
    rates = torch.tensor([learning_rate(step, config) for step in range(101)], dtype=torch.float64)
    assert rates[0] == 1e-6 and rates[-1] == 1.0
    torch.testing.assert_close(rates[1:] / rates[:-1], torch.full_like(rates[1:], 10**0.06))
    assert learning_rate(500, config) == 1.0


def test_momentum_is_left_alone_without_a_cycle():
    assert momentum(5, TrainConfig(schedule="cosine")) is None
    config = TrainConfig(optimizer="sgd", schedule="constant", momentum=0.7)
    assert ours(config, 3) == [(config.learning_rate, 0.7)] * 3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_betas_are_those_of_the_settings(optimizer):
    config = TrainConfig(optimizer=optimizer, beta1=0.7, beta2=0.95)
    groups = make_optimizer(MODEL, config).param_groups
    assert {group["betas"] for group in groups} == {(0.7, 0.95)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedule=cyclicc"], "did you mean cyclic"),
        (["--schedule=cosine", "--min_lr=1", "--learning_rate=0.1"], "min_lr must be at most"),
        (["--schedule=exponential"], "min_lr must be above 0"),
        (["--cycle_mode=square"], "cycle_mode must be one of triangular"),
        (["--step_size_up=0"], "step_size_up must be at least 1"),
        (["--pct_start=1"], "pct_start must be below 1"),
        (["--decay_fraction=2"], "decay_fraction must be at most 1"),
        (["--optimizer=adam"], "did you mean adamw"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_schedules(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings(flags).merged()


@pytest.mark.parametrize(
    "flags", ["--schedule=cyclic --step_size_up=3 --optimizer=sgd", "--schedule=onecycle"]
)
def test_a_cycled_run_resumes_bit_for_bit(tiny_flags, tmp_path, flags):
    """12 steps, and 8 then 4: the schedule is a function of the step alone."""
    base = [*tiny_flags, *flags.split(), "--lr_decay_iters=12"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(parse_settings([*base, f"--out_dir={whole}"]))
    train(parse_settings([*base, f"--out_dir={parts}", "--max_iters=8"]))
    train(parse_settings([*base, f"--out_dir={parts}", "--resume"]))
    a, b = (load_file(folder / "last" / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
