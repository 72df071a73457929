"""Generation: the notebook's loop to the token, and what each option does to the distribution."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

from gptcore import decoding, generation
from gptcore.__main__ import _until, main
from gptcore.config import GPTConfig
from gptcore.decoding import Step, plain_step
from gptcore.generation import Sampling, generate, stream, uniforms
from gptcore.model import GPT, MODELS, KVCache, build_model
from gptcore.naive import NaiveGPT
from kernels.rng import SITE_SAMPLE, philox4x32

V = 13
TINY = GPTConfig(vocab_size=V, block_size=8, n_layer=2, n_head=2, n_embd=16, backend="eager")
OPTIONS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_k": {"top_k": 3, "temperature": 0.7},
    "top_p": {"top_p": 0.6},
    "penalty": {"repetition_penalty": 1.5, "temperature": 1.3},
    "all": {"top_k": 5, "top_p": 0.7, "repetition_penalty": 0.8, "temperature": 2.0},
}


@pytest.fixture
def pair():
    """A NaiveGPT and the GPT with its weights, in float64, sharp enough to be told apart."""
    torch.manual_seed(1)
    model = NaiveGPT(TINY).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    return model, GPT.from_naive(model)


ROTARY = {"position": "rotary", "qk_norm": True, "token_shift": True}  # of the fast presets


def sharp_gpt(**changes):
    """In float64, sharp enough to be told apart, each token leaning on the one before it."""
    torch.manual_seed(1)
    gpt = GPT(TINY.replace(**changes)).double().eval()
    with torch.no_grad():
        gpt.lm_head.weight.mul_(5)
        if gpt.shift is not None:
            gpt.shift.normal_()
    return gpt


@pytest.fixture(params=[{}, ROTARY], ids=["learned", "rotary"])
def gpt(request):
    return sharp_gpt(**request.param)


def prompts(B, T, seed=2):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def notebooks_loop(model, idx, n, choose):
    """Crop, forward, choose from the last logits, append."""
    model.eval()
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat((idx, choose(logits[:, -1], idx)), dim=1)
    return idx


@pytest.mark.parametrize("T", [1, 5, 8, 11])
@pytest.mark.parametrize("cache", [True, False])
def test_greedy_text_is_the_notebooks(pair, T, cache):
    """Also past the block size, from either side of it."""
    model, gpt = pair
    expected = notebooks_loop(model, prompts(3, T), 14, lambda x, _: x.argmax(-1, keepdim=True))
    actual = generate(gpt, prompts(3, T), max_new_tokens=14, temperature=0.0, cache=cache)
    assert torch.equal(actual, expected)
    assert len(expected[:, T:].unique()) > 2  # a constant text would prove nothing


@pytest.mark.parametrize("T", [1, 5, 8, 11])
def test_the_cache_changes_no_token(gpt, T):
    """Against whole windows, also past the block size, for every kind of position."""
    expected = notebooks_loop(gpt, prompts(3, T), 14, lambda x, _: x.argmax(-1, keepdim=True))
    for cache in (True, False):
        text = generate(gpt, prompts(3, T), max_new_tokens=14, temperature=0.0, cache=cache)
        assert torch.equal(text, expected)
    assert len(expected[:, T:].unique()) > 2


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cache_ladder_and_stream_agree(pair, options):
    model, gpt = pair
    options = {**options, "max_new_tokens": 14, "seed": 5}
    text = generate(gpt, prompts(4, 3), **options)
    assert text.shape == (4, 17) and text.dtype == torch.int64 and not text.is_inference()
    assert torch.equal(text, generate(gpt, prompts(4, 3), cache=False, **options))
    assert torch.equal(text, generate(model, prompts(4, 3), **options))
    assert torch.equal(text[:, 3:], torch.stack(list(stream(gpt, prompts(4, 3), **options)), 1))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", [(3, 3), (1, 6), (10, 9)], ids=str)
def test_fixed_step_is_the_plain_loop(gpt, options, lengths):
    """The step that a CUDA graph holds, driven by hand; its unused slots are cleared."""
    texts = [prompts(1, T, seed=T)[0] for T in lengths]
    plain = generate(gpt, texts, max_new_tokens=9, seed=5, **options)
    start, total = min(lengths), max(lengths) + 9
    sampling = Sampling(**options)
    step = Step(gpt, 2, total + 3, sampling, start < max(lengths), None, torch.float64)
    step.cache.keys.fill_(math.nan)
    out = torch.zeros(2, total, dtype=torch.int64)
    seen = torch.zeros(2, V, dtype=torch.bool)
    for row, text in zip(out, texts, strict=True):
        row[: len(text)] = text
    seen.scatter_(1, out[:, :start], True)
    used = seen if sampling.repetition_penalty != 1 else None
    for _ in range(2):  # a second text of the same step owes nothing to the first
        length = torch.tensor(lengths)[:, None]
        with torch.inference_mode():
            step.load(gpt, out, uniforms(5, 2, range(total)), length, used, start)
            for t in range(start, total):
                step.advance(gpt, t)
        for row, text in zip(step.out, plain, strict=True):
            assert row[: len(text)].tolist() == text.tolist()


def test_prompts_of_different_lengths_are_what_each_is_alone(pair):
    _, gpt = pair
    texts = [[3], [1, 2, 3, 4], list(range(11)), [7, 7]]
    together = generate(gpt, texts, max_new_tokens=7, temperature=0.0)
    for text, result in zip(texts, together, strict=True):
        alone = generate(gpt, torch.tensor([text]), max_new_tokens=7, temperature=0.0)
        assert result.tolist() == alone[0].tolist()


def test_a_draw_depends_on_seed_prompt_and_position_only(pair):
    _, gpt = pair
    idx = prompts(3, 2)
    whole = generate(gpt, idx, max_new_tokens=12, seed=9)
    assert torch.equal(generate(gpt, idx[:2], max_new_tokens=12, seed=9), whole[:2])
    half = generate(gpt, idx, max_new_tokens=5, seed=9)
    assert torch.equal(generate(gpt, half, max_new_tokens=7, seed=9), whole)
    assert not torch.equal(generate(gpt, idx, max_new_tokens=12, seed=10), whole)
    same = idx[:1].expand(3, -1)
    assert len({tuple(row) for row in generate(gpt, same, max_new_tokens=9, seed=1).tolist()}) == 3
    torch.manual_seed(4)
    first, second = (generate(gpt, idx, max_new_tokens=9) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(generate(gpt, idx, max_new_tokens=9), first)
    assert not torch.equal(first, second)


def test_uniforms_are_the_published_words():
    u = uniforms(77, 3, range(4, 9))
    for b in range(3):
        for i, t in enumerate(range(4, 9)):
            counters = (torch.tensor(n) for n in (0, t, b, SITE_SAMPLE))
            assert u[b, i] == (int(philox4x32(*counters, 77, 0)[0]) >> 8) / 2**24
    many = uniforms(0, 100, range(1000))
    assert 0 <= many.min() and many.max() < 1
    assert abs(many.mean() - 0.5) < 0.003 and abs(many.var() - 1 / 12) < 0.002


def frequencies(logits, **options):
    """How often each token is drawn, u stepping evenly through [0, 1)."""
    n = 20_000
    u = (torch.arange(n) / n)[:, None]
    tokens = Sampling(**options).choose(logits.expand(n, -1), u)
    return torch.bincount(tokens[:, 0], minlength=logits.shape[-1]) / n


LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, -3.0, 1.9])


def only(keep):
    return LOGITS.masked_fill(~torch.tensor([t in keep for t in range(6)]), -math.inf).softmax(-1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LOGITS.softmax(-1)),
        ({"temperature": 0.5}, (2 * LOGITS).softmax(-1)),
        ({"top_k": 1}, only({2})),
        ({"top_k": 3}, only({0, 2, 5})),
        ({"top_k": 99}, LOGITS.softmax(-1)),
        ({"top_p": 0.3}, only({2})),  # probabilities .39 .35 .14 .07 .03 .00
        ({"top_p": 0.5}, only({2, 5})),
        ({"top_p": 0.8}, only({0, 2, 5})),
        ({"top_p": 1.0}, LOGITS.softmax(-1)),
        ({"top_k": 4, "top_p": 0.8}, only({0, 2, 5})),
        ({"vocab_size": 2}, only({0, 1})),
    ],
    ids=str,
)
def test_distribution(options, expected):
    actual = frequencies(LOGITS, **options)
    assert (actual - expected).abs().max() < 2e-4
    assert torch.equal(actual > 0, expected > 2e-4)


def test_repetition_penalty_moves_seen_logits_towards_rarity():
    seen = torch.tensor([True, True, False, False, False, False])
    expected = torch.tensor([0.5, -1.0, 2.0, 0.3, -3.0, 1.9]).softmax(-1)
    n = 20_000
    u = (torch.arange(n) / n)[:, None]
    tokens = Sampling(repetition_penalty=2.0).choose(LOGITS.expand(n, -1), u, seen.expand(n, -1))
    assert (torch.bincount(tokens[:, 0], minlength=6) / n - expected).abs().max() < 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_u_stays_among_the_allowed(dtype):
    """The largest u below 1 must not fall off the end, nor on a token of probability zero."""
    u = torch.tensor([[1 - 2.0**-24], [0.0]])
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, -7:] = logits[:, :3] = -math.inf
    for options in ({}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.5}):
        tokens = Sampling(**options).choose(logits.clone(), u)
        assert logits.gather(1, tokens).isfinite().all(), options


def test_repetition_penalty_counts_every_token_so_far(pair):
    """Prompt and continuation, as a loop that looks at the whole text does."""
    model, gpt = pair

    def choose(logits, idx):
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, idx, True)
        return torch.where(seen, torch.where(logits > 0, logits / 9, logits * 9), logits).argmax(
            -1, keepdim=True
        )

    expected = notebooks_loop(model, prompts(2, 3), 9, choose)
    options = {"max_new_tokens": 9, "temperature": 0.0, "repetition_penalty": 9.0}
    assert torch.equal(generate(gpt, prompts(2, 3), **options), expected)
    assert not torch.equal(
        generate(gpt, prompts(2, 3), **options | {"repetition_penalty": 1.0}), expected
    )


def test_stop(pair):
    _, gpt = pair
    idx = prompts(3, 2)
    options = {"max_new_tokens": 12, "seed": 3}
    whole = generate(gpt, idx, **options)
    stop = whole[1, 6:8].tolist()
    cut = generate(gpt, list(idx), stop=stop, **options)
    for row, text in zip(whole.tolist(), cut, strict=True):
        ends = [t + 2 for t in range(2, 13) if row[t : t + 2] == stop] + [14]
        assert text.tolist() == row[: ends[0]]
    assert len(cut[1]) <= 8
    row, token = whole[0].tolist(), int(whole[0, 4])
    expected = row[: row.index(token, 2) + 1]
    assert generate(gpt, idx[:1], stop=[token], **options).tolist() == [expected]
    assert generate(gpt, idx[:1], stop=[[V + 1], [token]], **options).tolist() == [expected]
    tokens = stream(gpt, idx[:1], stop=[token], **options)
    assert [int(t) for t in tokens] == expected[2:]
    with pytest.raises(ValueError, match="pass them as a list"):
        generate(gpt, idx, stop=stop, **options)


def test_stop_looks_at_generated_tokens_only(pair):
    """Not at what straddles the prompt's end, nor at a longer prompt still being read."""
    _, gpt = pair
    options = {"max_new_tokens": 6, "temperature": 0.0}
    text = generate(gpt, [[4, 4]], **options)[0].tolist()
    stop = [4, text[2]]
    assert stop not in [text[t : t + 2] for t in range(2, 7)]
    assert generate(gpt, [[4, 4]], stop=stop, **options)[0].tolist() == text
    long = [1, 2, 5, 6, 3]
    alone = generate(gpt, [long], **options)[0].tolist()
    assert [5, 6] not in [alone[t : t + 2] for t in range(5, 10)]
    assert generate(gpt, [[1], long], stop=[5, 6], **options)[1].tolist() == alone


