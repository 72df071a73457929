"""linear_act against float64, by the 2x rule: eager, library forward and Triton GEMM."""

import pytest
import torch
import torch.nn.functional as F

from kernels import linear_act, mlp
from kernels.verify import compare

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WAYS = ("eager", "library", "triton")
PLAIN = {
    "relu": F.relu,
    "gelu": lambda z: F.gelu(z, approximate="tanh"),
    "relu2": lambda z: F.relu(z).square(),
}
NAMES = ("y", "dx", "dweight", "dbias")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that an op allocates and forgets to write holds NaN."""
    empty = torch.empty

    def nan_empty(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan_empty)


@pytest.fixture
def choose(monkeypatch):
    """choose(way) makes the plan take that way and returns the backend to ask for."""

    def choose(way):
        plan = mlp.LinearActPlan(way != "triton", BLOCK_M=32, BLOCK_N=16, BLOCK_K=16)
        monkeypatch.setattr(mlp, "linear_act_plan", lambda *_: plan)
        return "eager" if way == "eager" else "triton"

    return choose


def plain(x, weight, bias, activation):
    """The equation in plain PyTorch, in the inputs' dtype."""
    return PLAIN[activation](F.linear(x, weight, bias))


def make_inputs(device, shape, N, dtype, bias=True, seed=0):
    """x, weight, bias and the gradient of y."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator)

    tensors = [randn(*shape), randn(N, shape[-1]) * shape[-1] ** -0.5, randn(N)]
    inputs = [tensor.to(device, dtype) for tensor in tensors]
    return inputs if bias else [*inputs[:2], None], randn(*shape[:-1], N).to(device, dtype)


def run(function, inputs, gradient, dtype=None):
    """y and the gradients of `function`, the inputs cast to `dtype` first."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs
    ]
    y = function(*leaves)
    y.backward(gradient.to(y.dtype))
    results = [y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]
    return {name: r for name, r in zip(NAMES, results, strict=True) if r is not None}


def comparisons(fused, reference, inputs, gradient):
    """One Comparison per output and gradient of fused(*inputs) and reference(*inputs)."""
    actual = run(fused, inputs, gradient)
    ordinary = run(reference, inputs, gradient)
    exact = run(reference, inputs, gradient, torch.float64)
    assert list(actual) == list(ordinary)
    return [compare(name, actual[name], ordinary[name], exact[name]) for name in actual]


def assert_passed(results):
    failures = [str(result) for result in results if not result.passed]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_obeys_the_2x_rule(device, choose, way, dtype, activation):
    backend = choose(way)
    inputs, gradient = make_inputs(device, (3, 15, 23), 37, DTYPES[dtype])
    assert_passed(
        comparisons(
            lambda *leaves: linear_act(*leaves, activation=activation, backend=backend),
            lambda *leaves: plain(*leaves, activation),
            inputs,
            gradient,
        )
    )


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("way", WAYS)
def test_small_numbers_keep_their_bits_in_float16(device, choose, way, activation):
    """Their squares do not."""
    backend = choose(way)
    (x, weight, bias), gradient = make_inputs(device, (40, 23), 37, torch.float16)
    assert_passed(
        comparisons(
            lambda *leaves: linear_act(*leaves, activation=activation, backend=backend),
            lambda *leaves: plain(*leaves, activation),
            [1e-3 * x, weight, 1e-3 * bias],
            gradient,
        )
    )


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_offsets_past_32_bits(device, choose, far_apart, axis):
    (count, place), backend = far_apart, choose("triton")
    M, K = (count, 24) if axis == 0 else (5, count)
    x, weight = (torch.randn(n, K).to(device, torch.float16) for n in (M, count))
    dy = torch.randn(M, count).to(device, torch.float16)

    def results(x, dy):
        leaves = x.detach().requires_grad_(), weight.requires_grad_()
        y = linear_act(*leaves, activation="relu", backend=backend)
        return y, *torch.autograd.grad(y, leaves, dy)

    far = results(place(x, 0, axis), place(dy, 1, axis))
    assert all(map(torch.equal, far, results(x, dy)))


