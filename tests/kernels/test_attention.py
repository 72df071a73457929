"""Causal attention, both backends, against the equation in float64."""

import contextlib
import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

from kernels import (
    attention,
    attention_eager,
    attention_kernels,
    causal_attention,
    causal_attention_qkv,
    rotary_qkv,
    rotary_table,
)
from kernels.backend import recording
from kernels.checks import hold_rule
from kernels.problems import attention_keep, plain_attention
from kernels.rng import dropout_keep_mask, dropout_scale, make_key

BACKENDS = ("eager", "triton")
SITE = 20


@pytest.fixture(autouse=True)
def _triton_or_skip(request):
    parameters = getattr(request.node, "callspec", None)
    if parameters and parameters.params.get("backend") == "triton":
        pytest.importorskip("triton", reason="needs triton")


@contextlib.contextmanager
def poisoned():
    """Fresh memory holds NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def draw(shape, device, dtype=torch.float32, seed=0):
    """q, k, v, do of (B, H, Tq, Tk, D), standard normal."""
    B, H, Tq, Tk, D = shape
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(B, H, T, D, generator=generator).to(device, dtype) for T in (Tq, Tk, Tk, Tq)
    ]


def gradients_of(function, tensors, do):
    """{"o", "dq", "dk", "dv"} of function(q, k, v)."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    o = function(*tensors)
    return dict(
        zip(
            ("o", "dq", "dk", "dv"),
            (o.detach(), *torch.autograd.grad(o, tensors, do)),
            strict=True,
        )
    )


def packed(q, k, v, **options):
    """`causal_attention` through the packed form."""
    qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)
    return causal_attention_qkv(qkv, **options).transpose(1, 2)


def comparisons(tensors, do, **options):
    """The 2x rule for o, dq, dk, dv."""
    return hold_rule(measure(tensors, do, **options))


def reference(q, k, v, *, scale=None, dropout_p=0.0, key=None, site=0, backend=None):
    """The equation, written plainly, in the dtype of the inputs; `backend` is not asked."""
    (B, H, Tq, D), Tk = q.shape, k.shape[2]
    keep = attention_keep(key, B, H, Tq, Tk, dropout_p, site) if dropout_p else None
    scale = D**-0.5 if scale is None else scale
    return plain_attention(q, k, v, scale, keep, dropout_scale(dropout_p))


def measure(tensors, do, function=causal_attention, **options):
    """o, dq, dk, dv: fused, plain, and in float64."""

    def plain(q, k, v):
        return reference(q, k, v, **options)

    with poisoned():
        actual = gradients_of(lambda *x: function(*x, **options), tensors, do)
    in_dtype = gradients_of(plain, tensors, do)
    exact = gradients_of(plain, [x.double() for x in tensors], do.double())
    return actual, in_dtype, exact


def check(tensors, do, **options):
    for comparison in hold_rule(measure(tensors, do, **options)):
        assert comparison.passed, str(comparison)


def check_shape(shape, device, dtype=torch.float32, seed=0, logits=1, **options):
    """As the certificate does: a breach must last over several draws."""
    draws = (draw(shape, device, dtype, seed=seed + 100 * i) for i in range(16))
    draws = ((logits * q, k, v, do) for q, k, v, do in draws)
    first, *others = ((tensors, do) for *tensors, do in draws)
    more = (measure(*other, **options) for other in others)
    for comparison in hold_rule(measure(*first, **options), more):
        assert comparison.passed, str(comparison)


def name(shape):
    return "B{}-H{}-T{}x{}-D{}".format(*shape)


SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 16, 16, 8),
    (1, 2, 31, 31, 16),
    (2, 2, 35, 35, 85),
    (1, 2, 32, 48, 24),
    (1, 2, 17, 50, 5),
    (3, 2, 4, 40, 64),
    (1, 1, 18, 18, 256),
    (1, 1, 1, 77, 64),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids="p{}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_2x_rule(backend, shape, dropout_p, device):
    key = make_key(5, 9, device=device)
    options = {"dropout_p": dropout_p, "key": key, "site": SITE, "backend": backend}
    check_shape(shape, device, seed=1, **options)  # one that takes few draws