def test_a_token_takes_the_model_s_backend(monkeypatch):
    asked = []

    def rotary_qkv(*args, **options):
        asked.append(options.get("backend"))
        return rotate(*args, **options)

    rotate = decoding.rotary_qkv
    monkeypatch.setattr(decoding, "rotary_qkv", rotary_qkv)
    generate(GPT(TINY.replace(position="rotary")), [[1]], max_new_tokens=3)
    assert asked and set(asked) == {"eager"}


class LowRank(torch.nn.Module):
    """A LoRA wrapper, with a `weight` that does not say what it computes."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias
        out, C = linear.weight.shape
        self.down = torch.nn.Parameter(torch.randn(1, C, dtype=torch.float64))
        self.up = torch.nn.Parameter(torch.randn(out, 1, dtype=torch.float64))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)


def changed_by(how, gpt):
    """Make the model compute something else than its parameters say."""
    qkv, head = gpt.blocks[-1].qkv, gpt.lm_head
    if how == "wrapper":
        gpt.blocks[-1].qkv, gpt.lm_head = LowRank(qkv), LowRank(head)
    elif how == "hook":
        head.register_forward_hook(lambda module, args, y: -y)
        qkv.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))
    elif how == "forward":
        qkv.forward = lambda x: -F.linear(x, qkv.weight, qkv.bias)
    else:

        def negated(module, args, y):
            return -y if module is qkv or module is head else None

        return torch.nn.modules.module.register_module_forward_hook(negated)


@pytest.mark.parametrize("how", ["wrapper", "hook", "forward", "global hook"])
def test_what_wraps_a_module_is_heeded(pair, how):
    """With every token, as in the loop that calls the model."""
    gpt, options = pair[1], {"max_new_tokens": 12, "temperature": 0.0}
    before = generate(gpt, prompts(3, 3), **options)
    hook = changed_by(how, gpt)
    try:
        expected = notebooks_loop(gpt, prompts(3, 3), 12, lambda x, _: x.argmax(-1, keepdim=True))
        assert torch.equal(generate(gpt, prompts(3, 3), **options), expected)
    finally:
        if hook is not None:
            hook.remove()
    assert not torch.equal(expected, before)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32"])
def test_tokens_may_be_of_any_dtype_a_tokenizer_gives(pair, dtype):
    _, gpt = pair
    options = {"max_new_tokens": 12, "seed": 3}
    whole = generate(gpt, prompts(1, 2), **options)
    idx = prompts(1, 2).to(getattr(torch, dtype))
    assert torch.equal(generate(gpt, idx, **options), whole)
    assert generate(gpt, [idx[0].numpy()], **options)[0].tolist() == whole[0].tolist()
    stop = whole[0, 4:6].numpy().astype(dtype)
    cut = generate(gpt, prompts(1, 2), stop=stop.tolist(), **options)
    assert 4 <= cut.shape[1] < whole.shape[1]
    for same in (stop, list(stop), [stop, [V + 1]]):
        assert torch.equal(generate(gpt, prompts(1, 2), stop=same, **options), cut)


@pytest.mark.parametrize("shape", [(5,), (1, 2, 3), (2, 0)], ids=str)
def test_a_model_says_what_shape_it_takes(pair, shape):
    with pytest.raises(ValueError, match=rf"^GPT: idx must be \(B, T\).*; got \({shape[0]},"):
        pair[1](torch.zeros(shape, dtype=torch.long))


def test_a_temperature_next_to_0_is_greedy(pair):
    options = {"max_new_tokens": 12, "seed": 1}
    greedy = generate(pair[1], prompts(3, 2), temperature=0.0, **options)
    for temperature in (1e-40, 1e-300):
        for more in ({}, {"top_k": 3}, {"top_p": 0.9}):
            text = generate(pair[1], prompts(3, 2), temperature=temperature, **more, **options)
            assert torch.equal(text, greedy)


@pytest.mark.parametrize("name", MODELS)
def test_every_rung_generates_as_the_notebook_crops(name):
    torch.manual_seed(0)
    model = build_model(name, TINY).double()
    expected = notebooks_loop(model, prompts(2, 3), 12, lambda x, _: x.argmax(-1, keepdim=True))
    assert torch.equal(generate(model, prompts(2, 3), max_new_tokens=12, temperature=0), expected)


def test_mode_and_gradients_are_left_alone(pair):
    _, gpt = pair
    gpt.train()
    tokens = stream(gpt, prompts(1, 2), max_new_tokens=4, seed=0)
    next(tokens)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    tokens.close()
    assert gpt.training
    text = generate(gpt, prompts(2, 2), max_new_tokens=4)
    assert gpt.training
    gpt(text, text)[1].backward()  # generated tokens may be trained on
    gpt.blocks[0].eval()
    generate(gpt, prompts(2, 2), max_new_tokens=1)
    assert gpt.training and gpt.blocks[1].ln_1.training
    assert not gpt.blocks[0].training and not gpt.blocks[0].ln_1.training
    with pytest.raises(ValueError, match="last_only needs dropout off"):
        gpt.next_logits(text)


@pytest.mark.parametrize("T", [1, 4, 8])
def test_cached_logits_are_the_uncached_within_rounding(gpt, T):
    """In float32, by the 2x rule's kind: against float64, near what the whole window gives."""
    gpt, idx = gpt.float(), prompts(3, 8)
    with torch.no_grad():
        cache = KVCache(gpt.config, 3)
        cached = [gpt.next_logits(idx[:, :T], cache)]
        cached += [gpt.next_logits(idx[:, t : t + 1], cache) for t in range(T, 8)]
        whole = gpt(idx)[0][:, T - 1 :]
        exact = gpt.double()(idx)[0][:, T - 1 :]
    error, plain = (torch.stack(cached, 1) - exact).abs().max(), (whole - exact).abs().max()
    assert error <= 2 * plain + 1e-6
    assert torch.equal(torch.stack(cached, 1).argmax(-1), whole.argmax(-1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu", "qkv_bias": True, "attention_scale": "head_size"},
        {"activation": "gelu_erf", "bias": False, "head_bias": False, "tied_head": True},
        {"activation": "relu2", "head_size": 3, "n_head": 3},
        {"position": "rotary"},
        ROTARY,
    ],
    ids=str,
)
def test_plain_step_is_the_models_own(changes):
    gpt = sharp_gpt(**changes)
    idx, caches = prompts(3, 8), [KVCache(gpt.config, 3, dtype=torch.float64) for _ in range(2)]
    step = plain_step(gpt, caches[0])
    with torch.inference_mode():
        for t in range(8):
            expected = gpt.next_logits(idx[:, t : t + 1], caches[1])
            actual = step(idx[:, t : t + 1])
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert caches[0].length == 8


