"""GPT equals NaiveGPT: logits, loss and every gradient, with shared dropout masks."""

import pytest
import torch

from gptcore.config import GPTConfig
from gptcore.model import GPT, KVCache, build_model
from gptcore.naive import NaiveGPT
from gptcore.verification import compare_models
from kernels.rng import make_key

BASE = GPTConfig(vocab_size=13, block_size=9, n_layer=2, n_head=2, n_embd=16, backend="eager")
SHAPES = {
    "B2-T9-H2-D8": (BASE, 2, 9),
    "B3-T5-H4-D4": (BASE.replace(n_head=4), 3, 5),
    "B1-T1-H1-D16": (BASE.replace(n_head=1), 1, 1),
    "B2-T7-H3-D5-undivided": (BASE.replace(n_head=3), 2, 7),
    "B2-T9-head_size3": (BASE.replace(head_size=3), 2, 9),
    "gpt2": (
        BASE.replace(
            tied_head=True,
            activation="gelu",
            qkv_bias=True,
            head_bias=False,
            attention_scale="head_size",
            embedding_dropout=True,
            init="gpt2",
        ),
        2,
        9,
    ),
    "nanogpt-no-bias": (
        BASE.replace(bias=False, head_bias=False, tied_head=True, activation="gelu"),
        2,
        9,
    ),
    "relu2": (BASE.replace(activation="relu2"), 2, 6),
    "rotary": (BASE.replace(position="rotary"), 2, 9),
    "rotary-qk_norm-token_shift": (
        BASE.replace(
            position="rotary", qk_norm=True, token_shift=True, n_head=4, embedding_dropout=True
        ),
        3,
        7,
    ),
    "gelu_erf": (BASE.replace(activation="gelu_erf"), 1, 9),
}


def run(model, idx, targets, key):
    """Logits, loss and gradients by name of one training step."""
    model.zero_grad()
    logits, loss = model(idx, targets, key)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return logits.detach(), loss.detach(), gradients


def naive_gradients(gpt, model):
    """Gradients of `model`, a NaiveGPT, under the names of `gpt`."""
    carrier = NaiveGPT(gpt.config).to(model.lm_head.weight.dtype)
    with torch.no_grad():
        for target, source in zip(carrier.parameters(), model.parameters(), strict=True):
            target.copy_(source.grad)
    return {name: p.detach() for name, p in GPT.from_naive(carrier).named_parameters()}


def equivalent_pair(config, seed=0):
    """A NaiveGPT and the GPT with its weights."""
    torch.manual_seed(seed)
    model = NaiveGPT(config)
    if model.shift is not None:
        torch.nn.init.normal_(model.shift)  # 0 at first, which would hide it
    return model, GPT.from_naive(model)


