"""Muon: against its formula in float64, torch's own, AdamW for the rest, and a guard it heeds."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from gptcore import muon
from gptcore.config import ConfigError, GPTConfig, TrainConfig
from gptcore.flags import parse_settings
from gptcore.model import GPT, MODELS
from gptcore.muon import COEFFICIENTS, Muon, orthogonalized
from gptcore.optim import hidden_matrices, make_optimizer
from gptcore.trainer import prepare, train, training_step

LR, BETA, DECAY = 0.02, 0.9, 0.1
SHAPES = {(6, 10): 1, (10, 6): 1, (8, 8): 1, (24, 8): 3, (1, 5): 1}  # of a matrix: its bands


def reference(weight, gradients, bands):
    """The formula in float64: a matrix after updates with `gradients`."""
    pieces = []
    for w, *rest in zip(*(x.double().chunk(bands) for x in (weight, *gradients)), strict=True):
        momentum = torch.zeros_like(w)
        for gradient in rest:
            momentum = BETA * momentum + (1 - BETA) * gradient
            u, s, vt = torch.linalg.svd(
                (1 - BETA) * gradient + BETA * momentum, full_matrices=False
            )
            s = s / s.norm()
            for _ in range(5):
                s = sum(c * s**power for c, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
            w = w - LR * DECAY * w - LR * 0.2 * max(w.shape) ** 0.5 * (u * s) @ vt
        pieces.append(w)
    return torch.cat(pieces)


def updated(weights, gradients, make):
    """The weights after updates with each of `gradients` by the optimizer that make(weights) is."""
    weights = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = make(weights)
    for step in zip(*gradients, strict=True):
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return [w.detach() for w in weights]


def ours(weights, dtype=torch.float32):
    matrices = list(zip(weights, SHAPES.values(), strict=True))
    options = {"weight_decay": DECAY, "lr": LR, "betas": (BETA, 0.99)}
    return Muon(matrices, [], dtype=dtype, **options)


def ours_in_bfloat16(weights):
    return ours(weights, torch.bfloat16)


def torchs(weights):
    """Its own, a matrix of a single row included."""
    options = {"lr": LR, "momentum": BETA, "weight_decay": DECAY}
    return torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw", **options)


@pytest.fixture
def problem():
    """Weights and three gradients of each."""
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in SHAPES]
    return weights, [[torch.randn_like(w) for _ in range(3)] for w in weights]


def errors(found, problem):
    """Of each weight, the largest."""
    expected = [
        reference(w, g, bands) for w, g, bands in zip(*problem, SHAPES.values(), strict=True)
    ]
    return [(f - e).abs().max().item() for f, e in zip(found, expected, strict=True)]


def test_the_formula_in_float32(problem):
    assert max(errors(updated(*problem, ours), problem)) < 2e-6


def test_bfloat16_errs_no_more_than_torchs(problem):
    contestants = ours_in_bfloat16, torchs
    found, of_torch = (errors(updated(*problem, make), problem) for make in contestants)
    for shape, a, b in zip(SHAPES, found, of_torch, strict=True):
        assert a < 2 * b + 1e-3 or shape == (24, 8), shape  # torch's takes it as one matrix
    assert max(found) < 0.01  # of updates of 0.06 to 0.3


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.setattr(muon, "ITERATIONS", 4),
        lambda m: m.setattr(muon, "COEFFICIENTS", (3.4445, -4.7750, 2.04)),
        lambda m: m.setitem(SHAPES, (24, 8), 1),
    ],
    ids=["iterations", "coefficients", "bands"],
)
def test_the_formula_sees_damage(problem, monkeypatch, damage):
    expected = updated(*problem, ours)
    damage(monkeypatch)
    found = updated(*problem, ours)
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) > 1e-4


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 40), (4, 1, 7)])
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_singular_values_become_nearly_equal(shape, dtype, slack):
    """From 0.002 of the norm on."""
    torch.manual_seed(1)
    u, s, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.logspace(-2.5, 0, s.shape[-1])
    values = torch.linalg.svdvals(orthogonalized(((u * s) @ vt).to(dtype)).float())
    assert 0.68 - slack < values.min() and values.max() < 1.203 + slack


def test_a_small_singular_value_grows_by_485():
    values = orthogonalized(torch.diag(torch.tensor([1.0, 1e-4]))[None])[0].diag()
    assert values[1] == pytest.approx(485e-4, rel=1e-3)


def test_a_matrix_without_a_gradient_does_not_move():
    assert torch.equal(orthogonalized(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Muon([(w, 1) for w in weights], [], weight_decay=DECAY, lr=LR)
    weights[0].grad = torch.eye(2)
    optimizer.step()
    assert torch.equal(weights[1], torch.ones(2, 2)) and weights[1] not in optimizer.state
    assert not torch.equal(weights[0], torch.ones(2, 2))


# ---- in a model ------------------------------------------------------------------------------


def model_and_optimizer(**fields):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, **fields))
    return model, make_optimizer(model, TrainConfig(optimizer="muon", weight_decay=0.1))


@pytest.mark.parametrize("tied", [False, True])
def test_the_matrices_of_blocks_are_muons_and_the_rest_adamws(tied):
    model, optimizer = model_and_optimizer(tied_head=tied)
    names = {parameter: name for name, parameter in model.named_parameters()}
    own, *rest = optimizer.param_groups
    matrices = ("qkv", "proj", "mlp_in", "mlp_out")
    assert [names[p] for p in own["params"]] == [
        f"blocks.{layer}.{name}.weight" for layer in range(2) for name in matrices
    ]
    assert own["bands"] == (3, 1, 1, 1) * 2 and own["weight_decay"] == 0.1
    others = [p for group in rest for p in group["params"]]
    assert not {"lm_head.weight", "token_embedding.weight"} & {names[p] for p in own["params"]}
    assert len(own["params"]) + len(others) == len(names) == len({*own["params"], *others})


def test_frozen_matrices_are_nobodys():
    model, _ = model_and_optimizer()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad = False
    assert len(hidden_matrices(model)) == 4
    for parameter in model.blocks[1].parameters():
        parameter.requires_grad = False
    assert type(make_optimizer(model, TrainConfig(optimizer="muon"))) is torch.optim.AdamW


def test_the_rest_moves_as_under_adamw_alone():
    model, optimizer = model_and_optimizer()
    other = copy.deepcopy(model)
    alone = make_optimizer(other, TrainConfig(weight_decay=0.1))
    for _ in range(3):
        for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        optimizer.step()
        alone.step()
    own = set(optimizer.param_groups[0]["params"])
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, twin) == (parameter not in own)


def test_nothing_waits_for_the_device():
    """An update works where tensors have no values, the learning rate on a GPU included."""
    with FakeTensorMode(), torch.no_grad():
        device = "cuda"
        weight = torch.nn.Parameter(torch.empty(12, 4, device=device))
        weight.grad = torch.empty(12, 4, device=device)
        optimizer = Muon([(weight, 3)], [], weight_decay=DECAY)
        optimizer.param_groups[0]["lr"] = torch.empty((), device=device)
        optimizer.found_inf = torch.zeros((), device=device)
        optimizer._update(optimizer.param_groups[0])
        assert optimizer.state[weight]["momentum_buffer"].shape == (12, 4)


@pytest.mark.parametrize("flags", [[], ["--dtype=bfloat16", "--dropout=0.2"]])
def test_a_run_resumes_bit_for_bit(tiny_flags, tmp_path, flags):
    """12 steps, and 8 then 4; the checkpoint holds both kinds of state."""
    base = [*tiny_flags, "--optimizer=muon", "--init=zero", *flags]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(parse_settings([*base, f"--out_dir={whole}"]))
    train(parse_settings([*base, f"--out_dir={parts}", "--max_iters=8"]))
    train(parse_settings([*base, f"--out_dir={parts}", "--resume", "--max_iters=12"]))
    for name in ("model", "optimizer"):
        a, b = (load_file(run / "last" / f"{name}.safetensors") for run in (whole, parts))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert "blocks.0.qkv.weight/momentum_buffer" in a and "lm_head.weight/exp_avg" in a
    assert "blocks.0.qkv.weight/exp_avg" not in a


def test_a_run_does_not_go_on_with_another_optimizer(tiny_flags, tmp_path):
    """What one keeps is nothing to the other."""
    for first, then in (("muon", "adamw"), ("adamw", "muon")):
        base = [*tiny_flags, f"--out_dir={tmp_path / first}"]
        train(parse_settings([*base, "--max_iters=4", f"--optimizer={first}"]))
        with pytest.raises(ConfigError, match=f"--optimizer {then}"):
            train(parse_settings([*base, "--resume", f"--optimizer={then}", "--max_iters=8"]))


@pytest.mark.parametrize("name", MODELS)
def test_every_rung_trains(tiny_flags, tmp_path, name):
    """Of a bigram model there is nothing for Muon."""
    out = f"--out_dir={tmp_path / 'run'}"
    run = prepare(parse_settings([*tiny_flags, "--optimizer=muon", f"--model={name}", out]))
    before = [p.detach().clone() for p in run.model.parameters()]
    for _ in range(2):
        training_step(run)
    assert not any(map(torch.equal, before, run.model.parameters()))
    assert isinstance(run.optimizer, Muon) == (not name.startswith("bigram"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", ["cpu", "speedrun"])
def test_the_fast_presets_go_with_every_rung(preset, name):
    config, _ = parse_settings([f"--preset={preset}", f"--model={name}"]).merged("cpu")
    assert (config.model, config.optimizer) == (name, "muon")


def test_a_cycled_momentum_is_muons_too(prepared):
    run = prepared("--optimizer=muon", "--schedule=onecycle")
    betas = []
    for _ in range(4):
        training_step(run)
        betas.append({group["betas"][0] for group in run.optimizer.param_groups})
    assert all(len(beta) == 1 for beta in betas) and len(set(map(tuple, betas))) == 4


def test_an_optimizer_can_be_copied_and_loaded():
    """As torch's can; AdamW's own way looks for its slots in every group."""
    model, optimizer = model_and_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    other, fresh = model_and_optimizer()
    fresh.load_state_dict(copy.deepcopy(optimizer).state_dict())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[a].keys() == fresh.state[b].keys()
        assert all(torch.equal(optimizer.state[a][k], fresh.state[b][k]) for k in fresh.state[b])


def test_it_learns(prepared):
    """The mean of ten losses falls, and as far as the rate is high."""
    falls = []
    for rate in (0.0001, 0.02):
        run = prepared("--optimizer=muon", "--init=zero", f"--learning_rate={rate}", "--dropout=0")
        losses = [run.update().item() for _ in range(40)]
        falls.append(sum(losses[:10]) - sum(losses[-10:]))
    assert 0 < 2 * falls[0] < falls[1] and math.isfinite(falls[1])