def test_autocast_is_respected(pair, monkeypatch):
    """Keys and values in bfloat16, and the text of the uncached loop under it."""
    gpt, dtypes = pair[1].float(), []
    options = {"max_new_tokens": 12, "temperature": 0.0}

    def cache(*args):
        dtypes.append(args[-1])
        return KVCache(*args)

    monkeypatch.setattr(generation, "KVCache", cache)
    with torch.autocast("cpu", torch.bfloat16):
        cached = generate(gpt, prompts(2, 3), **options)
        assert torch.equal(cached, generate(gpt, prompts(2, 3), cache=False, **options))
    assert dtypes == [torch.bfloat16]


BAD = {
    "generate: max_new_tokens must be a whole number": {"max_new_tokens": -1},
    "generate: temperature must be at least 0": {"temperature": -0.1},
    "generate: temperature must be a number": {"temperature": "hot"},
    "generate: top_k must be at least 1": {"top_k": 0},
    "generate: top_p must be in": {"top_p": 1.5},
    "generate: repetition_penalty must be in": {"repetition_penalty": 0.0},
    "generate: repetition_penalty must be .* got 1e.308": {"repetition_penalty": 1e308},
    "generate: vocab_size must be": {"vocab_size": 0},
    "generate: seed must be in": {"seed": -1},
    "generate: stop must be a sequence of at least one token": {"stop": []},
    r"generate: stop must be .* got '\\n'": {"stop": "\n"},
    r"generate: stop must be .* got \['hello'\]": {"stop": ["hello"]},
    r"generate: idx must be \(B, T\)": {"idx": torch.tensor([1])},
    "generate: idx must be a tensor of integers": {"idx": torch.ones(1, 1)},
    "generate: a prompt must be a sequence of integers": {"idx": [[0.5]]},
    "generate: a prompt needs at least one token": {"idx": torch.zeros(1, 0, dtype=torch.long)},
    r"generate: tokens must be in \[0, 13\), .*got 2 to 13": {"idx": [[2], [13]]},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("function", [generate, stream])
def test_bad_arguments(pair, message, function):
    options = {"idx": torch.zeros(1, 1, dtype=torch.long), "max_new_tokens": 2} | BAD[message]
    with pytest.raises((ValueError, TypeError), match=message):
        function(pair[1], **options)


def test_nothing_to_do(pair):
    _, gpt = pair
    assert torch.equal(generate(gpt, prompts(2, 3), max_new_tokens=0), prompts(2, 3))
    empty = torch.zeros(0, 3, dtype=torch.long)
    assert generate(gpt, empty, max_new_tokens=4).shape == (0, 7)
    assert generate(gpt, [], max_new_tokens=4) == []


@pytest.mark.parametrize("damage", ["position", "cache", "crop"])
def test_the_comparison_sees_damage(pair, damage, monkeypatch):
    """Greedy text does differ from the notebook's when the machinery is wrong."""
    model, gpt = pair
    if damage == "position":
        rows = KVCache.rows
        monkeypatch.setattr(KVCache, "rows", lambda self, w, T: rows(self, w.roll(-1, 0), T))
    elif damage == "cache":
        monkeypatch.setattr(KVCache, "append", lambda self, layer, k, v: (k, v))
    else:
        gpt.config = TINY.replace(block_size=7)
    expected = notebooks_loop(model, prompts(3, 2), 14, lambda x, _: x.argmax(-1, keepdim=True))
    actual = generate(gpt, prompts(3, 2), max_new_tokens=14, temperature=0.0)
    assert not torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_captured_text_is_the_plain_loops(gpt, options):
    """Through both graphs, twice, the second call on the kept step."""
    gpt = gpt.float().cuda()
    gpt.config = gpt.config.replace(backend="auto")
    for seed in (1, 2):
        texts = [[1, 2, 3], [4], list(range(6))]
        options = {**options, "max_new_tokens": 12, "seed": seed}
        captured = generate(gpt, texts, **options)
        plain = generate(gpt, texts, cuda_graph=False, **options)
        assert [t.tolist() for t in captured] == [t.tolist() for t in plain]
    assert gpt in decoding._kept


@pytest.mark.gpu
def test_a_kept_step_follows_the_weights():
    """Training in place between two calls changes the second text."""
    torch.manual_seed(0)
    gpt = GPT(TINY.replace(backend="auto")).cuda()
    idx = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    generate(gpt, idx, max_new_tokens=7, temperature=0.0)
    with torch.no_grad():
        gpt.lm_head.bias[5] += 1e4
    assert (generate(gpt, idx, max_new_tokens=7, temperature=0.0)[0, 1:] == 5).all()


def test_a_kept_step_goes_when_a_buffer_has_moved(monkeypatch):
    """As rotary angles do, which `.to` computes afresh: a graph would read what is freed."""
    monkeypatch.setattr(decoding, "CapturedStep", Step)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    gpt = GPT(TINY.replace(position="rotary"))
    arguments = (gpt, 1, 8, Sampling(), False, torch.device("cpu"), torch.float32)
    key, first = decoding.take_step(*arguments)
    decoding.give_back(gpt, key, first)
    key, again = decoding.take_step(*arguments)
    assert again is first
    decoding.give_back(gpt, key, first)
    pointers = [parameter.data_ptr() for parameter in gpt.parameters()]
    gpt.to("cpu")
    assert [parameter.data_ptr() for parameter in gpt.parameters()] == pointers
    assert decoding.take_step(*arguments)[1] is not first


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_text_that_cannot_be_captured_comes_eagerly(pair, error, monkeypatch):
    """Unless memory is short, which the plain loop would be, too."""

    def take_step(*arguments):
        raise error("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(decoding, "take_step", take_step)
    runs = [
        generation._Run(pair[1], [[1, 2], [3]], 9, Sampling(), None, 5, True, True)
        for _ in range(2)
    ]
    runs[0].captured = True
    if error is not RuntimeError:
        with pytest.raises(error):
            list(runs[0])
        return
    with pytest.warns(UserWarning, match="because the capture failed: operation not permitted$"):
        captured = list(runs[0])
    assert captured == list(runs[1]) == list(range(1, 11))
    assert torch.equal(runs[0].out, runs[1].out)


@pytest.mark.parametrize(("texts", "new"), [([[1], [2]], 0), ([], 5)], ids=["tokens", "prompts"])
def test_nothing_is_captured_for_no(texts, new, monkeypatch):
    gpt = GPT(TINY.replace(block_size=1))
    run = generation._Run(gpt, texts, new, Sampling(), None, 0, True, True)
    run.captured = True
    monkeypatch.setattr(decoding, "take_step", lambda *args: pytest.fail("captured"))
    assert list(run) == []


def test_stop_sequences_move_to_the_device_once(pair, monkeypatch):
    """Not with every token, which would wait for the copy."""
    moves, to = [], torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *a, **k: moves.append(self) or to(self, *a, **k)
    )
    moved = []
    for new in (2, 6):
        moves.clear()
        generate(pair[1], prompts(1, 2), max_new_tokens=new, seed=1, stop=[[V + 1], [V + 2]])
        moved.append(len(moves))
    assert moved[0] == moved[1] >= 2


def test_softmax_of_bfloat16_logits_is_taken_in_float32():
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = F.softmax(logits.float(), -1)[0]
    assert (frequencies(logits) - expected).abs().max() < 2e-4


def test_command_line_options(trained_run, capsys):
    """--num_samples, --stop and --repetition_penalty of `python -m gptcore sample`."""

    def text(*flags):
        argv = ["sample", str(trained_run), "--start=the", "--max_new_tokens=60", "--seed=3"]
        assert main([*argv, *flags]) == 0
        return capsys.readouterr().out

    whole = text()
    first, second = text("--num_samples=2").split("---------------\n")
    assert first == whole != second and len(second) == len(whole)
    stop = whole[20:22]
    assert text(f"--stop={stop}") == whole[: whole.index(stop, 3) + 2] + "\n"
    assert text("--repetition_penalty=5") != whole
    for flag in ("--num_samples=0", "--repetition_penalty=0", "--repetition_penalty=nan"):
        assert main(["sample", str(trained_run), flag]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_until_cuts_after_the_first_stop():
    def cut(stop, *pieces):
        return "".join(_until(stop, pieces))

    assert cut("ab", "x", "a", "b", "c") == "xab"
    assert cut("ab", "xa", "bcab") == "xab"
    assert cut("aab", "aa", "a", "b", "b") == "aaab"
    assert cut("zz", "a", "b") == cut(None, "a", "b") == cut("", "a", "b") == "ab"
