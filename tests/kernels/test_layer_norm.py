"""LayerNorm and dropout + add + LayerNorm against float64, by the 2x rule, on both backends."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F

from kernels import dropout_add_layer_norm, layer_norm, layer_norm_kernels
from kernels.rng import dropout_keep_mask, dropout_scale, make_key
from kernels.verify import compare

module = importlib.import_module("kernels.layer_norm")  # the package exports the function
BACKENDS = ("eager", "triton")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SITE = 18


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that an op allocates and forgets to write holds NaN."""
    empty = torch.empty

    def nan_empty(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan_empty)


def in_pieces(monkeypatch, columns):
    """Let the backward take rows so many columns at a time, as it takes long ones."""
    plan = layer_norm_kernels.LayerNormPlan(BLOCK_M=1, BLOCK_C=columns, num_warps=4)
    monkeypatch.setattr(layer_norm_kernels, "backward_plan", lambda *_: plan)


def keep_mask(key, shape, p):
    """The mask of DESIGN section 4 for activations of `shape`, from the public function."""
    rows = shape[:-1].numel()
    start = int(key[2]) * shape[1:-1].numel()
    keep = dropout_keep_mask(key, SITE, 1, range(start, start + rows), shape[-1], p)
    return keep.view(shape)


def plain(x, residual, weight, bias, x_bias=None, *, eps=1e-5, p=0.0, key=None):
    """The equation in plain PyTorch, in the inputs' dtypes."""
    if x_bias is not None:
        x = x + x_bias
    if p:
        x = x * keep_mask(key, x.shape, p) * dropout_scale(p)
    r = residual + x
    return F.layer_norm(r, weight.shape, weight.to(r.dtype), _to(bias, r.dtype), eps), r


def _to(tensor, dtype):
    return None if tensor is None else tensor.to(dtype)


def make_inputs(device, shape, dtype, residual_dtype=None, bias=True, seed=0):
    """x, residual, weight, bias and the gradients of y and of the new residual."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size, dtype=dtype):
        return torch.randn(size, generator=generator).to(device, dtype)

    residual_dtype = residual_dtype or dtype
    C = shape[-1]
    parameters = [1 + randn(C) / 2, randn(C) if bias else None]
    return [
        [2 * randn(*shape) + 0.5, randn(*shape, dtype=residual_dtype), *parameters],
        [randn(*shape), randn(*shape, dtype=residual_dtype)],
    ]


def run(function, inputs, gradients, dtype=None):
    """Outputs and gradients of `function`, the inputs cast to `dtype` first."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs
    ]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    torch.autograd.backward(
        outputs, [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=False)]
    )
    names = ("y", "new_residual")[: len(outputs)]
    results = dict(zip(names, (output.detach() for output in outputs), strict=True))
    names = ("dx", "dresidual", "dweight", "dbias", "dx_bias")
    for name, leaf in zip(names, leaves, strict=False):
        if leaf is not None:
            results[name] = leaf.grad
    return results


def comparisons(fused, reference, inputs, gradients):
    """One Comparison per output and gradient of fused(*inputs) and reference(*inputs)."""
    actual = run(fused, inputs, gradients)
    exact = run(reference, inputs, gradients, torch.float64)

    def same_dtype(*leaves):
        outputs = reference(*leaves)
        if isinstance(outputs, torch.Tensor):
            return outputs.to(inputs[0].dtype)
        return outputs[0].to(inputs[0].dtype), outputs[1]

    ordinary = run(same_dtype, inputs, gradients)
    assert list(actual) == list(exact) == list(ordinary)
    return [compare(name, actual[name], ordinary[name], exact[name]) for name in actual]


def assert_passed(results):
    failures = [str(result) for result in results if not result.passed]
    assert not failures, "\n".join(failures)


