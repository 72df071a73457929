"""The seeds' ladder: four ways to average the past, and every rung's shape, loss and mask."""

import math

import pytest
import torch
import torch.nn.functional as F

from gptcore import naive
from gptcore.config import GPTConfig
from gptcore.model import MODELS, build_model
from kernels.rng import dropout_keep_mask, layer_site, make_key

TINY = GPTConfig(
    vocab_size=11, block_size=8, n_layer=2, n_head=3, n_embd=12, dropout=0.0, backend="eager"
)


def average_by_loop(x):
    """out[b, t] = mean of x[b, 0..t]."""
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            out[b, t] = x[b, : t + 1].mean(0)
    return out


def average_by_matmul(x):
    """The same as a product with a row-normalised lower triangle."""
    wei = torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=x.dtype))
    return (wei / wei.sum(1, keepdim=True)) @ x


def average_by_softmax(x):
    """The same as a softmax over equal affinities, the future masked."""
    return average_by_data(x, torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype))


def average_by_data(x, affinities):
    """A softmax over given affinities (T, T) or (B, T, T), the future masked."""
    T = x.shape[1]
    past = torch.tril(torch.ones(T, T, dtype=torch.bool))
    return affinities.masked_fill(~past, -math.inf).softmax(-1) @ x


def test_four_ways_to_average_the_past_agree():
    x = torch.randn(4, 8, 2, dtype=torch.float64)
    by_loop = average_by_loop(x)
    for way in (average_by_matmul, average_by_softmax):
        torch.testing.assert_close(way(x), by_loop)
    # Data-dependent affinities agree where the data make them equal, and only there.
    torch.testing.assert_close(average_by_data(x, torch.full((4, 8, 8), 3.0).double()), by_loop)
    by_data = average_by_data(x, x @ x.mT)
    torch.testing.assert_close(by_data[:, 0], by_loop[:, 0])
    assert (by_data[:, 1:] - by_loop[:, 1:]).abs().max() > 1e-3


def test_head_is_the_data_dependent_average():
    head = naive.Head(TINY).double()
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    affinities = head.query(x) @ head.key(x).mT * 12**-0.5
    torch.testing.assert_close(head(x), average_by_data(head.value(x), affinities))


@pytest.mark.parametrize("name", MODELS)
def test_every_rung_gives_logits_and_the_mean_loss(name):
    torch.manual_seed(0)
    model = build_model(name, TINY)
    idx, targets = torch.randint(11, (2, 3, 8))
    targets[0, 5] = -100
    logits, loss = model(idx, targets)
    assert logits.shape == (3, 8, 11)
    assert model(idx)[1] is None
    kept = targets != -100
    expected = -logits.log_softmax(-1)[kept].gather(1, targets[kept][:, None]).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bigram"])
def test_no_rung_looks_ahead(name):
    torch.manual_seed(0)
    model = build_model(name, TINY).eval()
    idx = torch.randint(11, (1, 8))
    changed = idx.clone()
    changed[0, 5] = (idx[0, 5] + 1) % 11
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_bigram_table_is_a_lookup():
    model = naive.BigramLM(TINY)
    logits, _ = model(torch.tensor([[3, 7]]))
    torch.testing.assert_close(logits[0], model.token_embedding_table.weight[[3, 7]])


def test_notebook_names_and_size():
    model = naive.NaiveGPT(GPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 10_788_929
    names = model.state_dict().keys()
    assert {
        "token_embedding_table.weight",
        "position_embedding_table.weight",
        "blocks.0.sa.heads.0.key.weight",
        "blocks.5.sa.heads.5.tril",
        "blocks.0.sa.proj.bias",
        "blocks.0.ffwd.net.0.weight",
        "blocks.0.ffwd.net.2.bias",
        "blocks.0.ln1.weight",
        "ln_f.bias",
        "lm_head.bias",
    } <= names
    assert "blocks.0.sa.heads.0.key.bias" not in names


def test_head_size_that_does_not_divide():
    config = GPTConfig(n_embd=512, n_layer=1, n_head=6)
    block = naive.Block(config)
    assert config.D == 85
    assert block.sa.heads[0].key.weight.shape == (85, 512)
    assert block.sa.proj.weight.shape == (512, 510)


def test_scale_is_that_of_the_seeds():
    assert GPTConfig().scale == 384**-0.5
    assert GPTConfig(attention_scale="head_size").scale == 64**-0.5


def test_keyed_dropout_is_the_published_mask():
    p, key = 0.3, make_key(seed=5, step=9, first=2)
    x = torch.ones(2, 4, 10)
    out = naive.dropout_activations(x, p, True, key, site=7)
    keep = dropout_keep_mask(key, 7, 1, range(8, 16), 10, p).view(2, 4, 10)
    torch.testing.assert_close(out, keep / (1 - round(p * 65536) / 65536))
    wei = torch.ones(2, 4, 4)
    out = naive.dropout_probabilities(wei, p, True, key, layer_site(1, "attention"), 1, 3)
    keep = dropout_keep_mask(key, layer_site(1, "attention"), 12, 4, 4, p)[[2 * 3 + 1, 3 * 3 + 1]]
    assert torch.equal(out > 0, keep)


def test_without_a_key_dropout_is_torchs():
    torch.manual_seed(3)
    out = naive.dropout_activations(torch.ones(1, 4, 10), 0.5, True, None, 0)
    torch.manual_seed(3)
    assert torch.equal(out, F.dropout(torch.ones(1, 4, 10), 0.5))