def test_a_weight_and_a_bias_past_32_bits(device, choose, far_apart):
    (count, place), backend = far_apart, choose("triton")
    x, weight, bias = (
        torch.randn(n).to(device, torch.float16) for n in ((5, 24), (count, 24), count)
    )
    far = linear_act(x, place(weight, 1), place(bias, 0), activation="relu2", backend=backend)
    assert torch.equal(far, linear_act(x, weight, bias, activation="relu2", backend=backend))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_number_stays_none_through_the_library(activation, dtype):
    """A GPU's maximum of 0 and NaN is 0; whether cuBLASLt's ReLU is that one is not documented."""
    x, weight, bias = (torch.randn(n).to("cuda", dtype) for n in ((64, 64), (64, 64), 64))
    bias[3] = float("nan")
    y = linear_act(x, weight, bias, activation=activation)
    assert y[:, 3].isnan().all() and y.isnan().sum() == 64


SHAPES = {
    "M1-K1-N1": ((1, 1), 1),
    "M33-K16-N17": ((33, 16), 17),
    "B2-T2-K5-N300": ((2, 2, 5), 300),
    "M290-K5-N17": ((290, 5), 17),  # two groups of tile rows
}


@pytest.mark.parametrize("shape, N", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("way", WAYS)
def test_odd_shapes_without_bias(device, choose, way, activation, shape, N):
    backend = choose(way)
    inputs, gradient = make_inputs(device, shape, N, torch.float32, bias=False)
    assert_passed(
        comparisons(
            lambda *leaves: linear_act(*leaves, activation=activation, backend=backend),
            lambda *leaves: plain(*leaves, activation),
            inputs,
            gradient,
        )
    )


@pytest.mark.parametrize("way", WAYS)
def test_strided_inputs(device, choose, way):
    backend = choose(way)
    inputs, gradient = make_inputs(device, (3, 6, 10), 80, torch.float32)

    def fused(x, weight, bias):
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        weight = weight.t().contiguous().t()
        bias = torch.stack([bias, bias], 1)[:, 0]
        assert not (x.is_contiguous() or weight.is_contiguous() or bias.is_contiguous())
        return linear_act(x, weight, bias, activation="gelu", backend=backend)

    expanded = gradient[:, :1, :1].expand(3, 6, 80)
    for incoming in (expanded, gradient.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_passed(comparisons(fused, lambda *t: plain(*t, "gelu"), inputs, incoming))


@pytest.mark.parametrize("way", WAYS)
def test_reruns_are_bit_identical(device, choose, way):
    backend = choose(way)
    inputs, gradient = make_inputs(device, (70, 20), 40, torch.float32)
    first, second = (
        run(lambda *t: linear_act(*t, activation="relu2", backend=backend), inputs, gradient)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("way", WAYS)
def test_empty_batch(device, choose, way, activation):
    backend = choose(way)
    inputs, gradient = make_inputs(device, (0, 4, 8), 12, torch.float32)
    results = run(
        lambda *t: linear_act(*t, activation=activation, backend=backend), inputs, gradient
    )
    assert results["y"].shape == (0, 4, 12) and results["dx"].shape == (0, 4, 8)
    assert not results["dweight"].any() and not results["dbias"].any()


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("way", WAYS)
def test_without_gradients_the_output_is_the_same(device, choose, monkeypatch, way, activation):
    """Nothing is saved for a backward that cannot come, and y does not notice."""
    backend, forward, kept = choose(way), mlp._forward_op, []

    def counted(*args):
        y, z = forward(*args)
        kept.append(z.numel())
        return y, z

    monkeypatch.setattr(mlp, "_forward_op", counted)
    (x, weight, bias), _ = make_inputs(device, (9, 20), 40, torch.float32)
    x.requires_grad_()
    expected = linear_act(x, weight, bias, activation=activation, backend=backend)
    with torch.no_grad():
        actual = linear_act(x, weight, bias, activation=activation, backend=backend)
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-6, atol=1e-6)
    assert way == "eager" or kept == [360 * (activation == "gelu"), 0]


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_the_bias_adds_up_in_float32(device, choose, way):
    """Whole numbers, exactly, though sums on the way are larger than float16 holds."""
    backend = choose(way)
    x, weight, bias = (
        torch.ones(n, dtype=torch.float16).to(device) for n in ((64, 1), (17, 1), 17)
    )
    dy = 4 * torch.randint(-500, 500, (64, 17)) + 4096
    dy[32:] -= 8192
    linear_act(x, weight, bias.requires_grad_(), backend=backend).backward(dy.to(x))
    assert torch.equal(bias.grad.cpu(), dy.sum(0).half())


@pytest.mark.parametrize("way", WAYS)
def test_frozen_weights_get_no_gradient(device, choose, way):
    backend = choose(way)
    (x, weight, bias), gradient = make_inputs(device, (9, 20), 40, torch.float32)
    x.requires_grad_()
    linear_act(x, weight, bias, backend=backend).backward(gradient)
    reference = x.detach().clone().requires_grad_()
    plain(reference, weight, bias, "relu").backward(gradient)
    torch.testing.assert_close(x.grad, reference.grad)
    assert weight.grad is None and bias.grad is None


@pytest.mark.parametrize("way", WAYS)
def test_autocast_computes_in_low_precision(device, choose, way):
    backend = choose(way)
    inputs, gradient = make_inputs(device, (9, 20), 40, torch.float32)

    def fused(*leaves):
        with torch.autocast(device.type, torch.bfloat16):
            return linear_act(*leaves, backend=backend)

    def reference(*leaves):
        if leaves[0].dtype == torch.float64:
            return plain(*leaves, "relu")
        with torch.autocast(device.type, torch.bfloat16):
            return plain(*leaves, "relu")

    results = comparisons(fused, reference, inputs, gradient)
    assert_passed(results)
    actual = run(fused, inputs, gradient)
    assert actual["y"].dtype == torch.bfloat16 and actual["dweight"].dtype == torch.float32


def test_gradcheck_of_the_eager_version():
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3, 5), (7, 5), (7,))
    ]
    for activation in PLAIN:
        assert torch.autograd.gradcheck(
            lambda *t: linear_act(*t, activation=activation),  # noqa: B023
            leaves,
        )
        assert torch.autograd.gradgradcheck(
            lambda *t: linear_act(*t, activation=activation),  # noqa: B023
            leaves,
        )


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("way", ("library", "triton"))
def test_opcheck(device, choose, way, activation):
    choose(way)
    inputs, gradient = make_inputs(device, (2, 3, 8), 12, torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(
        torch.ops.kernels.linear_act_forward.default, (*leaves, activation, activation == "gelu")
    )
    if way == "library":
        torch.library.opcheck(
            torch.ops.kernels.activation_backward.default,
            (gradient, gradient.abs(), activation, torch.float32),
        )


@pytest.mark.parametrize("way", WAYS)
def test_compiles_whole(device, choose, way):
    backend = choose(way)
    inputs, gradient = make_inputs(device, (2, 3, 8), 8, torch.float32)

    def step(x, weight, bias):
        for activation in PLAIN:
            x = linear_act(x, weight, bias, activation=activation, backend=backend)
        return x

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, actual = run(step, inputs, gradient), run(compiled, inputs, gradient)
    for name in NAMES:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)


