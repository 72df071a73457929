"""Optimizers, parameter groups, and schedules of learning rate and momentum.

A schedule is a pure function of (step, config), so that resuming needs only the step and a
captured update only one number. `cyclic` and `onecycle` equal torch's CyclicLR and OneCycleLR
(Smith 2017, arXiv:1506.01186; Smith & Topin 2018, arXiv:1708.07120), which keep state instead.
"""

import math
from collections.abc import Set
from typing import Any

import torch
from torch import nn

from gptcore.config import TrainConfig
from gptcore.muon import Muon


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of update number `step`, counted from 0.

    end = lr_decay_iters, or max_iters. From end on a schedule stays where it ended, cyclic goes on.

        constant     learning_rate
        cosine       half a cosine from learning_rate to min_lr at end
        wsd          learning_rate, the last decay_fraction linearly down to min_lr at end
        cyclic       between min_lr and learning_rate and back, again and again
        onecycle     learning_rate / div_factor, up to learning_rate, down to almost nothing
        exponential  min_lr up to learning_rate, each step the same factor (the range test)

    constant, cosine and wsd are preceded by warmup_iters steps of linear warm-up.
    """
    peak, low, end = config.learning_rate, config.min_lr, config.schedule_iters
    if config.schedule == "cyclic":
        return low + (peak - low) * _cycle_height(step, config)
    if config.schedule == "onecycle":
        first = peak / config.div_factor
        return _one_cycle(step, config, first, peak, first / config.final_div_factor)
    if config.schedule == "exponential":
        return low * (peak / low) ** min(1.0, step / max(1, end - 1))
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return peak
    if step >= end:
        return low
    if config.schedule == "cosine":
        progress = (step - config.warmup_iters) / (end - config.warmup_iters)
        return low + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - low)
    return low + (peak - low) * min(1.0, (end - step) / (config.decay_fraction * end))


def momentum(step: int, config: TrainConfig) -> float | None:
    """The momentum (SGD's, or beta1) of update number `step`; None where it is not cycled."""
    if config.schedule not in ("cyclic", "onecycle") or not config.cycle_momentum:
        return None
    low, high = (0.8, 0.9) if config.schedule == "cyclic" else (0.85, 0.95)
    low = low if config.base_momentum is None else config.base_momentum
    high = high if config.max_momentum is None else config.max_momentum
    if config.schedule == "cyclic":
        return high - (high - low) * _cycle_height(step, config)
    return _one_cycle(step, config, high, low, high)


def _cycle_height(step: int, config: TrainConfig) -> float:
    """Where in [0, 1] a cyclic schedule stands."""
    up = config.step_size_up or max(1, config.schedule_iters // 8)
    down = config.step_size_down or up
    cycle, offset = divmod(step, up + down)
    height = offset / up if offset <= up else (up + down - offset) / down
    if config.cycle_mode == "triangular2":
        return height * 0.5**cycle
    if config.cycle_mode == "exp_range":
        return height * config.cycle_gamma**step
    return height


def _one_cycle(step: int, config: TrainConfig, first: float, middle: float, last: float) -> float:
    """Half a cosine from first to middle, then one to last."""
    end = config.schedule_iters - 1
    turn = config.pct_start * config.schedule_iters - 1
    if step < turn:
        start, stop, progress = first, middle, step / turn
    else:
        start, stop = middle, last
        progress = min(1.0, (step - turn) / (end - turn))
    return stop + (start - stop) / 2 * (1 + math.cos(math.pi * progress))


def parameter_groups(
    model: nn.Module, config: TrainConfig, without: Set[nn.Parameter] = frozenset()
) -> list[dict]:
    """Matrices (and embeddings) decay, vectors do not; all do with decay_params "all"."""
    parameters = [p for p in model.parameters() if p.requires_grad and p not in without]
    decay = [p for p in parameters if p.ndim >= 2 or config.decay_params == "all"]
    rest = [p for p in parameters if p.ndim < 2 and config.decay_params != "all"]
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module, config: TrainConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """AdamW, Muon with it, or SGD with momentum and L2 decay.

    torch's are fused: one kernel for all parameters of a group.

    Args:
        dtype: of Muon's products.
    """
    matrices = hidden_matrices(model) if config.optimizer == "muon" else []
    groups = parameter_groups(model, config, without={parameter for parameter, _ in matrices})
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, fused=True
        )
    lr, device = config.learning_rate, next(model.parameters()).device
    options: dict[str, Any] = {"betas": (config.beta1, config.beta2), "lr": lr}
    if device.type == "cuda":
        options |= {"lr": torch.tensor(lr, device=device), "capturable": True}
    if not matrices:  # not asked for, frozen, or those of a bigram model
        return torch.optim.AdamW(groups, fused=True, **options)
    return Muon(matrices, groups, weight_decay=config.weight_decay, dtype=dtype, **options)


def hidden_matrices(model: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """What Muon updates, and how many bands of rows each has: all matrices but embeddings and head.

    A packed projection has queries, keys and values; the naive models have them head by head.
    """
    return [
        (module.weight, 3 if name.endswith("qkv") else 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and module.weight.requires_grad
    ]


def state_slots(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, tuple[str, ...]]:
    """What `optimizer` keeps of each parameter, once it has updated it."""
    slots = {}
    for group in optimizer.param_groups:
        momentum = isinstance(optimizer, torch.optim.SGD) or "bands" in group
        of_each = ("momentum_buffer",) if momentum else ("step", "exp_avg", "exp_avg_sq")
        slots |= dict.fromkeys(group["params"], of_each)
    return slots


def apply_schedule(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> None:
    """Give `optimizer` the learning rate and momentum of update number `step`."""
    set_learning_rate(optimizer, learning_rate(step, config))
    cycled = momentum(step, config)
    if cycled is None:
        return
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (cycled, group["betas"][1])
        else:
            group["momentum"] = cycled


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """For every group; a learning rate that is a tensor is filled where it lies."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
