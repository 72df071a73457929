"""Updates replayed as a list of ops: the bits of eager ones, and seen where they are not."""

import contextlib
import math

import pytest
import torch

from gptcore.replay import Replay
from kernels.rng import make_key

RECIPES = {
    "notebook": ["--dropout=0.2"],
    "gpt2": ["--dropout=0.3", "--embedding_dropout=true", "--tied_head=true", "--activation=gelu"],
    "fast": [
        *("--position=rotary", "--qk_norm=true", "--token_shift=true", "--activation=relu2"),
        *("--bias=false", "--head_bias=false", "--init=gpt2", "--dropout=0"),
    ],
    "clipped": ["--dropout=0.2", "--grad_clip=0.01", "--weight_decay=0.1", "--activation=gelu_erf"],
    "sgd": ["--dropout=0.2", "--optimizer=sgd", "--schedule=cyclic", "--grad_clip=1"],
    "muon": ["--dropout=0.2", "--optimizer=muon", "--init=zero", "--grad_clip=1"],
    "answers": ["--data=add", "--dropout=0.2", "--block_size=16"],
    "bfloat16": ["--dropout=0.2", "--dtype=bfloat16", "--grad_clip=1"],
}


def state_of(run):
    """Every number an update changes."""
    moments = [v for s in run.optimizer.state.values() for v in s.values()]
    return [*(p.detach().clone() for p in run.model.parameters()), *moments]


@pytest.mark.parametrize("recipe", RECIPES)
def test_replayed_updates_equal_eager_ones_bit_for_bit(prepared, recipe):
    replayed = prepared(*RECIPES[recipe])
    eager = prepared(*RECIPES[recipe], "--cuda_graph=false")
    assert replayed.update.eager_reason is None and "list of ops" in replayed.update.how
    assert "--cuda_graph false" in eager.update.how
    losses = [[run.update().item() for _ in range(8)] for run in (replayed, eager)]
    assert replayed.update.replay.proven and eager.update.replay is None
    assert losses[0] == losses[1] and len(set(losses[0])) == 8
    assert all(map(torch.equal, state_of(replayed), state_of(eager)))
    assert replayed.update.guard.look(8) == eager.update.guard.look(8)


def test_a_rewound_run_records_anew(prepared):
    run, other = prepared("--dropout=0.2"), prepared("--dropout=0.2", "--cuda_graph=false")
    start = state_of(run)
    for _ in range(6):
        run.update()
    with torch.no_grad():
        for now, before in zip(run.model.parameters(), start, strict=False):
            now.copy_(before)
    run.optimizer.state.clear()
    run.update.rewind(0)
    assert run.update.replay is None
    for _ in range(7):
        assert run.update().item() == other.update().item()
    assert run.update.replay.proven
    assert all(map(torch.equal, state_of(run), state_of(other)))


def test_a_parameter_without_a_gradient_has_none():
    weight, unused = torch.nn.Parameter(torch.randn(3, 3)), torch.nn.Parameter(torch.randn(3))
    frozen = torch.randn(3)
    constant = torch.arange(3.0)

    def forward(idx, targets, key):
        x = frozen[idx] @ weight.t() + constant
        x.view(-1)[:2].mul_(2)  # in place, on a view
        first, rest = x.split([1, 2])
        return None, (first.sum() * rest.square().max() - targets.float().mean()).sigmoid()

    def draw():
        return torch.randint(3, (3,)), torch.randint(3, (3,)), make_key(0)

    parameters = [weight, unused]
    replay, loss, gradients = Replay.record(forward, parameters, *draw())
    assert gradients[1] is None and torch.isfinite(loss)
    for _ in range(3):
        with torch.no_grad():
            weight.add_(0.1)  # where it is, as optimizers do
        batch = draw()
        found, (gradient, none) = replay(*batch)
        expected = forward(*batch)[1]
        assert none is None and torch.equal(found, expected)
        assert torch.equal(gradient, torch.autograd.grad(expected, weight)[0])
    assert "aten.sigmoid" in replay.source and "aten.detach" not in replay.source


@pytest.mark.parametrize(
    ("replayed", "computed", "same"),
    [
        ([1.0, math.nan], [1.0, math.nan], True),
        ([1.0, math.nan], [1.0, 0.0], False),
        ([math.inf], [torch.finfo(torch.float32).max], False),
        ([1.0], [1.0 + 2**-23], False),
        ([1.0], None, False),
    ],
)
def test_a_proof_wants_all_bits(replayed, computed, same):
    loss, weight = torch.tensor(1.0), torch.nn.Parameter(torch.ones(3))
    draw = torch.zeros(3, dtype=torch.long), torch.zeros(3), make_key(0)
    replay, _, _ = Replay.record(lambda i, t, k: (None, weight[i].sum()), [weight], *draw)
    computed = computed if computed is None else torch.tensor(computed)
    with contextlib.nullcontext() if same else pytest.raises(RuntimeError, match="another"):
        replay.prove(loss, [torch.tensor(replayed)], loss, [computed])
    assert replay.proven == same


def test_what_depends_on_a_number_is_seen(prepared, monkeypatch):
    """An update that takes another way each time is computed, not replayed."""
    run, plain = prepared("--dropout=0"), prepared("--dropout=0", "--cuda_graph=false")
    for one in (run, plain):
        forward = one.update.forward

        def scaled(idx, targets, key, forward=forward):
            y, loss = forward(idx, targets, key)
            return y, loss * (1 + int(key[1]))

        monkeypatch.setattr(one.update, "forward", scaled)
    losses = [[one.update().item() for _ in range(7)] for one in (run, plain)]
    assert losses[0] == losses[1]
    assert run.update.replay is None and "its replay was another update" in run.update.how
    assert all(map(torch.equal, state_of(run), state_of(plain)))


def test_what_no_op_returned_is_refused(prepared, monkeypatch):
    run = prepared("--dropout=0")
    forward = run.update.forward

    def through_numpy(idx, targets, key):
        return forward(torch.from_numpy((idx + 0).numpy()), targets, key)

    monkeypatch.setattr(run.update, "forward", through_numpy)
    for _ in range(5):
        assert torch.isfinite(run.update())
    assert run.update.replay is None and "no op was seen to return" in run.update.how
