"""transformers' own models on `causal_attention`: the same numbers; masks it lacks are refused."""

import pytest
import torch
import torch.nn.functional as F

from gptcore import attention_interface
from gptcore.config import ConfigError
from gptcore.interop import use_in_transformers
from kernels.verify import compare

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
V, S, C, H, L = 11, 8, 16, 2, 2
IDX = torch.randint(V, (3, S), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def registered():
    use_in_transformers()


def gpt2(**changes):
    options = dict(vocab_size=V, n_positions=S, n_embd=C, n_layer=L, n_head=H)
    config = transformers.GPT2Config(**options, bos_token_id=None, eos_token_id=None, **changes)
    return randomise(transformers.GPT2LMHeadModel(config)).eval()


def randomise(module):
    """Weights large enough for attention to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def attention_run(model):
    """Logits and gradients of one training step."""
    model.zero_grad()
    logits = model(IDX).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), IDX[:, 1:].flatten()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"logits": logits.detach()} | gradients


def test_forward_and_backward():
    model = gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).train()
    runs = {}
    for implementation in ("eager", "gptcore"):
        model.set_attn_implementation(implementation)
        runs[implementation] = attention_run(model)
    model.set_attn_implementation("eager")
    exact = attention_run(model.double())
    for name, reference in exact.items():
        result = compare(name, runs["gptcore"][name], runs["eager"][name], reference)
        assert result.passed, str(result)


def test_is_ours(monkeypatch):
    model = gpt2()
    model.set_attn_implementation("gptcore")
    plain = model(IDX).logits
    monkeypatch.setattr(attention_interface, "causal_attention", lambda q, k, v, **_: v)
    assert (model(IDX).logits - plain).abs().max() > 1e-2


def test_generates_with_its_cache():
    model = gpt2()
    options = dict(max_new_tokens=S - 2, do_sample=False, pad_token_id=0)
    prompt = IDX[:, :2]
    ones = torch.ones_like(prompt)
    texts = []
    for implementation in ("eager", "gptcore"):
        model.set_attn_implementation(implementation)
        texts.append(model.generate(prompt, attention_mask=ones, **options))
    assert torch.equal(*texts)


def test_with_fewer_key_heads():
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=C,
        intermediate_size=C,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=S,
    )
    model = randomise(transformers.LlamaForCausalLM(config)).double().eval()
    logits = []
    for implementation in ("sdpa", "gptcore"):  # their eager softmax is float32 here
        model.set_attn_implementation(implementation)
        logits.append(model(IDX).logits)
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)


def test_drops():
    """Dropout is on in training and follows torch's seed."""
    model = gpt2(attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0).train()
    model.set_attn_implementation("gptcore")
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(model(IDX).logits.sum().item())
    assert losses[0] == losses[2] != losses[1]


def test_masks_are_refused():
    model = gpt2()
    model.set_attn_implementation("gptcore")
    padding = torch.ones_like(IDX)
    model(IDX, attention_mask=padding)
    padding[1, 0] = 0
    with pytest.raises(ValueError, match="gptcore attention: no padding"):
        model(IDX, attention_mask=padding)
    with pytest.raises(ValueError, match="only the plain causal mask"):
        model(IDX, attention_mask=torch.zeros(3, 1, S, S))
    positions = torch.arange(S).remainder(4)[None]  # two packed sequences
    with pytest.raises(ValueError, match="got a custom one"):
        model(IDX, position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match="slots from 0 for 8 tokens at 0"):
        cache = transformers.StaticCache(config=model.config, max_cache_len=2 * S)
        model(IDX, past_key_values=cache)
    q = torch.randn(1, 2, 4, 8)
    attend = attention_interface._attend
    for options, message in (
        ({"softcap": 30.0}, "no softcap"),
        ({"sliding_window": 3}, "no sliding window; got 3 for 4 keys"),
        ({"is_causal": False}, "only the plain causal mask"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(torch.nn.Module(), q, q, q, None, **options)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match="needs transformers 5 or newer; pip install"):
        use_in_transformers()