@pytest.mark.parametrize("Tq", [1, 5, 37])
@pytest.mark.parametrize("small", [0, 1 << 20])
def test_without_gradients_the_output_is_the_same(small, Tq, device, monkeypatch):
    """SDPA, which then serves on every device and at every length, aligns top-left by itself."""
    monkeypatch.setattr(attention, "_SMALL", small)
    *tensors, _ = draw((2, 3, Tq, 37, 16), device)
    expected = plain_attention(*(x.double() for x in tensors), 0.25, None, 1.0)
    with torch.no_grad():
        for function in (causal_attention, packed) if Tq == 37 else (causal_attention,):
            o = function(*tensors, backend="eager")
            torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_2x_rule_half(backend, dtype, device):
    *tensors, do = draw((2, 2, 37, 37, 32), device, dtype)
    key = make_key(5, 9, 3, device=device)
    check(tensors, do, dropout_p=0.2, key=key, site=SITE, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_the_saved_logsumexp_is_float32(dtype, device):
    """Scores of 50 are rounded as coarsely by plain PyTorch, so that the 2x rule would not tell."""
    pytest.importorskip("triton", reason="needs triton")
    q, k, v, _ = draw((1, 2, 40, 40, 16), device, dtype)
    scores = (16 * q.double() @ k.double().mT / 4).masked_fill(
        torch.ones(40, 40, dtype=torch.bool, device=device).triu(1), float("-inf")
    )
    lse = attention_kernels.forward(16 * q, k, v, torch.empty_like(q), None, 0.25, 0.0, SITE)
    assert lse.dtype == torch.float32 and 40 < scores.max() < 80
    expected = scores.logsumexp(-1) * attention_kernels.LOG2E
    torch.testing.assert_close(lse[0].double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_2x_rule_random_shapes(backend, seed, device):
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    Tq = integer(1, 50)
    shape = integer(1, 2), integer(1, 3), Tq, Tq + integer(0, 20), integer(1, 96)
    scale = -0.3 if seed == 0 else integer(1, 9) / 10
    key = make_key(seed, 1, device=device)
    options = {"scale": scale, "dropout_p": integer(1, 8) / 10, "key": key, "site": SITE}
    check_shape(shape, device, seed=seed, backend=backend, **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids="p{}".format)
@pytest.mark.parametrize("backend", BACKENDS)
def test_2x_rule_packed(backend, dropout_p, device):
    *tensors, do = draw((2, 3, 40, 40, 24), device)
    key = make_key(1, 2, 3, device=device)
    options = {"dropout_p": dropout_p, "key": key, "site": SITE, "backend": backend}
    check(tensors, do, function=packed, **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids="p{}".format)
@pytest.mark.parametrize("Tq, Tk", [(50, 81), (96, 96), (1, 70)])
def test_one_loop_takes_what_two_take(Tq, Tk, dropout_p, device):
    """Bit for bit: of tiles below the diagonal nothing is hidden."""
    pytest.importorskip("triton", reason="needs triton")
    q, k, v, do = draw((2, 2, Tq, Tk, 16), device, torch.float16)
    options = make_key(3, 4, device=device), 0.3, dropout_p, SITE
    results = []
    for one_loop in (False, True):
        o, dq = torch.full_like(q, float("nan")), torch.full_like(q, float("nan"))
        plan = attention_kernels.Plan(16, 32, 4, 1, one_loop=one_loop)
        lse = attention_kernels.forward(q, k, v, o, *options, blocks=plan)
        gradients = dq, torch.empty_like(k), torch.empty_like(v)
        attention_kernels.backward(do, q, k, v, o, lse, *gradients, *options, dq_blocks=plan)
        results.append((o, lse, dq))
    assert all(map(torch.equal, *results)) and all(x.isfinite().all() for x in results[0])


def test_a_plans_registers_reach_the_compiler():
    """Few keys with dropout on sm_90: four programs a multiprocessor, and three."""
    pytest.importorskip("triton", reason="needs triton")
    qkv = torch.empty(2, 256, 3, 2, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key, caps = torch.empty(2, dtype=torch.int64, device="meta"), {}
    with recording(lambda kernel, _, __, kw: caps.update({kernel.__name__: kw}), "sm_90"):
        o = causal_attention_qkv(qkv, dropout_p=0.2, key=key, backend="triton")
        o.backward(torch.empty_like(o))
    forward, dq, dkdv = (caps[f"_attention_{name}_kernel"] for name in ("forward", "dq", "dkdv"))
    assert forward["maxnreg"] == 128 and forward["ONE_LOOP"]
    assert dq["maxnreg"] == 168 and "maxnreg" not in dkdv


@pytest.mark.parametrize("dropout_p", [0.0, 0.4], ids="p{}".format)
@pytest.mark.parametrize("elements", [1, 500, 3000, None])
def test_eager_blocks(elements, dropout_p, device, monkeypatch):
    """Every way of cutting planes and queries, one plane at a time included."""
    monkeypatch.setattr(attention, "_SMALL", 0)
    monkeypatch.setattr(attention_eager, "EARLY_KEYS", 99)
    if elements:
        monkeypatch.setattr(attention_eager, "_BLOCK_QUERIES", 16)
        monkeypatch.setattr(attention_eager, "BLOCK_ELEMENTS", elements)
    *tensors, do = draw((3, 4, 37, 41, 8), device)
    key = make_key(1, 2, 3, device=device)
    check(tensors, do, dropout_p=dropout_p, key=key, site=SITE, backend="eager")
    check(tensors[:1] + [x[:, :, :37] for x in tensors[1:]], do, function=packed, backend="eager")


@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids="p{}".format)
@pytest.mark.parametrize("in_hardware", [True, False])
def test_eager_bfloat16(in_hardware, dropout_p, monkeypatch):
    """Products in bfloat16 where the CPU has them, whose many blocks still add up in float32."""
    monkeypatch.setattr(attention, "_SMALL", 0)
    monkeypatch.setattr(attention_eager, "_BLOCK_QUERIES", 3)
    monkeypatch.setattr(attention_eager, "multiplies_bfloat16", lambda: in_hardware)
    scratch = attention_eager._Scratch(torch.empty(0, dtype=torch.bfloat16))
    assert scratch.wide == torch.float32
    assert scratch.dtype == (torch.bfloat16 if in_hardware else torch.float32)
    key = make_key(1, 2, 3)
    options = {"dropout_p": dropout_p, "key": key, "site": SITE, "backend": "eager", "scale": 0.02}
    for function, Tk in ((packed, 700), (causal_attention, 711)):
        shape = 1, 2, 700, Tk, 16
        check_shape(shape, "cpu", torch.bfloat16, function=function, **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids="p{}".format)
@pytest.mark.parametrize("in_hardware", [True, False])
def test_eager_bfloat16_in_one_piece(in_hardware, dropout_p, monkeypatch):
    """Packed, more of it where the CPU has the products; else in float32."""
    monkeypatch.setattr(attention_eager, "multiplies_bfloat16", lambda: in_hardware)
    monkeypatch.setattr(attention, "_SMALL", 2 * 3 * 90 * 90 // 8)
    pieces, small = [], attention_eager.SmallAttention.apply

    def counted(qkv, *options):
        pieces.append(qkv.shape[1])
        return small(qkv, *options)

    monkeypatch.setattr(attention_eager.SmallAttention, "apply", counted)
    options = {"dropout_p": dropout_p, "key": make_key(1, 2, 3), "site": SITE, "backend": "eager"}
    for T in (25, 90, 91):
        shape = 2, 3, T, T, 24
        check_shape(shape, "cpu", torch.bfloat16, function=packed, scale=0.3, **options)
    assert set(pieces) == ({25, 90} if in_hardware else {25})
    pieces.clear()
    qkv, table = torch.randn(2, 90, 3, 3, 24, dtype=torch.bfloat16), rotary_table(90, 24)
    rotated = causal_attention_qkv(qkv, angles=table, **options)
    expected = causal_attention_qkv(rotary_qkv(qkv, table), **options)
    assert torch.equal(rotated, expected) and pieces == ([90, 90] if in_hardware else [])
    monkeypatch.setattr(attention, "_HALF_KEYS", 89)
    pieces.clear()
    check_shape((2, 3, 90, 90, 24), "cpu", torch.bfloat16, function=packed, **options)
    assert not pieces


@pytest.mark.parametrize("scale", [None, -0.3])
@pytest.mark.parametrize("Tq, Tk, D", [(70, 70, 85), (64, 64, 64), (33, 97, 24), (40, 45, 24)])
@pytest.mark.parametrize("function", [causal_attention, packed], ids=["split", "packed"])
def test_eager_training_by_flash(function, Tq, Tk, D, scale, monkeypatch):
    """Probabilities of all sizes, where the scale must be rounded once."""
    monkeypatch.setattr(attention, "_SMALL", 0)
    calls, flash = [], attention_eager.FlashAttention.apply

    def counted(*args):
        calls.append(args)
        return flash(*args)

    monkeypatch.setattr(attention_eager.FlashAttention, "apply", counted)
    shape = 4, 2, Tq, Tq if function is packed else Tk, D
    check_shape(shape, "cpu", function=function, scale=scale, backend="eager", logits=4)
    assert calls
    *tensors, do = draw(shape, "cpu")
    dq = gradients_of(lambda *x: function(*x, scale=scale), tensors, do)["dq"]
    assert (not dq[:, :, 0].any()) == (Tq == shape[3])
    columns = [x.mT.contiguous().mT for x in tensors]
    assert torch.equal(gradients_of(lambda *x: function(*x, scale=scale), columns, do)["dq"], dq)


def test_few_queries_do_not_train_by_flash():
    """Compiled ones neither, whose early gradients are SDPA's."""
    for T, taken in ((32, False), (33, True)):
        q, k, v, _ = (x.requires_grad_() for x in draw((1, 1, T, T, 8), "cpu"))
        assert attention._sdpa_serves(q, k, v, 0.0) == taken


@pytest.mark.parametrize("D, seed", [(85, 13), (128, 6)])
def test_queries_that_see_few_keys_train_exactly(D, seed):
    """With the first query alone made anew, the worst of dq has 2.2 times the plain error."""
    q, k, v, do = draw((4, 6, 256, 256, D), "cpu", seed=seed)
    assert q.shape[:2].numel() * 256 * 256 > attention._SMALL
    actual, in_dtype, exact = measure([q, k, v], do)
    fused, plain = ((x["dq"] - exact["dq"]).abs().max() for x in (actual, in_dtype))
    assert fused < 2 * plain


@pytest.mark.parametrize("scale", [0.0, -0.2, 0.5])
@pytest.mark.parametrize("function", [causal_attention, packed], ids=["split", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_any_sign(backend, function, scale, device):
    *tensors, do = draw((1, 2, 20, 20, 8), device)
    check(tensors, do, function=function, scale=scale, backend=backend)


# 24: rows of eights, but for their distances; 70: odd rows, loaded in chunks of 32
@pytest.mark.parametrize("D", [16, 24, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend, D, device):
    q, k, v, _ = draw((2, 3, 21, 35, D), device, torch.float32 if D == 16 else torch.float16)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    if D == 24:
        q = torch.cat([q, q[..., :1]], dim=-1)[..., :D]
    else:
        k = k.mT.contiguous().mT
        v = torch.cat([v, v], dim=-1)[..., ::2]
    do = torch.ones((), device=device, dtype=q.dtype).expand(q.shape)
    key = make_key(1, 2, device=device)
    check([q, k, v], do, dropout_p=0.2, key=key, site=SITE, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logit(backend, device):
    *tensors, do = draw((1, 1, 40, 40, 16), device)
    tensors[0][0, 0, 7] *= 1e4
    tensors[0][0, 0, 8] *= -1e4
    check(tensors, do, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, device):
    qkv = torch.empty(0, 8, 3, 2, 16, device=device, requires_grad=True)
    o = causal_attention_qkv(qkv, dropout_p=0.1, backend=backend)
    o.sum().backward()
    assert o.shape == (0, 8, 2, 16) and qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids="p{}".format)
@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_to_the_bit(backend, dropout_p, device):
    """What token 21 is changes nothing before it."""
    q, k, v, _ = draw((1, 2, 40, 40, 16), device)
    options = {"dropout_p": dropout_p, "key": make_key(1, 2, device=device), "backend": backend}
    before = causal_attention(q, k, v, **options)
    for x in (q, k, v):
        x[:, :, 21] += 100
    after = causal_attention(q, k, v, **options)
    assert torch.equal(before[:, :, :21], after[:, :, :21])
    assert not torch.equal(before[:, :, 21:], after[:, :, 21:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_matches_the_whole(backend, device):
    q, k, v, _ = draw((2, 2, 40, 40, 16), device)
    key = make_key(1, 2, device=device)
    options = {"dropout_p": 0.3, "key": key, "site": SITE, "backend": backend}
    whole = causal_attention(q, k, v, **options)
    for last in (1, 3):
        tail = causal_attention(q[:, :, -last:], k, v, **options)
        torch.testing.assert_close(tail, whole[:, :, -last:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("words", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_is_dropout_keep_mask(backend, words, device):
    """With v the identity, o is the dropped softmax itself."""
    T, p = 40, 0.3
    q, k, _, _ = draw((2, 2, T, T, T), device)
    v = torch.eye(T, device=device).expand(2, 2, T, T)
    key = make_key(2**32 - 1, 2**31, 5, device=device)[:words]
    o = causal_attention(q, k, v, dropout_p=p, key=key, site=SITE, backend=backend)
    planes = range(10, 14) if words == 3 else range(4)
    keep = dropout_keep_mask(key, SITE, planes, T, T, p).view(2, 2, T, T)
    seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    assert torch.equal(o != 0, keep & seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_split_draws_the_same_masks(backend, device):
    q, k, v, _ = draw((4, 3, 20, 20, 8), device)

    def run(part, first):
        key = make_key(1, 2, first, device=device)
        options = {"dropout_p": 0.3, "key": key, "site": SITE, "backend": backend}
        return causal_attention(q[part], k[part], v[part], **options)

    whole = run(slice(None), 0)
    parts = [run(slice(i, i + 2), i) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reruns_are_bit_identical(backend, device):
    *tensors, do = draw((2, 2, 40, 40, 16), device)
    options = {"dropout_p": 0.2, "key": make_key(1, 2, device=device), "backend": backend}
    first, second = (
        gradients_of(lambda *x: causal_attention(*x, **options), tensors, do) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_manual_seed_governs_calls_without_a_key(device):
    q, k, v, _ = draw((1, 1, 16, 16, 8), device)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(causal_attention(q, k, v, dropout_p=0.5))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dropout_p", [0.0, 0.4], ids="p{}".format)
@pytest.mark.parametrize("Tq", [1, 3, 5])
def test_gradcheck(Tq, dropout_p, monkeypatch):
    monkeypatch.setattr(attention, "_SMALL", 0)
    tensors = [x.double().requires_grad_() for x in draw((2, 2, Tq, 5, 3), "cpu")[:3]]
    options = {"dropout_p": dropout_p, "key": make_key(3, 4), "backend": "eager"}
    assert torch.autograd.gradcheck(lambda *x: causal_attention(*x, **options), tensors)


@pytest.mark.parametrize("axis", [0, 2], ids=["batch", "time"])
def test_offsets_past_32_bits(device, far_apart, axis):
    count, place = far_apart
    B, T = (count, 2) if axis == 0 else (1, count)
    near = draw((B, 1, T, T, 16), device, torch.float16)  # q, k, v, do
    far = [place(x, number, axis) for number, x in enumerate(near)]

    def results(q, k, v, do):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = causal_attention(*leaves, backend="triton")
        return o, *torch.autograd.grad(o, leaves, do)

    assert all(map(torch.equal, results(*far), results(*near)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_projection_is_not_copied(backend, device, monkeypatch):
    """Its heads and their gradients are views, of which a CPU's threads gather a chunk each."""
    monkeypatch.setattr(attention, "_SMALL", 0)
    engine, calls = attention._ENGINES[backend], []

    def watched(run):
        return lambda *args: calls.append(args) or run(*args)

    for run in (engine.forward, engine.backward):
        monkeypatch.setattr(engine, run.__name__, watched(run))
    qkv = torch.randn(1, 9, 3, 2, 8, device=device, requires_grad=True)
    o = causal_attention_qkv(qkv, dropout_p=0.2, backend=backend)
    (dqkv,) = torch.autograd.grad(o.sum(), qkv)
    (q, k, v, o_heads, *_), (_, *again, _, dq, dk, dv) = calls[0], calls[1][:9]
    for whole, parts in (
        (qkv, (q, k, v, *again[:3])),
        (o, (o_heads, again[3])),
        (dqkv, (dq, dk, dv)),
    ):
        assert {x.untyped_storage().data_ptr() for x in (whole, *parts)} == {
            whole.untyped_storage().data_ptr()
        }


@pytest.mark.parametrize("D, padding, known", [(24, 0, True), (24, 1, False), (64, 0, False)])
def test_the_compiler_is_told_of_rows_of_eights(D, padding, known):
    """What Triton sees by itself, multiples of 16, and what is not true it is not told."""
    launches = []
    qkv = torch.empty(2, 40, 3, 2, D + padding, device="meta", dtype=torch.bfloat16)
    qkv = qkv.requires_grad_()[..., :D]
    with recording(lambda *launch: launches.append(launch), "sm_90"):
        o = causal_attention_qkv(qkv)
        torch.autograd.grad(o, qkv, torch.empty_like(o))
    assert [launch[3]["EIGHTS"] for launch in launches] == 3 * [known]


# Bindings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, device):
    q, k, v, do = draw((2, 2, 9, 12, 8), device)
    qkv = torch.randn(2, 9, 3, 2, 8, device=device, requires_grad=True)
    key = make_key(1, 2, device=device)
    arguments = key, 0.3, 0.2, SITE, backend
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(attention._forward_op, (*inputs, *arguments))
    torch.library.opcheck(attention._forward_qkv_op, (qkv, *arguments))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids="p{}".format)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_and_func_grad(backend, dropout_p, device):
    key = make_key(1, 2, device=device)
    options = {"dropout_p": dropout_p, "key": key, "site": SITE, "backend": backend}

    def split(qkv):
        return causal_attention(*qkv.permute(2, 0, 3, 1, 4), **options).square().sum()

    def whole(qkv):
        return causal_attention_qkv(qkv, **options).square().sum()

    for function in (split, whole):
        qkv = torch.randn(2, 9, 3, 2, 8, device=device, requires_grad=True)
        (expected,) = torch.autograd.grad(function(qkv), qkv)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        (actual,) = torch.autograd.grad(compiled(qkv), qkv)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.func.grad(function)(qkv.detach()), expected)


@pytest.mark.parametrize("function", [causal_attention, packed], ids=["split", "packed"])
def test_compile_in_bfloat16(function, device):
    """Whose way depends on the CPU, which the compiler may not ask."""
    tensors = [x.bfloat16().requires_grad_() for x in draw((2, 2, 9, 9, 8), device)[:3]]

    def loss(q, k, v):
        return function(q, k, v, dropout_p=0.2, key=make_key(1, 2, device=device)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, loss))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=3e-2, rtol=3e-2)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, qkv, key):
            return causal_attention_qkv(qkv, dropout_p=0.2, key=key)

    arguments = torch.randn(2, 9, 3, 2, 8), make_key(1, 2)
    exported = torch.export.export(Module(), arguments).module()
    torch.testing.assert_close(exported(*arguments), Module()(*arguments))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids="p{}".format)
@pytest.mark.parametrize("small", [0, 1 << 20])
@pytest.mark.parametrize("function", [causal_attention, packed], ids=["split", "packed"])
def test_autocast(function, small, dropout_p, device, monkeypatch):
    """The inputs are rounded and nothing else, also where the backward is under it."""
    monkeypatch.setattr(attention, "_SMALL", small)
    monkeypatch.setattr(attention_eager, "multiplies_bfloat16", lambda: False)
    key = make_key(1, 2, device=device)
    *tensors, do = (x.bfloat16().float() for x in draw((1, 2, 9, 9, 8), device))
    half, do = [x.bfloat16() for x in tensors], do.bfloat16()

    def run(*tensors):
        return function(*tensors, dropout_p=dropout_p, key=key)

    expected = gradients_of(run, half, do)
    with torch.autocast(device.type, torch.bfloat16):
        actual = gradients_of(run, tensors, do)
    assert [x.dtype for x in actual.values()] == [torch.bfloat16, *[torch.float32] * 3]
    assert all(torch.equal(actual[name], expected[name].to(actual[name])) for name in actual)


def test_autocast_of_the_backward_alone():
    """SDPA's kernel keeps float32; so do the gradients made anew."""
    q, k, v, do = (x.requires_grad_() for x in draw((8, 2, 300, 300, 16), "cpu"))
    o = causal_attention(q, k, v)
    expected = torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(o, (q, k, v), do)
    assert "FlashAttention" in o.grad_fn.name() and all(map(torch.equal, actual, expected))


NO_SECOND = "second derivatives are not implemented"


@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids="p{}".format)
@pytest.mark.parametrize("T", [4, 40], ids="T{}".format)  # from 33 keys on SDPA's kernel serves
@pytest.mark.parametrize("small", [0, 1 << 20])
def test_second_derivative_is_refused(small, T, dropout_p, device, monkeypatch):
    """Also where none flows through the incoming gradient, which torch would take for 0."""
    monkeypatch.setattr(attention, "_SMALL", small)
    tensors = torch.randn(3, 1, 1, T, 8, device=device, requires_grad=True)
    for function in (packed, causal_attention):
        loss = function(*tensors, dropout_p=dropout_p).sum()
        if device.type == "cpu" and small and function is causal_attention:
            loss.backward(create_graph=True)  # the equation, written plainly, has one
            continue
        with pytest.raises(RuntimeError, match=f"causal_attention.*: {NO_SECOND}"):
            loss.backward(create_graph=True)


def test_second_derivative_under_torch_func_is_refused():
    q, k, v = torch.randn(3, 1, 1, 4, 8)

    def loss(q):
        return causal_attention(q, k, v).sum()

    for second in (torch.func.jacrev, torch.func.grad):
        with pytest.raises(RuntimeError, match=f"causal_attention: {NO_SECOND}"):
            second(lambda q: torch.func.grad(loss)(q).sum())(q)


def test_the_compiler_takes_any_scale():
    q = torch.randn(1, 2, 9, 8)
    compiled = torch.compile(
        lambda q, scale: causal_attention(q, q, q, scale=scale), fullgraph=True, backend="aot_eager"
    )
    for scale in (0.3, 0.4, 0.5):
        torch.testing.assert_close(compiled(q, scale), causal_attention(q, q, q, scale=scale))


@pytest.mark.parametrize("capturing", [True, False])
def test_a_captured_mask_is_the_graphs_own(capturing, monkeypatch):
    """One of the cache may be freed, for another, before the graph is replayed."""
    made = []

    def cached(*arguments):
        made.append("cached")

    cached.__wrapped__ = lambda *arguments: made.append(arguments)
    monkeypatch.setattr(attention_eager, "_above_diagonal", cached)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    arguments = 4, 5, torch.float32, torch.device("cuda")
    attention_eager.above_diagonal(*arguments)
    assert made == [arguments if capturing else "cached"]


def test_masks_made_for_one_call_fit_the_next(monkeypatch):
    """What inference or fake tensors left behind is not taken for training."""
    monkeypatch.setattr(attention, "_SMALL", 0)
    q, k = torch.randn(1, 1, 37, 8, requires_grad=True), torch.randn(1, 1, 41, 8)

    def gradient(q, k):
        return torch.autograd.grad(causal_attention(q, k, k).square().sum(), q)[0]

    attention_eager._above_diagonal.cache_clear()
    expected = gradient(q, k)
    for mode in (torch.inference_mode, FakeTensorMode):
        attention_eager._above_diagonal.cache_clear()
        with mode():
            attention_eager.above_diagonal(37, 41, q.dtype, q.device)
        assert torch.equal(gradient(q, k), expected)
    with FakeTensorMode():
        fake = torch.randn(1, 1, 37, 8, requires_grad=True), torch.randn(1, 1, 41, 8)
        assert gradient(*fake).shape == expected.shape


def test_a_large_mask_is_not_kept():
    before = attention_eager._above_diagonal.cache_info().currsize
    attention_eager.above_diagonal(1 << 10, 1 << 11, torch.float32, torch.device("cpu"))
    assert attention_eager._above_diagonal.cache_info().currsize == before


# Damage: each must turn the 2x rule red ---------------------------------------------------------

DAMAGES = {
    "mask off by one": ("Tk", lambda value: value - 1),
    "scale": ("qk_scale", lambda value: value * 1.001),
    "keep scale": ("keep_scale", lambda value: value * 1.001),
    "wrong site": ("site", lambda value: value + 1),
    "threshold off by a tenth": ("threshold", lambda value: value + 6554),
    "gradient scale": ("dq_scale", lambda value: value * 1.001),
    "gradient scale of keys": ("dk_scale", lambda value: value * 1.001),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_launch_is_seen(damage, device, monkeypatch):
    pytest.importorskip("triton", reason="needs triton")
    from kernels import attention_kernels

    argument, change = DAMAGES[damage]
    launch = attention_kernels.backend.launch

    def damaged(kernel, grid, *args, **kwargs):
        args = [
            change(value) if name == argument else value
            for name, value in zip(kernel.arg_names, args, strict=False)
        ]
        launch(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(attention_kernels.backend, "launch", damaged)
    *tensors, do = draw((1, 1, 20, 25, 16), device)
    options = {"dropout_p": 0.2, "key": make_key(1, 2, device=device), "site": SITE}
    results = comparisons(tensors, do, backend="triton", **options)
    assert not all(result.passed for result in results)


@pytest.mark.parametrize("damage", ["wrong plane", "wrong row", "mask not packed in order"])
def test_damaged_eager_mask_is_seen(damage, monkeypatch):
    monkeypatch.setattr(attention, "_SMALL", 0)
    keep_mask, unpack = attention_eager.dropout_keep_mask, attention_eager._unpack

    def damaged(key, site, planes, rows, cols, p):
        planes = planes + (damage == "wrong plane")
        shift = damage == "wrong row"
        return keep_mask(key, site, planes, range(rows.start + shift, rows.stop + shift), cols, p)

    def reversed_bits(packed, R, N):
        return unpack(packed, R, N).flip(-1)

    if damage == "mask not packed in order":
        monkeypatch.setattr(attention_eager, "_unpack", reversed_bits)
    else:
        monkeypatch.setattr(attention_eager, "dropout_keep_mask", damaged)
    *tensors, do = draw((1, 1, 20, 20, 16), "cpu")
    options = {"dropout_p": 0.2, "key": make_key(1, 2), "site": SITE, "backend": "eager"}
    assert not all(result.passed for result in comparisons(tensors, do, **options))


# Bad input -------------------------------------------------------------------------------------


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


A = zeros(2, 3, 4, 8)
BAD_INPUT = {
    "not 4-D": (
        (zeros(2, 4, 8), A, A),
        {},
        ValueError,
        "q, k, v must be (B, H, T, D); got (2, 4, 8), (2, 3, 4, 8), (2, 3, 4, 8)",
    ),
    "k unlike v": (
        (A, A, zeros(2, 3, 5, 8)),
        {},
        ValueError,
        "k and v must have one shape; got k (2, 3, 4, 8), v (2, 3, 5, 8)",
    ),
    "heads": (
        (zeros(2, 1, 4, 8), A, A),
        {},
        ValueError,
        "q and k must agree in B, H, D; got q (2, 1, 4, 8), k (2, 3, 4, 8)",
    ),
    "more queries than keys": (
        (zeros(2, 3, 5, 8), A, A),
        {},
        ValueError,
        "queries must number at least 1 and at most as many as keys; got 5 queries, 4 keys",
    ),
    "head size": (
        (zeros(1, 1, 4, 257),) * 3,
        {},
        ValueError,
        "head size must be in 1..256; got 257",
    ),
    "dtypes": (
        (A, A.half(), A),
        {},
        TypeError,
        "q, k, v must agree in dtype; got torch.float32, torch.float16, torch.float32",
    ),
    "dtype": (
        (A.int(),) * 3,
        {},
        TypeError,
        "dtype must be one of float32, float16, bfloat16, float64 with backend eager; "
        "got torch.int32",
    ),
    "double on triton": (
        (A.double(),) * 3,
        {"backend": "triton"},
        TypeError,
        "dtype must be one of float32, float16, bfloat16 with backend triton; got torch.float64",
    ),
    "devices": (
        (A, A.to("meta"), A.to("meta")),
        {},
        ValueError,
        "all tensors must be on one device; got cpu, meta",
    ),
    "scale type": ((A, A, A), {"scale": "a"}, TypeError, "scale must be a number; got 'a'"),
    "dropout type": (
        (A, A, A),
        {"dropout_p": None},
        TypeError,
        "dropout_p must be a number; got None",
    ),
    "site": ((A, A, A), {"site": 2**32}, ValueError, "site must be in [0, 2**32); got 4294967296"),
    "site below 0": ((A, A, A), {"site": -1}, ValueError, "site must be in [0, 2**32); got -1"),
    "site type": ((A, A, A), {"site": 1.5}, TypeError, "site must be a whole number; got 1.5"),
    "scale": ((A, A, A), {"scale": float("nan")}, ValueError, "scale must be finite; got nan"),
    "dropout": (
        (A, A, A),
        {"dropout_p": 1.0},
        ValueError,
        "dropout_p must be in [0, 1); got 1.0",
    ),
    "key dtype": (
        (A, A, A),
        {"dropout_p": 0.1, "key": torch.zeros(2)},
        TypeError,
        "key must be an int64 tensor; got torch.float32",
    ),
    "backend": (
        (A, A, A),
        {"backend": "cuda"},
        ValueError,
        "backend must be one of auto, triton, eager; got 'cuda'",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(device, case):
    arguments, options, error, message = BAD_INPUT[case]
    if "backend" in options:
        arguments = [tensor.to(device) for tensor in arguments]
    with pytest.raises(error, match=re.escape(f"causal_attention: {message}")):
        causal_attention(*arguments, **options)


def test_autocast_makes_no_numbers_of_integers():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="got torch.int32"):
        causal_attention(A.int(), A.int(), A.int())


def test_bad_packed_input():
    message = "causal_attention_qkv: qkv must be (B, T, 3, H, D); got (2, 4, 2, 3, 8)"
    with pytest.raises(ValueError, match=re.escape(message)):
        causal_attention_qkv(zeros(2, 4, 2, 3, 8))


QKV = zeros(2, 4, 3, 1, 8)
BAD_ANGLES = {
    "positions": (
        (QKV, {"angles": rotary_table(1, 8)}),
        ValueError,
        "angles must be (T, D // 2, 2), here (4, 4, 2); got (1, 4, 2)",
    ),
    "head size": (
        (QKV, {"angles": rotary_table(4, 6)}),
        ValueError,
        "angles must be (T, D // 2, 2), here (4, 4, 2); got (4, 3, 2)",
    ),
    "odd": (
        (QKV[..., :7], {"angles": rotary_table(4, 6)}),
        ValueError,
        "qkv must be (B, T, 3, H, D) with an even D; got (2, 4, 3, 1, 7)",
    ),
    "dtype": (
        (QKV, {"angles": rotary_table(4, 8).double()}),
        TypeError,
        "qkv must be float32, float16, bfloat16 or float64 and angles float32; "
        "got torch.float32, torch.float64",
    ),
    "none": (
        (QKV, {"normalize": True}),
        ValueError,
        "normalize=True needs angles; got angles=None",
    ),
}


@pytest.mark.parametrize("case", BAD_ANGLES)
def test_bad_angles(case):
    (qkv, options), error, message = BAD_ANGLES[case]
    with pytest.raises(error, match=re.escape(f"causal_attention_qkv: {message}")):
        causal_attention_qkv(qkv, backend="eager", **options)


# On a device ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids="p{}".format)
@pytest.mark.parametrize("D", [24, 32, 50, 64, 85, 88, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_2x_rule_compiled(dtype, D, dropout_p, device):
    *tensors, do = draw((2, 3, 300, 300, D), device, dtype)
    key = make_key(5, 9, 3, device=device)
    check(tensors, do, dropout_p=dropout_p, key=key, site=SITE, backend="triton")


@pytest.mark.gpu
def test_cuda_graph_masks_follow_the_key(device):
    qkv = torch.randn(2, 64, 3, 2, 64, device=device)
    key = make_key(1, 0, device=device)
    causal_attention_qkv(qkv, dropout_p=0.5, key=key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = causal_attention_qkv(qkv, dropout_p=0.5, key=key)
    for step in (0, 1):
        key[1] = step
        graph.replay()
        assert torch.equal(o, causal_attention_qkv(qkv, dropout_p=0.5, key=key))
