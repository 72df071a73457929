"""Optimizer, parameter groups and learning-rate schedules."""

import math

import torch
from torch import nn

from gptcore.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of update number `step`, counted from 0.

    Linear warm-up over warmup_iters, then constant, or half a cosine down to min_lr at
    lr_decay_iters and min_lr from there on.
    """
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return config.learning_rate
    end = config.lr_decay_iters if config.lr_decay_iters is not None else config.max_iters
    if step >= end:
        return config.min_lr
    progress = (step - config.warmup_iters) / (end - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (
        config.learning_rate - config.min_lr
    )


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Matrices (and embeddings) decay, vectors do not; all do with decay_params "all"."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in parameters if p.ndim >= 2 or config.decay_params == "all"]
    rest = [p for p in parameters if p.ndim < 2 and config.decay_params != "all"]
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, fused: one kernel for all parameters of a group."""
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """For every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