CASES = {
    "T1-C1": ((1, 1), "fp32", None, 0.0),
    "B2-T3-C7-p0.5": ((2, 3, 7), "fp32", None, 0.5),
    "B2-T9-C85-p0.2": ((2, 9, 85), "fp32", None, 0.2),
    "B3-T11-C64": ((3, 11, 64), "fp32", None, 0.0),
    "T5-C1-fp16": ((5, 1), "fp16", None, 0.0),
    "M5-C384-p0.2": ((5, 384), "fp32", None, 0.2),
    "B1-T3-C1025": ((1, 3, 1025), "fp32", None, 0.0),
    "B2-T17-C40-p0.2-fp16": ((2, 17, 40), "fp16", None, 0.2),
    "B2-T3-C384-fp16": ((2, 3, 384), "fp16", None, 0.0),
    "B2-T5-C130-p0.1-fp16-residual-fp32": ((2, 5, 130), "fp16", "fp32", 0.1),
    "B2-T9-C72-p0.2-bf16": ((2, 9, 72), "bf16", None, 0.2),
    "B2-T5-C96-bf16-residual-fp32": ((2, 5, 96), "bf16", "fp32", 0.0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_dropout_add_layer_norm_obeys_the_2x_rule(device, backend, case):
    shape, dtype, residual_dtype, p = case
    inputs, gradients = make_inputs(
        device, shape, DTYPES[dtype], residual_dtype and DTYPES[residual_dtype]
    )
    key = make_key(3, 5, 2, device=device)
    assert_passed(
        comparisons(
            lambda *leaves: dropout_add_layer_norm(
                *leaves, dropout_p=p, key=key, site=SITE, backend=backend
            ),
            lambda *leaves: plain(*leaves, p=p, key=key),
            inputs,
            gradients,
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no-bias"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_obeys_the_2x_rule(device, backend, bias, dtype):
    inputs, gradients = make_inputs(device, (3, 7, 50), DTYPES[dtype], bias=bias)
    inputs.pop(1)

    def fused(x, weight, bias):
        return layer_norm(x, weight, bias, eps=0.01, backend=backend)

    def reference(x, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias, 0.01)

    names = {"dresidual": "dweight", "dweight": "dbias"}
    results = comparisons(fused, reference, inputs, gradients)
    assert_passed(results)
    assert [names.get(result.name, result.name) for result in results] == (
        ["y", "dx", "dweight", "dbias"] if bias else ["y", "dx", "dweight"]
    )


@pytest.mark.parametrize("wide", (False, True), ids=("rows", "wide"))
@pytest.mark.parametrize("p", (0.0, 0.2), ids="p{}".format)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no-bias"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bias_of_x_has_its_gradient(device, monkeypatch, backend, bias, p, wide):
    if wide:
        in_pieces(monkeypatch, 32)
    inputs, gradients = make_inputs(device, (2, 9, 50), torch.float32, bias=bias)
    x_bias = 1 + torch.arange(50, device=device) / 50
    key = make_key(3, 5, 2, device=device)

    def fused(x, residual, weight, bias, x_bias):
        options = {"x_bias": x_bias, "dropout_p": p, "key": key, "site": SITE}
        return dropout_add_layer_norm(x, residual, weight, bias, **options, backend=backend)

    results = comparisons(
        fused, lambda *leaves: plain(*leaves, p=p, key=key), [*inputs, x_bias], gradients
    )
    assert_passed(results)
    assert results[-1].name == "dx_bias"


def test_wide_rows_go_in_pieces(device, monkeypatch):
    """Other kernels do the backward beyond 8,192 channels; here at 100, in pieces of 32."""
    in_pieces(monkeypatch, 32)
    inputs, gradients = make_inputs(device, (2, 5, 100), torch.float32)
    key = make_key(3, 5, device=device)
    fused = {"dropout_p": 0.2, "key": key, "site": SITE, "backend": "triton"}
    assert_passed(
        comparisons(
            lambda *leaves: dropout_add_layer_norm(*leaves, **fused),
            lambda *leaves: plain(*leaves, p=0.2, key=key),
            inputs,
            gradients,
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_eager_row_blocks_and_strided_inputs(device, backend, monkeypatch):
    """Inputs, parameters and incoming gradients of any strides; eager blocks smaller than x."""
    monkeypatch.setattr(module._DropoutAdd, "BLOCK_ELEMENTS", 100)
    inputs, gradients = make_inputs(device, (3, 5, 24), torch.float32)

    def strided(tensor, layout):
        if layout == "channels outermost":
            return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], device=tensor.device)
        view = wide[..., :: 2 if layout == "every other" else 1][..., : tensor.shape[-1]]
        return view.copy_(tensor)

    layouts = ("padded rows", "channels outermost", "every other", "every other")
    key = make_key(3, 5, 2, device=device)

    def fused(*leaves):
        leaves = [strided(t, layout) for t, layout in zip(leaves, layouts, strict=True)]
        return dropout_add_layer_norm(*leaves, dropout_p=0.3, key=key, site=SITE, backend=backend)

    gradients = [strided(gradients[0], "padded rows"), gradients[1][:, :1].expand(3, 5, 24)]
    assert not gradients[0].is_contiguous()
    assert_passed(
        comparisons(fused, lambda *leaves: plain(*leaves, p=0.3, key=key), inputs, gradients)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("words", (2, 3), ids=("seed-step", "seed-step-first"))
def test_mask_is_that_of_dropout_keep_mask(device, backend, dtype, words):
    B, T, C, p = 3, 5, 37, 0.4
    key = make_key(2**32 - 1, 7, 4, device=device)
    x = torch.ones(B, T, C, dtype=DTYPES[dtype], device=device, requires_grad=True)
    y, r = dropout_add_layer_norm(
        x,
        torch.zeros_like(x),
        torch.ones(C, dtype=x.dtype, device=device),
        dropout_p=p,
        key=key[:words],
        site=SITE,
        backend=backend,
    )
    r.sum().backward()
    keep = keep_mask(key if words == 3 else make_key(2**32 - 1, 7, device=device), x.shape, p)
    assert 0.3 < keep.float().mean() < 0.9
    assert torch.equal(r, keep * torch.tensor(dropout_scale(p), dtype=x.dtype, device=device))
    assert torch.equal(x.grad, r)


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_of_a_batch_draw_what_the_whole_draws(device, backend):
    (x, residual, weight, bias), _ = make_inputs(device, (4, 3, 24), torch.float32)
    options = {"dropout_p": 0.5, "site": SITE, "backend": backend}

    def call(start, stop):
        key = make_key(1, 2, 10 + start, device=device)
        part = slice(start, stop)
        return dropout_add_layer_norm(x[part], residual[part], weight, bias, key=key, **options)

    whole, parts = call(0, 4), zip(call(0, 1), call(1, 4), strict=True)
    for tensor, (first, rest) in zip(whole, parts, strict=True):
        assert torch.equal(tensor, torch.cat([first, rest]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_reruns_are_bit_identical(device, backend):
    inputs, gradients = make_inputs(device, (4, 9, 48), torch.float32)
    key = make_key(3, 5, device=device)

    def fused(*leaves):
        return dropout_add_layer_norm(*leaves, dropout_p=0.2, key=key, site=SITE, backend=backend)

    first, second = run(fused, inputs, gradients), run(fused, inputs, gradients)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_key_torch_generator_decides(device, backend):
    x = torch.ones(2, 3, 64, device=device)
    weight = torch.ones(64, device=device)

    def draw(seed):
        torch.manual_seed(seed)
        return dropout_add_layer_norm(x, x, weight, dropout_p=0.5, backend=backend)[1]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_outputs_have_no_gradient(device, backend):
    inputs, gradients = make_inputs(device, (2, 3, 16), torch.float32)
    for output, unused in ((0, ()), (1, ("dweight", "dbias"))):
        results = [
            run(lambda *leaves: f(*leaves)[output], inputs, [gradients[output]])  # noqa: B023
            for f in (
                lambda *leaves: dropout_add_layer_norm(*leaves, backend=backend),
                plain,
            )
        ]
        for name in results[0]:
            actual, expected = (result[name] for result in results)
            if name in unused:
                assert actual is None or not actual.any()
            else:
                torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(device, backend):
    inputs, gradients = make_inputs(device, (0, 3, 16), torch.float32)
    key = make_key(3, 5, device=device)
    results = run(
        lambda *leaves: dropout_add_layer_norm(*leaves, dropout_p=0.2, key=key, backend=backend),
        inputs,
        gradients,
    )
    assert results["y"].shape == results["dx"].shape == (0, 3, 16)
    assert torch.equal(results["dweight"], torch.zeros(16, device=device))
    assert torch.equal(results["dbias"], torch.zeros(16, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_gives_low_precision_y_and_keeps_the_residual(device, backend):
    (x, residual, weight, bias), _ = make_inputs(device, (2, 3, 64), torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        y, r = dropout_add_layer_norm(x.bfloat16(), residual, weight, bias, backend=backend)
        alone = layer_norm(residual, weight, bias, backend=backend)
    assert (y.dtype, r.dtype, alone.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert torch.equal(r, residual + x.bfloat16())
    for actual, of in ((y, r), (alone, residual)):
        exact = F.layer_norm(of.double(), (64,), weight.double(), bias.double())
        ordinary = F.layer_norm(of, (64,), weight, bias).bfloat16()
        assert_passed([compare("y", actual, ordinary, exact)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_eps_is_pytorchs(device, backend):
    x, weight = 1e-3 * torch.randn(5, 40, device=device), torch.ones(40, device=device)
    expected = F.layer_norm(x, (40,))
    y, _ = dropout_add_layer_norm(x, torch.zeros_like(x), weight, backend=backend)
    for actual in (layer_norm(x, weight, backend=backend), y):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_partial_sums_are_float32(device, wide, monkeypatch):
    """Whole numbers, exactly, though the sums of either half are larger than float16 holds."""
    if wide:
        in_pieces(monkeypatch, 32)
    x, weight, bias = (torch.randn(n).to(device, torch.float16) for n in ((64, 16), 16, 16))
    dy = 4 * torch.randint(-500, 500, (64, 16)) + 4096
    dy[32:] -= 8192
    x[32:] = x[:32]
    layer_norm(x, weight, bias.requires_grad_(), backend="triton").backward(dy.to(x))
    assert torch.equal(bias.grad.cpu(), dy.sum(0).half())


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_offsets_past_32_bits(device, far_apart, wide, monkeypatch):
    if wide:
        in_pieces(monkeypatch, 32)
    count, place = far_apart
    near = [torch.randn(count, 40).to(device, torch.float16) for _ in range(3)]
    far = [place(x, number) for number, x in enumerate(near)]
    weight = torch.ones(40, dtype=torch.float16, device=device, requires_grad=True)
    options = {"dropout_p": 0.3, "key": make_key(1, 2, device=device), "backend": "triton"}

    def results(x, dy, residual):
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        y = layer_norm(x, weight, backend="triton")
        added, r = dropout_add_layer_norm(x, residual, weight, **options)
        leaves = x, residual, weight
        alone = torch.autograd.grad(y, (x, weight), dy)
        return y, added, r, *alone, *torch.autograd.grad((added, r), leaves, (dy, dy))

    assert all(map(torch.equal, results(*far), results(*near)))


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_vectors_whose_elements_lie_past_32_bits(device, far_apart, wide, monkeypatch):
    if wide:
        in_pieces(monkeypatch, 2)
    count, place = far_apart
    near = [torch.randn(count).to(device, torch.float16) for _ in range(3)]
    far = [place(vector, number) for number, vector in enumerate(near)]
    x, residual = (torch.randn(5, count).to(device, torch.float16) for _ in range(2))

    def results(*vectors):
        weight, bias, x_bias = (vector.detach().requires_grad_() for vector in vectors)
        leaves = x.requires_grad_(), weight, bias, x_bias
        y, r = dropout_add_layer_norm(x, residual, weight, bias, x_bias=x_bias, backend="triton")
        return y, r, *torch.autograd.grad((y, r), leaves, (x.detach(), residual))

    assert all(map(torch.equal, results(*far), results(*near)))


def test_gradcheck_of_the_eager_version():
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 5), (2, 3, 5), (5,), (5,))
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    key = make_key(1, 2)
    for p in (0.0, 0.4):
        assert torch.autograd.gradcheck(
            lambda *t: dropout_add_layer_norm(*t, dropout_p=p, key=key),  # noqa: B023
            [leaf.requires_grad_() for leaf in leaves],
        )
        assert torch.autograd.gradgradcheck(
            lambda *t: dropout_add_layer_norm(*t, dropout_p=p, key=key),  # noqa: B023
            leaves,
        )


@pytest.mark.parametrize("rows", (3, 5000))
def test_the_eager_version_has_second_derivatives_at_any_size(rows):
    """What is computed in blocks, too."""
    x = torch.randn(rows, 64, dtype=torch.float64, requires_grad=True)
    weight, residual = torch.ones(64, dtype=torch.float64), torch.randn(rows, 64).double()
    y, _ = dropout_add_layer_norm(x, residual, weight, dropout_p=0.4, key=make_key(1, 2))
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    assert second.isfinite().all() and second.any()


@pytest.mark.parametrize("dropout_p", (0.0, 0.4), ids="p{}".format)
def test_torch_func(dropout_p):
    x, residual, weight = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(5)

    def loss(x, weight):
        y, new = dropout_add_layer_norm(
            x, residual, weight, dropout_p=dropout_p, key=make_key(1, 2)
        )
        return (y * new).sum()

    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    actual = torch.func.grad(loss, argnums=(0, 1))(x, weight)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_a_cpu_saves_statistics_in_float32(dtype):
    saved = []
    x, weight, bias = (torch.randn(s, dtype=dtype) for s in ((4, 8), (8,), (8,)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer_norm(x.requires_grad_(), weight, bias, backend="eager")
    statistics = [t.dtype for t in saved if t.shape == (4, 1)]
    assert y.dtype == dtype and statistics == [torch.float32] * 2


def test_opcheck(device):
    (x, residual, weight, bias), _ = make_inputs(device, (2, 3, 24), torch.float32)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    key = make_key(3, 5, device=device)
    torch.library.opcheck(
        torch.ops.kernels.layer_norm_forward.default,
        (*leaves, bias.detach().clone().requires_grad_(), key, 1e-5, 0.2, SITE, torch.float32),
    )
    x, residual, weight, bias = (t.detach() for t in leaves)
    statistics = torch.ones(6, device=device), torch.ones(6, device=device)
    torch.library.opcheck(
        torch.ops.kernels.layer_norm_backward.default,
        (
            x,
            None,
            residual,
            weight,
            *statistics,
            key,
            0.2,
            SITE,
            torch.float16,
            *[torch.float32] * 2,
        ),
    )
    torch.library.opcheck(
        torch.ops.kernels.keep_rows.default, (key, SITE, [2, 3, 24], 0.2), test_utils="test_schema"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(device, backend):
    inputs, gradients = make_inputs(device, (2, 3, 24), torch.float32)
    key = make_key(3, 5, 1, device=device)

    def step(x, residual, weight, bias):
        y = layer_norm(x, weight, bias, backend=backend)
        return dropout_add_layer_norm(
            y, residual, weight, bias, dropout_p=0.2, key=key, site=SITE, backend=backend
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, actual = run(step, inputs, gradients), run(compiled, inputs, gradients)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-6)


def _break_scale(monkeypatch):
    monkeypatch.setattr(layer_norm_kernels, "dropout_scale", lambda p: 1.0)


def _break_threshold(monkeypatch):
    monkeypatch.setattr(layer_norm_kernels, "dropout_threshold", lambda p: 1 + round(p * 60000))


def _break_partial_sums(monkeypatch):
    whole = layer_norm_kernels.sum_partials
    monkeypatch.setattr(
        layer_norm_kernels,
        "sum_partials",
        lambda p, *dtypes: whole(p[:, 1:].contiguous(), *dtypes),
    )


def _change_dropout_arguments(monkeypatch, **changes):
    arguments = layer_norm_kernels._dropout_arguments
    monkeypatch.setattr(
        layer_norm_kernels, "_dropout_arguments", lambda *args: arguments(*args) | changes
    )


def _break_rows(monkeypatch):
    _change_dropout_arguments(monkeypatch, rows_per_sequence=4)


def _break_site(monkeypatch):
    _change_dropout_arguments(monkeypatch, site=SITE + 1)


def _break_eps(monkeypatch):
    forward = module._forward_op
    monkeypatch.setattr(
        module, "_forward_op", lambda *args: forward(*args[:6], 10 * args[6], *args[7:])
    )


DAMAGES = {
    "no scale": (_break_scale, {"new_residual", "dx"}),
    "wrong threshold": (_break_threshold, {"new_residual", "dx"}),
    "a partial sum lost": (_break_partial_sums, {"dweight", "dbias"}),
    "first counts other rows": (_break_rows, {"new_residual", "dx"}),
    "wrong site": (_break_site, {"new_residual", "dx"}),
    "eps ten times": (_break_eps, {"y"}),
}


@pytest.mark.parametrize("damage, caught", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_caught(device, monkeypatch, damage, caught):
    damage(monkeypatch)
    inputs, gradients = make_inputs(device, (2, 3, 32), torch.float32)
    key = make_key(3, 5, 2, device=device)
    results = comparisons(
        lambda *leaves: dropout_add_layer_norm(
            *leaves, dropout_p=0.2, key=key, site=SITE, backend="triton"
        ),
        lambda *leaves: plain(*leaves, p=0.2, key=key),
        inputs,
        gradients,
    )
    assert caught <= {result.name for result in results if not result.passed}


def _arguments(**changes):
    arguments = {
        "x": torch.zeros(2, 3, 8),
        "residual": torch.zeros(2, 3, 8),
        "weight": torch.ones(8),
        "bias": torch.zeros(8),
    }
    return arguments | changes


ERRORS = {
    "x dtype": (
        {"x": torch.zeros(2, 3, 8, dtype=torch.int32)},
        TypeError,
        "x must be .* got torch.int32",
    ),
    "weight dtype": (
        {"weight": torch.ones(8).bool()},
        TypeError,
        "weight must be .* got torch.bool",
    ),
    "scalar x": ({"x": torch.zeros(())}, ValueError, r"x must be \(..., C\) .* got \(\)"),
    "no channels": ({"x": torch.zeros(2, 0)}, ValueError, r"C at least 1; got \(2, 0\)"),
    "weight shape": (
        {"weight": torch.ones(7)},
        ValueError,
        r"weight must be \(C,\) with C 8.*\(7,\)",
    ),
    "bias shape": (
        {"bias": torch.ones(1, 8)},
        ValueError,
        r"bias must be \(C,\) with C 8.*\(1, 8\)",
    ),
    "x_bias shape": (
        {"x_bias": torch.ones(7)},
        ValueError,
        r"x_bias must be \(C,\) with C 8.*\(7,\)",
    ),
    "x_bias dtype": ({"x_bias": torch.ones(8).long()}, TypeError, "x_bias must be .* torch.int64"),
    "residual shape": (
        {"residual": torch.zeros(3, 8)},
        ValueError,
        r"one shape; got x \(2, 3, 8\), residual \(3, 8\)",
    ),
    "residual dtype": (
        {"residual": torch.zeros(2, 3, 8).half()},
        TypeError,
        "residual must be float32 or of x's dtype; got x torch.float32, residual torch.float16",
    ),
    "eps type": ({"eps": None}, TypeError, "eps must be a number; got None"),
    "eps": ({"eps": -1.0}, ValueError, "eps must not be negative; got -1.0"),
    "eps nan": ({"eps": float("nan")}, ValueError, "eps must not be negative; got nan"),
    "dropout_p": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\); got 1.0"),
    "key": ({"dropout_p": 0.5, "key": torch.zeros(4).long()}, ValueError, r"key must be .*\(4,\)"),
    "key dtype": ({"dropout_p": 0.5, "key": torch.zeros(2)}, TypeError, "key must be an int64"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
    "device": ({"weight": torch.ones(8, device="meta")}, ValueError, "one device; got cpu, meta"),
    "float64": (
        {"x": torch.zeros(2, 3, 8).double(), "residual": None, "backend": "triton"},
        TypeError,
        "float64 needs backend='eager'",
    ),
}


@pytest.mark.parametrize("changes, error, message", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_rule_and_the_values(device, changes, error, message):
    arguments = _arguments(**changes)
    if arguments["residual"] is None:
        arguments["residual"] = torch.zeros_like(arguments["x"])
    if "backend" in changes:
        arguments |= {name: x.to(device) for name, x in arguments.items() if torch.is_tensor(x)}
    with pytest.raises(error, match=f"^dropout_add_layer_norm: .*{message}"):
        dropout_add_layer_norm(**arguments)


def test_plans_cover_every_width():
    """Tiles hold a row, are powers of two and leave a thread at most 64 values."""
    architectures, widths = ("sm_80", "sm_90", "gfx942"), (1, 7, 384, 768, 1024, 4096, 16384)
    for architecture, C in itertools.product(architectures, widths):
        forward = layer_norm_kernels.forward_plan(C)
        plain, residual = (
            layer_norm_kernels.backward_plan(architecture, C, with_residual)
            for with_residual in (False, True)
        )
        assert forward.BLOCK_C >= C
        assert plain.programs >= residual.programs
        for plan in (forward, plain, residual):
            assert plan.BLOCK_C >= C if plan.programs else plan is forward or C > 8192
            assert plan.BLOCK_C & (plan.BLOCK_C - 1) == 0
            assert plan.BLOCK_M * plan.BLOCK_C <= 64 * 32 * plan.num_warps