def _break_saved(monkeypatch):
    backward = mlp._backward_op
    monkeypatch.setattr(mlp, "_backward_op", lambda dy, y, *rest: backward(dy, y.abs() + 1, *rest))


def _break_activation(monkeypatch):
    backward = mlp._backward_op
    monkeypatch.setattr(
        mlp, "_backward_op", lambda dy, y, activation, dtype: backward(dy, y, "relu2", dtype)
    )


def _break_bias_sum(monkeypatch):
    whole = mlp.sum_partials
    monkeypatch.setattr(
        mlp, "sum_partials", lambda p, *dtypes: whole(p[:, 1:].contiguous(), *dtypes)
    )


DAMAGES = {
    "sign of y lost": (_break_saved, {"dx", "dweight", "dbias"}),
    "another activation's gradient": (_break_activation, {"dx", "dweight", "dbias"}),
    "a partial sum lost": (_break_bias_sum, {"dbias"}),
}


@pytest.mark.parametrize("damage, caught", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_caught(device, choose, monkeypatch, damage, caught):
    choose("triton")
    damage(monkeypatch)
    inputs, gradient = make_inputs(device, (40, 8), 12, torch.float32)
    results = comparisons(
        lambda *t: linear_act(*t, backend="triton"), lambda *t: plain(*t, "relu"), inputs, gradient
    )
    assert {result.name for result in results if not result.passed} == caught


ERRORS = {
    "activation": ({"activation": "tanh"}, ValueError, "one of relu, gelu, relu2; got 'tanh'"),
    "x dtype": ({"x": torch.zeros(3, 8).long()}, TypeError, "x must be .* got torch.int64"),
    "x shape": ({"x": torch.zeros(3, 7)}, ValueError, r"got x \(3, 7\), weight \(4, 8\)"),
    "no channels": (
        {"x": torch.zeros(3, 0), "weight": torch.zeros(4, 0)},
        ValueError,
        r"K must be at least 1; got x \(3, 0\)",
    ),
    "scalar x": ({"x": torch.zeros(())}, ValueError, r"got x \(\), weight \(4, 8\)"),
    "weight shape": ({"weight": torch.zeros(8)}, ValueError, r"got x \(3, 8\), weight \(8,\)"),
    "bias shape": ({"bias": torch.zeros(8)}, ValueError, r"bias must be \(N,\) with N 4.* \(8,\)"),
    "mixed dtypes": (
        {"weight": torch.zeros(4, 8).half()},
        TypeError,
        r"dtypes must agree \(.*\); got x torch.float32, weight torch.float16",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
    "device": ({"weight": torch.zeros(4, 8, device="meta")}, ValueError, "got cpu, meta"),
    "float64": (
        {
            "x": torch.zeros(3, 8).double(),
            "weight": torch.zeros(4, 8).double(),
            "bias": None,
            "backend": "triton",
        },
        TypeError,
        "float64 needs backend='eager'",
    ),
}


@pytest.mark.parametrize("double", ["x", "weight"])
def test_autocast_leaves_float64_alone(double):
    tensors = {"x": torch.zeros(3, 8), "weight": torch.zeros(4, 8)}
    tensors[double] = tensors[double].double()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="float64 alone"):
        linear_act(**tensors)


@pytest.mark.parametrize("changes, error, message", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_rule_and_the_values(device, changes, error, message):
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(4, 8), "bias": torch.zeros(4)}
    arguments |= changes
    if "backend" in changes:
        arguments |= {name: x.to(device) for name, x in arguments.items() if torch.is_tensor(x)}
    with pytest.raises(error, match=f"^linear_act: .*{message}"):
        linear_act(**arguments)


def test_the_plan_takes_the_epilogue_where_there_is_one():
    def library(activation, dtype=torch.bfloat16, has_bias=True, needs_z=False, arch="sm_90"):
        return mlp.linear_act_plan(arch, activation, dtype, has_bias, needs_z).library

    assert library("relu") and library("gelu")
    assert not library("relu", has_bias=False)
    assert not library("gelu", needs_z=True) and not library("relu2")
    assert library("relu2", torch.float32) and library("relu2", arch="interpreter")


@pytest.mark.parametrize("activation", ("relu", "gelu", "relu2"))
def test_torch_func(activation):
    x, weight = torch.randn(5, 4), torch.randn(6, 4)

    def loss(x):
        return linear_act(x, weight, activation=activation).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.grad(loss)(x), expected, atol=1e-5)
