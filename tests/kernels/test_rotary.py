"""rotary_qkv against float64, by the 2x rule, on both backends, and what rotation is for."""

import pytest
import torch

from kernels import backend as backend_module
from kernels import causal_attention_qkv, rotary_qkv, rotary_table
from kernels.rotary import rotary_reference
from kernels.verify import compare

BACKENDS = ("eager", "triton")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CASES = {
    "B0-T4-H2-D8": (0, 4, 2, 8),
    "B2-T65-H3-D64": (2, 65, 3, 64),
    "B1-T1-H1-D2": (1, 1, 1, 2),
    "B3-T31-H2-D86": (3, 31, 2, 86),
    "B1-T130-H1-D256": (1, 130, 1, 256),
}


def run(function, qkv, dtype):
    """y and the gradient of qkv, computed in `dtype`."""
    leaf = qkv.detach().to(dtype).requires_grad_()
    y = function(leaf)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(y, leaf, dy.half().to(y))
    return {"y": y.detach(), "dqkv": gradient}


@pytest.mark.parametrize("normalize", (False, True), ids=("plain", "normalized"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients(device, backend, case, dtype, normalize):
    B, T, H, D = CASES[case]
    qkv = torch.randn(B, T, 3, H, D, generator=torch.Generator().manual_seed(0))
    qkv = qkv.to(device, DTYPES[dtype]).float()
    table = rotary_table(T + 4, D, device=device)[4:]

    def fused(x):
        return rotary_qkv(x, table, normalize=normalize, backend=backend)

    def plain(x):
        return rotary_reference(x, table, normalize=normalize)

    actual, ordinary = (run(f, qkv, DTYPES[dtype]) for f in (fused, plain))
    exact = run(plain, qkv, torch.float64)
    for name in exact:
        result = compare(name, actual[name], ordinary[name], exact[name])
        assert result.passed, str(result)
    assert torch.equal(actual["y"][:, :, 2], qkv[:, :, 2].to(DTYPES[dtype]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(device, backend):
    """Of the input and of its gradient: the same numbers to the bit, which reruns are, too."""
    qkv = torch.randn(7, 2, 3, 8, 2, device=device).permute(1, 0, 2, 4, 3)
    dy = torch.randn(1, 7, 3, 1, 8, device=device).expand(2, 7, 3, 2, 8)
    table = rotary_table(7, 8, device=device)

    def results(qkv, dy):
        qkv = qkv.detach().requires_grad_()
        y = rotary_qkv(qkv, table, normalize=True, backend=backend)
        return y, *torch.autograd.grad(y, qkv, dy)

    assert not qkv.is_contiguous() and not dy.is_contiguous()
    assert all(map(torch.equal, results(qkv, dy), results(qkv.contiguous(), dy.contiguous())))


def test_offsets_past_32_bits(device, monkeypatch, far_apart):
    """Of one head's queries, as if another token's were so many other programs' heads away."""
    count, place = far_apart
    inputs = [torch.randn(1, count, 3, 1, 16).to(device, torch.float16) for _ in range(2)]
    table, launch = rotary_table(count, 16, device=device), backend_module.launch

    def widened(kernel, grid, qkv, dy, table, y, T, H, *args, **kwargs):
        near = [None if x is None else x[0, :, 0, 0] for x in (qkv, dy, y)]
        far = [None if x is None else place(x, number) for number, x in enumerate(near)]
        H = far[0].stride(0) // (3 * 16)
        launch(kernel, (1,), *far[:2], table, far[2], T, H, *args, **kwargs)
        near[2].copy_(far[2])

    def results():
        qkv, dy = inputs[0].clone().requires_grad_(), inputs[1]
        y = rotary_qkv(qkv, table, normalize=True, backend="triton")
        return [x[:, :, 0] for x in (y, *torch.autograd.grad(y, qkv, dy))]

    expected = results()
    monkeypatch.setattr(backend_module, "launch", widened)
    assert all(map(torch.equal, results(), expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_dtype_of_the_projection(device, backend):
    """Forward and backward."""
    qkv = torch.randn(2, 7, 3, 2, 8, device=device)
    table = rotary_table(7, 8, device=device)

    def function(x):
        return rotary_qkv(x, table, normalize=True, backend=backend)

    expected = run(function, qkv, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        actual = run(function, qkv, torch.float32)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shape", ((0, 5), (1, 1), (2, 7)), ids=str)
def test_attention_turns_first_and_leaves_its_input_alone(shape):
    B, T = shape
    qkv = torch.randn(B, T, 3, 2, 8, requires_grad=True)
    before, table = qkv.detach().clone(), rotary_table(T, 8)
    both = causal_attention_qkv(qkv, angles=table, normalize=True)
    (actual,) = torch.autograd.grad(both.square().sum(), qkv)
    apart = causal_attention_qkv(rotary_qkv(qkv, table, normalize=True))
    (expected,) = torch.autograd.grad(apart.square().sum(), qkv)
    assert torch.equal(qkv, before)
    torch.testing.assert_close(both, apart)
    torch.testing.assert_close(actual, expected)


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 16, dtype=torch.float64)
    qkv = torch.stack((q, k, k))[None, None, :, None].expand(1, 50, 3, 1, 16)
    y = rotary_qkv(qkv, rotary_table(50, 16))[0, :, :, 0]
    scores = y[:, 0] @ y[:, 1].T
    for distance in (-7, 0, 12):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5 * scores.abs().max()
    assert (scores[0] - scores[0, 0]).abs().max() > 0.1 * scores.abs().max()


def test_normalized_rows_have_length_one():
    qkv = 30 * torch.randn(2, 5, 3, 2, 8)
    y = rotary_qkv(qkv, rotary_table(5, 8), normalize=True)
    rms = y[:, :, :2].square().mean(-1).sqrt()
    assert torch.allclose(rms, torch.ones_like(rms), atol=1e-5)


def test_the_gradient_in_float64():
    qkv = torch.randn(2, 3, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    table = rotary_table(3, 6)
    assert torch.autograd.gradcheck(lambda x: rotary_qkv(x, table, normalize=True), (qkv,))


def test_torch_func():
    qkv, table = torch.randn(1, 3, 3, 2, 4), rotary_table(3, 4)

    def loss(x):
        return rotary_qkv(x, table, normalize=True).square().sum()

    leaf = qkv.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.grad(loss)(qkv), expected, rtol=1e-5, atol=1e-5)


def test_opcheck(device):
    qkv = torch.randn(1, 9, 3, 2, 16, device=device, requires_grad=True)
    op = torch.ops.kernels.rotary_forward.default
    torch.library.opcheck(op, (qkv, rotary_table(9, 16, device=device), True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(device, backend):
    qkv = torch.randn(1, 9, 3, 2, 16, device=device)
    table = rotary_table(9, 16, device=device)

    def f(x):
        return rotary_qkv(x, table, normalize=True, backend=backend)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(qkv), f(qkv), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "rows", "dtype", "error", "words"),
    (
        ((2, 3, 2, 1, 8), 3, torch.float32, ValueError, "qkv must be"),
        ((2, 3, 3, 1, 7), 3, torch.float32, ValueError, "even D"),
        ((2, 3, 3, 1, 8), 4, torch.float32, ValueError, "table must be"),
        ((2, 3, 3, 1, 8), 3, torch.int64, TypeError, "qkv must be float32"),
    ),
    ids=("places", "odd", "table", "dtype"),
)
def test_bad_input(shape, rows, dtype, error, words):
    with pytest.raises(error, match=f"rotary_qkv: .*{words}"):
        rotary_qkv(torch.zeros(shape, dtype=dtype), rotary_table(rows, 8))


def test_odd_head_size_has_no_table():
    with pytest.raises(ValueError, match="rotary_table: .*even and not negative; got 7"):
        rotary_table(4, 7)
    with pytest.raises(ValueError, match="rotary_table: .*even and not negative; got -2"):
        rotary_table(4, -2)
    with pytest.raises(ValueError, match="rotary_table: T must not be negative; got -1"):
        rotary_table(-1, 8)


@pytest.mark.parametrize("places", ("odd offset", "odd rows", "apart"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_may_lie_anywhere(device, backend, places):
    qkv = torch.randn(1, 3, 3, 1, 8, device=device)
    table = rotary_table(3, 8, device=device)
    room = {
        "odd offset": torch.zeros(25, device=device)[1:].view(3, 4, 2),
        "odd rows": torch.zeros(3, 9, device=device)[:, :8].unflatten(1, (4, 2)),
        "apart": torch.zeros(3, 4, 4, device=device)[..., ::2],
    }[places]
    expected, actual = (
        run(lambda x: rotary_qkv(x, t, backend=backend), qkv, torch.float32)  # noqa: B023
        for t in (table, room.copy_(table))
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_second_derivative_is_refused():
    qkv = torch.randn(1, 3, 3, 1, 8, requires_grad=True)
    y = rotary_qkv(qkv, rotary_table(3, 8), normalize=True)
    with pytest.raises(RuntimeError, match="rotary_qkv: second derivatives are not implemented"):
        torch.autograd.grad(y.sum(), qkv, create_graph=True)


def test_triton_refuses_float64(device):
    qkv = torch.zeros(1, 2, 3, 1, 4, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="float64 needs backend='eager'"):
        rotary_qkv(qkv, rotary_table(2, 4, device=device), backend="triton")


@pytest.mark.parametrize("normalize", (False, True), ids=("plain", "normalized"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_the_backward_reads_is_kept(device, backend, normalize):
    kept = []
    qkv = torch.randn(2, 7, 3, 2, 8, device=device, requires_grad=True)
    table = rotary_table(7, 8, device=device)

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rotary_qkv(qkv, table, normalize=normalize, backend=backend)
    assert (max(kept) >= 2 / 3 * qkv.numel()) == normalize
