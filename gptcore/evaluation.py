"""Loss and accuracy of a model: of the splits during training, of the whole validation split.

`--eval_mode exact` evaluates the validation split, each token once, and as many training batches
as `--eval_iters` says; `sampled` estimates both on random batches, as the notebook does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from gptcore.config import GPTConfig
from gptcore.distributed import ALONE, World
from gptcore.model import evaluating
from kernels.rng import SITE_EVALUATION, make_key

if TYPE_CHECKING:
    from gptcore.trainer import Run

EVALUATION_TOKENS = 4096  # per forward at least; small training batches would waste the CPU
EVALUATION_LOGITS = 1 << 26  # per forward at most, but for one sequence: 256 MB in float32
GPU_TIMES = 8  # so many more on a GPU, which launches, not memory, would hold up


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` finds.

    Attributes:
        loss: mean, in nats.
        accuracy: fraction of the targets guessed right.
        exact_match: fraction of the rows without a mistake.
        targets, rows: how many counted.
    """

    loss: float
    accuracy: float
    exact_match: float
    targets: int
    rows: int


class Stopped(Exception):
    """An evaluation was given up because the run is to save and leave."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    world: World = ALONE,
) -> Evaluation:
    """Mean loss and accuracy over all targets of `batches`; targets of -100 do not count.

    The processes of `world` share the batches; each gets the result.
    """
    sums = None
    with evaluating(model):
        for (idx, targets), counts in world.shard(batches):
            logits, loss = model(idx, targets)
            if sums is None:
                sums = torch.zeros(5, dtype=torch.float64, device=loss.device)
            if not counts:
                continue
            counted = targets != -100
            tokens = counted.sum()
            wrong = (logits.argmax(-1) != targets) & counted
            right = tokens - wrong.sum(), (~wrong.any(1)).sum()  # targets, rows
            sums[:4] += torch.stack((loss.double() * tokens, tokens, *right))
            sums[4] += len(targets)
    loss_sum, tokens, tokens_right, rows_right, rows = world.sum(sums).tolist()
    means = loss_sum / tokens, tokens_right / tokens, rows_right / rows
    return Evaluation(*means, int(tokens), int(rows))


def in_pieces(
    model: GPTConfig, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches, cut between rows into such as EVALUATION_LOGITS allows."""
    for idx, targets in batches:
        most = EVALUATION_LOGITS * (GPU_TIMES if idx.is_cuda else 1)
        rows = max(1, most // (model.block_size * model.vocab_size))
        yield from zip(idx.split(rows), targets.split(rows), strict=True)


def evaluate_exactly(run: Run) -> Evaluation:
    """The validation split, each token once; of a longer one than --eval_tokens a part."""
    batches = in_pieces(run.model.config, _validation(run))
    return evaluate(run.update.compute, batches, run.world)


def evaluate_splits(run: Run) -> tuple[Evaluation, Evaluation]:
    """(training, validation) as --eval_mode says.

    Raises: Stopped if a signal comes meanwhile.
    """
    config, block_size = run.config, run.model.config.block_size
    if config.eval_mode == "exact":
        sample = run.corpus.training_sample(config.eval_iters, config.batch_size, block_size)
        splits = sample, _validation(run)
    else:
        splits = _sampled(run, "train", 0), _sampled(run, "val", 1)
    training, validation = (
        evaluate(
            run.update.compute,
            _until_stopped(run, in_pieces(run.model.config, batches)),
            run.world,
        )
        for batches in splits
    )
    return training, validation


def _validation(run: Run) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    block_size = run.model.config.block_size
    size = max(run.config.batch_size, EVALUATION_TOKENS // block_size)
    return run.corpus.validation(size, block_size)


def _until_stopped(run: Run, batches: Iterable) -> Iterator:
    for batch in batches:
        if run.asked_to_stop():
            raise Stopped
        yield batch


def _sampled(run: Run, split: str, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """eval_iters random batches, as the notebook estimates a loss."""
    config, block_size = run.config, run.model.config.block_size
    for batch in range(config.eval_iters):
        row = (first * config.eval_iters + batch) * config.batch_size
        key = make_key(config.seed, run.step, row, run.device)
        yield run.corpus.batch(
            key, config.batch_size, block_size, split=split, site=SITE_EVALUATION
        )
