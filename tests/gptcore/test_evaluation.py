"""Evaluation: exact over the whole split, sampled as the notebook does."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from gptcore import evaluation
from gptcore.config import GPTConfig
from gptcore.data import Corpus
from gptcore.evaluation import evaluate, evaluate_exactly


def test_exact_evaluation_is_the_mean_over_all_windows(prepared):
    run = prepared("--eval_iters=3")
    run.model.eval()
    val, block = run.corpus.val.long(), run.model.config.block_size
    losses, right = [], 0
    for start in range(0, len(val) - 1, block):
        idx = val[start : min(start + block, len(val) - 1)][None]
        targets = val[start + 1 : start + 1 + idx.shape[1]]
        logits = run.model(idx)[0][0]
        losses += cross_entropy(logits, targets, reduction="none").tolist()
        right += (logits.argmax(-1) == targets).sum().item()
    run.model.train()
    result = evaluate_exactly(run)
    assert len(losses) == len(val) - 1
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.accuracy == pytest.approx(right / len(losses), abs=1e-9)
    assert run.model.training  # as it was
    training, validation = evaluation.evaluate_splits(run)
    assert training.rows == 3 * run.config.batch_size and validation == result


def test_ignored_targets_do_not_count(prepared):
    run = prepared()
    batches = list(run.corpus.validation(4, 8))[:2]
    masked = [(idx, targets.clone()) for idx, targets in batches]
    masked[0][1][:, ::2] = -100
    half, whole = evaluate(run.model, masked), evaluate(run.model, batches)
    logits = torch.cat([run.model.eval()(idx)[0] for idx, _ in masked]).flatten(0, 1)
    targets = torch.cat([targets for _, targets in masked]).flatten()
    assert half.loss == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-5)
    counted = targets != -100
    right = (logits.argmax(-1) == targets)[counted].float().mean().item()
    assert half.accuracy == pytest.approx(right) and half != whole


def test_each_split_is_sampled_from_itself(prepared):
    """Of a corpus whose training tokens are all 0 and whose validation tokens are all 1."""
    run = prepared("--eval_mode=sampled")
    zeros, ones = torch.zeros_like(run.corpus.train), torch.ones_like(run.corpus.val)
    run.corpus = dataclasses.replace(run.corpus, train=zeros, val=ones)
    seen = []
    run.update.compute.register_forward_hook(
        lambda module, args, y: seen.append([x.unique().tolist() for x in args])
    )
    evaluation.evaluate_splits(run)
    count = run.config.eval_iters
    assert seen == [[[0], [0]]] * count + [[[1], [1]]] * count


def test_a_sampled_evaluation_draws_no_row_twice(prepared, monkeypatch):
    run, rows, batch = prepared("--eval_mode=sampled"), [], Corpus.batch

    def noted(corpus, key, size, *rest, **options):
        rows.extend(range(key[2], key[2] + size))
        return batch(corpus, key, size, *rest, **options)

    monkeypatch.setattr(Corpus, "batch", noted)
    evaluation.evaluate_splits(run)
    assert len(set(rows)) == len(rows) == 2 * run.config.eval_iters * run.config.batch_size


def test_sampled_evaluation_is_repeatable_and_near(prepared):
    run = prepared("--eval_mode=sampled", "--eval_iters=40")
    first, second = evaluation.evaluate_splits(run), evaluation.evaluate_splits(run)
    assert first == second
    assert first[1].loss == pytest.approx(evaluate_exactly(run).loss, rel=0.05)
    run.update.step = 1
    assert evaluation.evaluate_splits(run) != first


@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_logits_of_an_evaluation_are_bounded(prepared, monkeypatch, mode):
    """Three sequences at a time give what sixteen and more do."""
    run = prepared(f"--eval_mode={mode}")
    expected = *evaluation.evaluate_splits(run), evaluate_exactly(run)
    elements = []
    run.model.register_forward_hook(lambda *args: elements.append(args[-1][0].numel()))
    sequence = run.model.config.block_size * run.model.config.vocab_size
    monkeypatch.setattr(evaluation, "EVALUATION_LOGITS", 3 * sequence + 1)
    found = *evaluation.evaluate_splits(run), evaluate_exactly(run)
    assert max(elements) == 3 * sequence
    for a, b in zip(found, expected, strict=True):
        assert dataclasses.astuple(a) == pytest.approx(dataclasses.astuple(b), rel=1e-6)


class OnGPU(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    ("kind", "vocab_size", "rows"),
    [
        (torch.Tensor, 65, [12]),
        (torch.Tensor, 12_576, [5, 5, 2]),
        (torch.Tensor, 50_304, [1] * 12),
        (OnGPU, 50_304, [10, 2]),
    ],
)
def test_what_is_evaluated_at_once(kind, vocab_size, rows):
    """Of a small model all; of a large vocabulary as many as 256 MB hold; at least one."""
    batch = [torch.zeros(12, 1024, dtype=torch.int64).as_subclass(kind) for _ in range(2)]
    config = GPTConfig(vocab_size=vocab_size, block_size=1024)
    pieces = list(evaluation.in_pieces(config, [batch]))
    assert [len(idx) for idx, _ in pieces] == [len(targets) for _, targets in pieces] == rows
