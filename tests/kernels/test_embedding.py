"""embed against float64, by the 2x rule, on both backends; masks bit for bit."""

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F

from kernels import embed
from kernels.rng import SITE_EMBEDDING, dropout_keep_mask, dropout_scale, make_key
from kernels.verify import compare

module = importlib.import_module("kernels.embedding")
BACKENDS = ("eager", "triton")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that the op allocates and forgets to write holds NaN."""
    new_empty = torch.Tensor.new_empty

    def nan_empty(*args, **kwargs):
        tensor = new_empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", nan_empty)


def keep_mask(key, shape, p):
    """The mask of DESIGN section 4 for activations of `shape`, from the public function."""
    B, T, C = shape
    first = int(key[2]) if key.numel() == 3 else 0
    rows = range(first * T, (first + B) * T)
    return dropout_keep_mask(key, SITE_EMBEDDING, 1, rows, C, p).view(shape)


def plain(idx, token, position, p=0.0, key=None):
    x = F.embedding(idx, token)
    if position is not None:
        x = x + position[: idx.shape[1]]
    return x * keep_mask(key, x.shape, p) * dropout_scale(p) if p else x


def make_inputs(device, B, T, C, V, P, dtype=torch.float32):
    """idx with one token far more common than the others, token and position weights."""
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(0, V, (B, T), generator=generator)
    idx[torch.rand(B, T, generator=generator) < 1 / 3] = V - 1
    weights = [torch.randn(n, C, generator=generator) if n else None for n in (V, P)]
    return idx.to(device), [None if w is None else w.to(device, dtype) for w in weights]


def run(function, weights, dtype=None):
    """x and every gradient of function(*weights), the weights cast to `dtype` first."""
    leaves = [
        None if w is None else w.detach().to(dtype or w.dtype).requires_grad_() for w in weights
    ]
    x = function(*leaves)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    x.backward(dy.half().to(x.dtype))  # the same numbers in every dtype
    names = ("dtoken", "dposition")
    return {"x": x.detach()} | {
        name: leaf.grad for name, leaf in zip(names, leaves, strict=True) if leaf is not None
    }


def comparisons(fused, reference, weights):
    actual, ordinary = run(fused, weights), run(reference, weights)
    exact = run(reference, weights, torch.float64)
    return [compare(name, actual[name], ordinary[name], exact[name]) for name in exact]


def assert_passed(results):
    failures = [str(result) for result in results if not result.passed]
    assert not failures, "\n".join(failures)


# B, T, C, V, P, dropout, dtype
CASES = {
    "C1-V1": (1, 1, 1, 1, 1, 0.0, "fp32"),
    "V2-p0.5": (3, 5, 7, 2, 5, 0.5, "fp32"),
    "V65-p0.2": (2, 9, 40, 65, 16, 0.2, "fp32"),
    "V65-p0.2-fp16": (2, 9, 40, 65, 16, 0.2, "fp16"),
    "V65-C129": (3, 7, 129, 65, 12, 0.0, "fp32"),
    "V200-p0.1-no-positions": (2, 17, 24, 200, 0, 0.1, "fp32"),
    "B17-V30-p0.2-sorted": (17, 3, 24, 30, 3, 0.2, "fp32"),
    "V40-fp16-sorted": (2, 19, 72, 40, 20, 0.3, "fp16"),
    "V9-C1030-sorted": (1, 5, 1030, 9, 5, 0.2, "fp32"),
}
WAYS = ("one-hot", "sorted")


def choose(monkeypatch, way):
    """Sum the gradients of tokens by sorting, however few there are."""
    if way.endswith("sorted"):
        monkeypatch.setattr(module, "_LARGEST_ONE_HOT", 0)


def test_both_ways_are_in_use():
    assert 65 <= module._LARGEST_ONE_HOT < 50257


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_embed(device, poisoned, monkeypatch, backend, case):
    choose(monkeypatch, case)
    B, T, C, V, P, p, dtype = CASES[case]
    idx, weights = make_inputs(device, B, T, C, V, P, DTYPES[dtype])
    key = make_key(11, 22, 5, device)
    options = {"dropout_p": p, "key": key, "site": SITE_EMBEDDING, "backend": backend}
    assert_passed(
        comparisons(
            lambda token, position: embed(idx, token, position, **options),
            lambda token, position: plain(idx, token, position, p, key),
            weights,
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(device, poisoned, backend):
    idx, (token, position) = make_inputs(device, 7, 3, 20, 130, 19)
    idx = idx.T % 65
    assert_passed(
        comparisons(
            lambda t, q: embed(idx, t[::2, 1:], q.mT, backend=backend).transpose(0, 1),
            lambda t, q: plain(idx, t[::2, 1:], q.mT).transpose(0, 1),
            [token, position[:, :8].contiguous()],
        )
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", ["columns", "one column", "one row of many"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_between_others(device, poisoned, monkeypatch, backend, steps, way):
    """Flattened they are a view of one stride, which is not 1: windows of block_size 1 are."""
    choose(monkeypatch, way)
    idx, weights = make_inputs(device, 6, 8, 20, 40, 8)
    idx = {"columns": idx[:, ::2], "one column": idx[:, :1]}.get(steps, idx[0, 0].expand(3, 8))
    assert not idx.is_contiguous() and idx.view(-1).stride(0) != 1
    fused, reference = functools.partial(embed, idx, backend=backend), functools.partial(plain, idx)
    assert_passed(comparisons(fused, reference, weights))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_many_rows_add_up_in_float32(device, monkeypatch, backend, way):
    """Whole numbers, exactly, though sums on the way are larger than float16 holds."""
    choose(monkeypatch, way)
    B, T = 144, 16
    rows = torch.arange(B * T).view(B, T, 1)
    dy = torch.randint(-500, 500, (B, T, 8)) + 1536 - rows // 128 % 2 * 3072
    idx = torch.zeros(B, T, dtype=torch.int64, device=device)
    weights = [torch.zeros(n, 8, dtype=torch.float16, device=device) for n in (2, T)]
    leaves = [w.requires_grad_() for w in weights]
    embed(idx, *leaves, backend=backend).backward(dy.to(device, torch.float16))
    token, position = (leaf.grad.cpu() for leaf in leaves)
    assert torch.equal(token, torch.stack([dy.sum((0, 1)), torch.zeros(8)]).half())
    assert torch.equal(position, dy.sum(0).half())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_offsets_past_32_bits(device, monkeypatch, far_apart, axis, way):
    choose(monkeypatch, way)
    count, place = far_apart
    n, C = (count, 16) if axis == 0 else (5, count)
    near = [torch.randn(n, C).to(device, torch.float16) for _ in range(3)]
    idx = torch.arange(n, device=device).flip(0)[None]

    def results(token, position, dy):
        leaves = token.detach().requires_grad_(), position.detach().requires_grad_()
        x = embed(idx, *leaves, backend="triton")
        return x, *torch.autograd.grad(x, leaves, dy[None])

    far = [place(x, number, axis) for number, x in enumerate(near)]
    assert all(map(torch.equal, results(*far), results(*near)))


def test_results_past_32_bits(device, monkeypatch, far_apart):
    """As if there were more columns, each other tile of which is another program's."""
    choose(monkeypatch, "sorted")
    count, place = far_apart
    weights = [torch.randn(count, 16).to(device, torch.float16) for _ in range(2)]
    idx, launch = torch.arange(count, device=device).flip(0)[None], module.launch

    def widened(kernel, grid, *args, C, **kwargs):
        (name,) = kwargs.keys() & {"x_ptr", "dposition_ptr", "dtoken_ptr"}
        near = kwargs.pop(name)
        far = place(near.view(count, 16), 0)
        launch(kernel, grid, *args, C=far.stride(0), **kwargs, **{name: far})
        near.copy_(far.view(near.shape))

    def function(token, position):
        return embed(idx, token, position, backend="triton")

    expected = run(function, weights)
    monkeypatch.setattr(module, "launch", widened)
    actual = run(function, weights)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_dtype_of_the_weights(device, backend):
    """As PyTorch's own embedding does."""
    idx, weights = make_inputs(device, 2, 6, 16, 65, 8)

    def function(token, position):
        return embed(idx, token, position, backend=backend)

    expected = run(function, weights)
    with torch.autocast(device.type, torch.bfloat16):
        actual = run(function, weights)
    assert actual["x"].dtype == torch.float32
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("words", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_is_the_shared_one(device, backend, words):
    """Forward and both gradients drop exactly the elements of dropout_keep_mask."""
    B, T, C, p = 3, 5, 21, 0.4
    key = make_key(7, 8, 4, device)[:words]
    keep = keep_mask(key, (B, T, C), p)
    token = torch.ones(B * T, C, device=device, requires_grad=True)
    idx = torch.arange(B * T, device=device).view(B, T)
    options = {"dropout_p": p, "key": key, "site": SITE_EMBEDDING, "backend": backend}
    x = embed(idx, token, None, **options)
    assert torch.equal(x != 0, keep)
    x.sum().backward()
    assert torch.equal(token.grad.view(B, T, C) != 0, keep)
    position = torch.zeros(T, C, device=device, requires_grad=True)
    embed(idx, token.detach(), position, **options).sum().backward()
    torch.testing.assert_close(position.grad, keep.sum(0) * dropout_scale(p))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_of_the_batch_draws_its_part_of_the_mask(device, backend):
    idx, (token, position) = make_inputs(device, 4, 6, 16, 65, 6)
    options = {"dropout_p": 0.3, "site": SITE_EMBEDDING, "backend": backend}
    whole = embed(idx, token, position, key=make_key(1, 2, 0, device), **options)
    part = embed(idx[2:], token, position, key=make_key(1, 2, 2, device), **options)
    assert torch.equal(whole[2:], part)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_key_torch_governs(device, backend):
    idx, (token, position) = make_inputs(device, 2, 6, 16, 65, 6)

    def draw(seed):
        torch.manual_seed(seed)
        return embed(idx, token, position, dropout_p=0.5, backend=backend)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reruns_are_bit_identical(device, monkeypatch, backend, way):
    choose(monkeypatch, way)
    idx, weights = make_inputs(device, 4, 16, 24, 9, 16, torch.float16)
    options = {"dropout_p": 0.2, "key": make_key(1, device=device), "backend": backend}
    first, second = (run(lambda t, q: embed(idx, t, q, **options), weights) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(device, poisoned, monkeypatch, backend, way):
    choose(monkeypatch, way)
    token = torch.ones(9, 8, device=device, requires_grad=True)
    position = torch.ones(4, 8, device=device, requires_grad=True)
    idx = torch.zeros(0, 4, dtype=torch.int64, device=device)
    x = embed(idx, token, position, backend=backend)
    assert x.shape == (0, 4, 8)
    x.sum().backward()
    assert (token.grad == 0).all() and (position.grad == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_unknown_tokens(device, monkeypatch, way):
    choose(monkeypatch, way)
    V = 9
    token = torch.ones(V, 8, device=device, requires_grad=True)
    idx = torch.tensor([[0, V, -1, V - 1]], device=device)
    x = embed(idx, token, None, backend="triton")
    assert x[0].isnan().any(1).tolist() == [False, True, True, False]
    x.sum().backward()
    assert token.grad.sum() == 2 * 8
    for wrong in (-1, V):
        message = rf"embed: idx must be in \[0, {V}\); got {wrong}"
        with pytest.raises(ValueError, match=message):
            embed(torch.tensor([[0, wrong]]), token.detach().cpu(), None, backend="eager")


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["token", "position"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_needed_gradients(device, backend, needed):
    idx, weights = make_inputs(device, 2, 6, 16, 65, 8)
    full = run(lambda t, q: embed(idx, t, q, backend=backend), weights)
    leaves = [w.requires_grad_(n) for w, n in zip(weights, needed, strict=True)]
    x = embed(idx, *leaves, backend=backend)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).half().to(x)
    x.backward(dy)
    for leaf, name, n in zip(leaves, ("dtoken", "dposition"), needed, strict=True):
        assert torch.equal(leaf.grad, full[name]) if n else leaf.grad is None


def test_gradcheck():
    idx, weights = make_inputs("cpu", 2, 3, 2, 4, 5, torch.float64)
    weights = [w.requires_grad_() for w in weights]
    options = {"dropout_p": 0.3, "key": make_key(3)}
    assert torch.autograd.gradcheck(lambda t, q: embed(idx, t, q, **options), weights)
    assert torch.autograd.gradgradcheck(lambda t, q: embed(idx, t, q, **options) ** 3, weights)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids="p{}".format)
def test_torch_func(dropout_p):
    idx, weights = make_inputs("cpu", 2, 3, 2, 4, 5)
    options = {"dropout_p": dropout_p, "key": make_key(3)}

    def loss(token, position):
        return embed(idx, token, position, **options).square().sum()

    leaves = [w.clone().requires_grad_() for w in weights]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    actual = torch.func.grad(loss, argnums=(0, 1))(*weights)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck(device):
    idx, (token, position) = make_inputs(device, 2, 3, 8, 5, 4)
    key = make_key(1, device=device)
    token.requires_grad_(), position.requires_grad_()
    torch.library.opcheck(module._embed_op, (idx, token, position, key, 0.2, 3))
    arguments = (token.detach()[idx], idx, key, 5, 4, 0.2, 3, True, True)
    torch.library.opcheck(module._embed_backward_op, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(device, backend):
    idx, weights = make_inputs(device, 2, 6, 16, 65, 8)
    options = {"dropout_p": 0.3, "key": make_key(1, device=device), "backend": backend}

    def function(token, position):
        return embed(idx, token, position, **options)

    torch.compiler.reset()
    actual = run(torch.compile(function, fullgraph=True, backend="aot_eager"), weights)
    expected = run(function, weights)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def _change(name, change):
    """Launches in which the argument `name` is change(its value)."""

    def damaged(launch):
        def wrapper(kernel, grid, *args, **kwargs):
            if name in kwargs:
                kwargs[name] = change(kwargs[name])
            launch(kernel, grid, *args, **kwargs)

        return wrapper

    return damaged


DAMAGES = {
    "one position for all": _change("stride_pp", lambda stride: 0),
    "scale missing": _change("scale", lambda scale: 1.0),
    "another site": _change("site", lambda site: site + 1),
    "first sequence forgotten": _change("HAS_FIRST", lambda has: False),
    "last row lost": _change("M", lambda M: M - 1),
    "last token lost": _change("V", lambda V: V - 1),
    "last sequence lost": _change("B", lambda B: B - 1),
    "a piece lost": _change("rows_per_piece", lambda rows: rows // 2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen(device, poisoned, monkeypatch, damage):
    idx, weights = make_inputs(device, 3, 21, 24, 65, 22)
    key = make_key(11, 22, 5, device)
    monkeypatch.setattr(module, "launch", DAMAGES[damage](module.launch))
    options = {"dropout_p": 0.3, "key": key, "site": SITE_EMBEDDING, "backend": "triton"}
    results = comparisons(
        lambda token, position: embed(idx, token, position, **options),
        lambda token, position: plain(idx, token, position, 0.3, key),
        weights,
    )
    assert not all(result.passed for result in results)


MESSAGES = {
    "idx must be int64; got torch.int32": lambda i, t, q: embed(i.int(), t, q),
    "idx must be (B, T); got (2,)": lambda i, t, q: embed(i[:, 0], t, q),
    "token_weight must be floating point; got torch.int64": lambda i, t, q: embed(i, t.long(), q),
    "token_weight must be (V, C), V, C >= 1; got (9,)": lambda i, t, q: embed(i, t[:, 0], q),
    "site must be in [0, 2**32); got -1": lambda i, t, q: embed(i, t, q, site=-1),
    "token_weight and position_weight must agree in dtype; got torch.float32, torch.float16": (
        lambda i, t, q: embed(i, t, q.half())
    ),
    "position_weight must be (P, 4) as token_weight is; got (5, 3)": (
        lambda i, t, q: embed(i, t, q[:, 1:])
    ),
    "T must be at most the rows of position_weight; got 3 > 2": (
        lambda i, t, q: embed(i, t, q[:2])
    ),
    "dropout_p must be in [0, 1); got 1.0": lambda i, t, q: embed(i, t, q, dropout_p=1.0),
    "key must be an int64 tensor; got int": lambda i, t, q: embed(i, t, q, dropout_p=0.1, key=3),
    "token_weight must be float32, float16 or bfloat16 on the triton backend; got torch.float64": (
        lambda i, t, q: embed(i, t.double(), q.double(), backend="triton")
    ),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages(device, message):
    idx, weights = make_inputs(device, 2, 3, 4, 9, 5)
    with pytest.raises((TypeError, ValueError)) as caught:
        MESSAGES[message](idx, *weights)
    assert str(caught.value) == f"embed: {message}"