def tokens(config, B, T, seed=1):
    """idx and targets (B, T); one target is ignored where there are several."""
    generator = torch.Generator().manual_seed(seed)
    idx, targets = torch.randint(config.vocab_size, (2, B, T), generator=generator)
    if B * T > 1:
        targets[0, 0] = -100
    return idx, targets


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("shape", SHAPES)
def test_gpt_equals_naive_in_float64(shape, dropout):
    config, B, T = SHAPES[shape]
    model, gpt = equivalent_pair(config.replace(dropout=dropout))
    model, gpt = model.double(), gpt.double()
    idx, targets = tokens(config, B, T)
    key = make_key(11, 3, first=4)
    logits, loss, gradients = run(gpt, idx, targets, key)
    expected_logits, expected_loss, _ = run(model, idx, targets, key)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    # The table of angles is float32: turned there and back, a vector differs by its rounding.
    rtol, atol = (1e-6, 1e-8) if config.qk_norm else (1e-10, 1e-12)
    for name, expected in naive_gradients(gpt, model).items():
        torch.testing.assert_close(gradients[name], expected, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("shape", SHAPES)
def test_gpt_obeys_the_2x_rule_in_float32(shape, dropout):
    """As near to float64 as the naive model in float32 is: logits, loss and every gradient."""
    config, B, T = SHAPES[shape]
    config = config.replace(dropout=dropout)
    rows = compare_models(config, B, T, torch.float32, torch.device("cpu"), seed=1)
    assert [str(row) for row in rows if not row.passed] == []


COMPILED = [("eager", shape) for shape in ("B2-T9-H2-D8", "gpt2", "rotary-qk_norm-token_shift")]


@pytest.mark.parametrize(("backend", "shape"), [*COMPILED, ("triton", "B2-T9-H2-D8")])
def test_the_whole_model_compiles(backend, shape, device):
    """In one graph, forward and backward, with dropout."""
    config, B, T = SHAPES[shape]
    _, gpt = equivalent_pair(config.replace(dropout=0.2, backend=backend))
    gpt = gpt.to(device)
    batch = [x.to(device) for x in (*tokens(config, B, T), make_key(11, 3))]
    compiled = torch.compile(gpt, fullgraph=True, backend="aot_eager")
    expected, actual = run(gpt, *batch), run(compiled, *batch)
    torch.testing.assert_close(actual[:2], expected[:2])
    assert len(actual[2]) == len(expected[2])
    for a, b in zip(actual[2].values(), expected[2].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["B2-T9-H2-D8", "rotary-qk_norm-token_shift"])
def test_torch_func_differentiates_the_whole_model(shape):
    config, B, T = SHAPES[shape]
    _, gpt = equivalent_pair(config.replace(dropout=0.2))
    batch = *tokens(config, B, T), make_key(11, 3)
    _, _, expected = run(gpt, *batch)
    weights = {name: p.detach() for name, p in gpt.named_parameters()}
    gradients = torch.func.grad(lambda w: torch.func.functional_call(gpt, w, batch)[1])(weights)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_return_logits_false_gives_the_same_loss_and_gradients():
    _, gpt = equivalent_pair(BASE.replace(dropout=0.2))
    gpt = gpt.double()
    idx, targets = tokens(BASE, 2, 9)
    _, loss, gradients = run(gpt, idx, targets, make_key(1))
    gpt.zero_grad()
    logits, fused_loss = gpt(idx, targets, make_key(1), return_logits=False)
    fused_loss.backward()
    assert logits is None
    torch.testing.assert_close(fused_loss, loss, rtol=1e-12, atol=0)
    for name, parameter in gpt.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-13)


class Doubled(torch.nn.Module):
    """As LoRA does: its weight is not all that it computes."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias

    def forward(self, x):
        return 2 * self.linear(x)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("name", ["lm_head", "proj", "mlp_out"])
def test_training_heeds_what_wraps_a_module(backend, name, device):
    if backend == "triton":
        pytest.importorskip("triton", reason="runs Triton kernels")
    torch.manual_seed(0)
    gpt = GPT(BASE.replace(backend=backend)).to(device).eval()
    idx = tokens(BASE, 2, 9)[0].to(device)
    owner = gpt if name == "lm_head" else gpt.blocks[0]
    setattr(owner, name, Doubled(getattr(owner, name)))
    logits, loss = gpt(idx, idx)
    none, alone = gpt(idx, idx, return_logits=False)
    assert none is None
    torch.testing.assert_close(alone, loss)
    with torch.no_grad():  # what it wraps, doubled for good, is the same model
        wrapped = getattr(owner, name).linear
        wrapped.weight.mul_(2)
        wrapped.bias.mul_(2)
        setattr(owner, name, wrapped)
        torch.testing.assert_close(gpt(idx, idx)[0], logits)


def test_masks_depend_on_the_key_and_only_on_it():
    _, gpt = equivalent_pair(BASE.replace(dropout=0.2))
    idx, targets = tokens(BASE, 2, 9)
    losses = [gpt(idx, targets, make_key(1, step))[1].item() for step in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    torch.manual_seed(7)
    first = gpt(idx, targets)[1].item()
    second = gpt(idx, targets)[1].item()
    torch.manual_seed(7)
    assert gpt(idx, targets)[1].item() == first != second


def test_splitting_the_batch_changes_nothing():
    """Halves of a batch, their `first` set, give the rows the whole batch gives."""
    _, gpt = equivalent_pair(BASE.replace(dropout=0.2, embedding_dropout=True))
    gpt = gpt.double()
    idx, _ = tokens(BASE, 4, 9)
    whole = gpt(idx, key=make_key(3, 5))[0]
    halves = [gpt(idx[b : b + 2], key=make_key(3, 5, first=b))[0] for b in (0, 2)]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-12, atol=1e-12)


def test_eval_turns_dropout_off():
    _, gpt = equivalent_pair(BASE.replace(dropout=0.5))
    idx, _ = tokens(BASE, 2, 9)
    assert torch.equal(gpt.eval()(idx)[0], gpt(idx, key=make_key(9))[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_survive_the_round_trip(shape):
    config, B, T = SHAPES[shape]
    model, gpt = equivalent_pair(config)
    back = gpt.to_naive()
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    again = GPT.from_naive(back).state_dict()
    assert all(torch.equal(again[name], value) for name, value in gpt.state_dict().items())


def test_notebook_parameter_count():
    with torch.device("meta"):
        assert GPT(GPTConfig()).num_parameters() == 10_788_929


def test_initial_distribution_is_the_naive_models():
    """Packing q, k, v leaves each weight's distribution as PyTorch's Linear has it."""
    torch.manual_seed(0)
    gpt, model = GPT(GPTConfig(n_layer=1)), NaiveGPT(GPTConfig(n_layer=1))
    bound = 384**-0.5
    for weight in (gpt.blocks[0].qkv.weight, model.blocks[0].sa.heads[0].key.weight):
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.02
    assert abs(gpt.token_embedding.weight.std() - 1) < 0.02


def test_gpt2_init_scales_residual_projections():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(init="gpt2", n_layer=2))
    assert abs(gpt.blocks[0].qkv.weight.std() / 0.02 - 1) < 0.02
    assert abs(gpt.blocks[1].mlp_out.weight.std() / (0.02 / 2) - 1) < 0.02
    assert not gpt.blocks[0].proj.bias.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_decoding_gives_the_same_hidden_states(shape):
    config, B, T = SHAPES[shape]
    _, gpt = equivalent_pair(config)
    gpt = gpt.double().eval()
    idx, _ = tokens(config, B, T)
    whole = gpt.hidden(idx)
    cache = KVCache(config, B, dtype=torch.float64)
    prompt = T // 2
    parts = [gpt.hidden(idx[:, :prompt], cache=cache)] if prompt else []
    parts += [gpt.hidden(idx[:, t : t + 1], cache=cache) for t in range(prompt, T)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-11)
    assert cache.length == T


def test_too_many_tokens():
    _, gpt = equivalent_pair(BASE)
    with pytest.raises(ValueError, match="at most block_size tokens; got 10, block_size 9"):
        gpt(torch.zeros(1, 10, dtype=torch.long))


@pytest.mark.parametrize("damage", ["scale", "mask", "projection"])
def test_equivalence_sees_damage(damage):
    """What the tests above compare does differ when the model is wrong."""
    model, gpt = equivalent_pair(BASE.replace(dropout=0.2))
    idx, targets = tokens(BASE, 2, 9)
    expected = model(idx, targets, make_key(0))[0]
    torch.testing.assert_close(gpt(idx, targets, make_key(0))[0], expected)
    if damage == "scale":
        gpt.config = BASE.replace(attention_scale="head_size")
    elif damage == "projection":
        gpt.blocks[0].proj.bias.data.zero_()
    damaged = gpt(idx, targets, make_key(0, step=1 if damage == "mask" else 0))[0]
    assert (damaged - expected).abs().max() > 1e-3


def test_a_linear_map_may_keep_its_bias(device):
    """As FSDP has it: the kernels then add no bias of the map before them."""
    pytest.importorskip("triton", reason="the eager path lends none")
    torch.manual_seed(0)
    gpt = GPT(BASE.replace(backend="triton", dropout=0.2)).to(device)
    idx, key = torch.randint(13, (2, 9), device=device), make_key(1, 2, device=device)
    _, lent_loss, lent = run(gpt, idx, idx, key)
    gpt.fuses_biases = False
    _, kept_loss, kept = run(gpt, idx, idx, key)
    torch.testing.assert_close(kept_loss, lent_loss)
    torch.testing.assert_close(kept, lent)
    assert lent["blocks.0.proj.bias"].any()


@pytest.mark.parametrize(("init", "residual"), [("gpt2", 0.05), ("zero", 0.0)])
def test_initial_weights(init, residual):
    """0.1, and projections onto the residual stream that over sqrt(2 * 2), or 0."""
    torch.manual_seed(3)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=8, init=init, init_std=0.1)
    for name, parameter in GPT(config).named_parameters():
        if parameter.ndim == 2:
            expected = residual if name.endswith(("proj.weight", "mlp_out.weight")) else 0.1
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
        elif name.endswith("bias"):
            assert not parameter.any()


@pytest.mark.parametrize("init", ["notebook", "gpt2", "zero"])
def test_the_naive_rung_begins_where_gpt_begins(init):
    """It has an initialisation of its own only where it is built by itself."""
    config, weights = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, init=init), []
    for name in ("gpt", "naive"):
        torch.manual_seed(3)
        model = build_model(name, config)
        weights.append(GPT.from_naive(model) if name == "naive" else model)
    pairs = zip(*(model.parameters() for model in weights), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
