"""cross_entropy and linear_cross_entropy against float64, by the 2x rule, on both backends."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import cross_entropy, cross_entropy_kernels, embed, linear_cross_entropy
from kernels.verify import compare

module = importlib.import_module("kernels.cross_entropy")  # the package exports the function
BACKENDS = ("eager", "triton")
REDUCTIONS = ("mean", "sum", "none")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IGNORED = -100


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that an op allocates and forgets to write holds NaN."""

    def poison(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def chunked(monkeypatch):
    """Chunks of 8 rows at any size a test can afford."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 0)
    monkeypatch.setattr(module, "_CHUNK_ROWS", 8)


def make_targets(device, shape, V, seed=0):
    """Random targets, about one in six ignored, the last class and an ignored row among them."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 1 / 6] = IGNORED
    targets.view(-1)[0] = V - 1
    if targets.numel() > 1:
        targets.view(-1)[1] = IGNORED
    return targets.to(device)


def randn(device, *shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def plain(logits, targets, **options):
    """F.cross_entropy; 16-bit logits in float32, as autocast has it."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), **options)
    return loss.reshape(targets.shape) if loss.ndim else loss


def plain_linear(x, weight, bias, targets, **options):
    return plain(F.linear(x, weight, bias), targets, **options)


def run(function, inputs, dtype=None, scale=1.0):
    """The loss of function(*inputs) and every gradient, the inputs cast to `dtype` first."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs
    ]
    loss = function(*leaves)
    gradient = scale * (1 + randn(loss.device, *loss.shape, seed=2) / 4).to(loss.dtype)
    loss.backward(gradient)
    return {"loss": loss.detach()} | {
        f"d{i}": leaf.grad for i, leaf in enumerate(leaves) if leaf is not None
    }


def comparisons(fused, reference, inputs, scale=1.0):
    """One Comparison for the loss and each gradient."""
    actual = run(fused, inputs, scale=scale)
    ordinary = run(reference, inputs, scale=scale)
    exact = run(reference, inputs, torch.float64, scale=scale)
    return [compare(name, actual[name], ordinary[name], exact[name]) for name in exact]


def assert_passed(results):
    failures = [str(result) for result in results if not result.passed]
    assert not failures, "\n".join(failures)


LOGITS = {
    "V1": (3, 5, 1),
    "V2": (7, 2),
    "V3": (9, 3),
    "V64": (5, 64),
    "V65": (2, 19, 65),
    "V1000": (3, 1000),
    "V1025": (9, 1025),
    "V8193": (3, 8193),
    "V50257": (2, 50257),
}
CASES = [
    *[("V65", dtype, reduction) for dtype in DTYPES for reduction in REDUCTIONS],
    *[(shape, "fp32", "mean") for shape in LOGITS if shape != "V65"],
    *[(shape, "fp16", "none") for shape in ("V1", "V8193")],
]


@pytest.mark.parametrize("shape, dtype, reduction", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy(device, poisoned, backend, shape, dtype, reduction):
    *leading, V = LOGITS[shape]
    logits = 3 * randn(device, *leading, V, dtype=DTYPES[dtype])
    targets = make_targets(device, leading, V)
    assert_passed(
        comparisons(
            lambda z: cross_entropy(z, targets, reduction=reduction, backend=backend),
            lambda z: plain(z, targets, reduction=reduction),
            [logits],
        )
    )


STRIDES = {
    "last-token": lambda z: z[:, -1:],
    "padded-columns": lambda z: z[..., 3:68],
    "transposed-leading": lambda z: z.transpose(0, 1),
    "transposed-last": lambda z: z.transpose(1, 2),
    "expanded": lambda z: z[:1].expand_as(z),
}


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_logits_and_targets(device, poisoned, backend, layout):
    view = STRIDES[layout]
    logits = randn(device, 4, 6, 72)
    shape = view(logits).shape
    targets = make_targets(device, (*shape[:-1], 2), shape[-1])[..., 0]
    assert_passed(
        comparisons(
            lambda z: cross_entropy(view(z), targets, backend=backend),
            lambda z: plain(view(z), targets),
            [logits],
        )
    )


@pytest.mark.parametrize("V", [65, *range(1025, 1034)])
def test_each_alignment_of_rows_in_place(device, V):
    """Gradients take the place of logits, whose neighbours in memory are neither read nor written.

    Nine rows of an odd stride begin at every multiple of 2 bytes from a multiple of 16.
    """
    memory = torch.full((9, 1041), float("nan"), device=device)
    logits, targets = memory[:, 3 : 3 + V], make_targets(device, (9,), V)
    logits.copy_(randn(device, 9, V))
    sums = {}
    for dtype in (torch.float32, torch.float64):
        z = logits.to(dtype, copy=True).requires_grad_()
        loss = plain(z, targets, reduction="none")
        sums[dtype] = loss.detach(), *torch.autograd.grad(loss.sum(), z)
    for dlogits in (torch.full((9, V), float("nan"), device=device), logits):
        losses = torch.full((9,), float("nan"), device=device)
        cross_entropy_kernels.launch_cross_entropy(
            logits, targets, None, losses, dlogits, ignore_index=IGNORED
        )
        fused = {"losses": losses, "dlogits": dlogits}
        assert_passed(map(compare, fused, fused.values(), *sums.values()))
    assert memory[:, :3].isnan().all() and memory[:, 3 + V :].isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_more_rows_than_one_block_of_losses(device, poisoned, reduction):
    targets = make_targets(device, (8200,), 2)
    assert_passed(
        comparisons(
            lambda z: cross_entropy(z, targets, reduction=reduction, backend="triton"),
            lambda z: plain(z, targets, reduction=reduction),
            [randn(device, 8200, 2)],
        )
    )


def test_tiles_of_short_rows_cover_them():
    """And no more of the first tile than the row has, which loads it without a mask of columns."""
    for V in range(1, cross_entropy_kernels.SHORT_ROWS + 1):
        plan = cross_entropy_kernels.short_plan(V)
        assert plan["MAIN"] * plan["LANES"] <= V <= (plan["MAIN"] + plan["TAIL"]) * plan["LANES"]
        assert plan["BLOCK_M"] * plan["LANES"] == 256


LINEAR = {
    "V1": ((5, 24), 1, "fp32", True),
    "V2-no-bias": ((2, 9, 16), 2, "fp32", False),
    "V65": ((3, 11, 40), 65, "fp32", True),
    "V65-fp16": ((3, 11, 40), 65, "fp16", True),
    "V300-fp16-no-bias": ((2, 17, 24), 300, "fp16", False),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_cross_entropy_in_chunks(device, poisoned, chunked, backend, case, reduction):
    shape, V, dtype, bias = LINEAR[case]
    check_linear(device, backend, shape, V, DTYPES[dtype], bias, reduction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_rows_of_several_blocks(device, poisoned, chunked, backend):
    check_linear(device, backend, (25, 8), 8200, torch.float32, False, "sum")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_cross_entropy_in_one_piece(device, poisoned, backend, dtype, reduction):
    check_linear(device, backend, (2, 9, 24), 65, DTYPES[dtype], True, reduction)


@pytest.mark.parametrize("V", [65, 1032])  # one kernel each
def test_offsets_past_32_bits(device, far_apart, V):
    count, place = far_apart
    near = randn(device, count, V, dtype=torch.float16)
    targets = torch.arange(count, device=device)

    def results(logits):
        logits = logits.detach().requires_grad_()
        loss = cross_entropy(logits, targets, reduction="none", backend="triton")
        return loss, torch.autograd.grad(loss.sum(), logits)[0]

    assert all(map(torch.equal, results(place(near, 0)), results(near)))


def check_linear(device, backend, shape, V, dtype, bias, reduction):
    inputs = [
        randn(device, *shape, dtype=dtype),
        randn(device, V, shape[-1], dtype=dtype, seed=3) / 2,
        randn(device, V, dtype=dtype, seed=4) if bias else None,
    ]
    targets = make_targets(device, shape[:-1], V)
    options = {"reduction": reduction}
    assert_passed(
        comparisons(
            lambda x, w, b: linear_cross_entropy(x, w, b, targets, backend=backend, **options),
            lambda x, w, b: plain_linear(x, w, b, targets, **options),
            inputs,
        )
    )


def linear_inputs(device, M=21, C=16, V=65, dtype=torch.float32):
    inputs = [
        randn(device, M, C, dtype=dtype),
        randn(device, V, C, dtype=dtype, seed=3),
        randn(device, V, dtype=dtype, seed=4),
    ]
    return [t.requires_grad_() for t in inputs], make_targets(device, (M,), V)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_linear_inputs(device, poisoned, chunked, backend):
    targets = make_targets(device, (6, 4), 65)
    assert_passed(
        comparisons(
            lambda x, w, b: linear_cross_entropy(
                x.transpose(0, 1), w.mT, b[::2], targets, backend=backend
            ),
            lambda x, w, b: plain_linear(x.transpose(0, 1), w.mT, b[::2], targets),
            [randn(device, 4, 6, 16), randn(device, 16, 65, seed=3), randn(device, 130, seed=4)],
        )
    )


@pytest.mark.parametrize("ignored", [7, 65, 2**40], ids=["a class", "V", "large"])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_target_ignored(device, chunked, backend, op, ignored):
    (x, weight, bias), _ = linear_inputs(device)
    targets = torch.full((21,), ignored, device=device)
    for reduction in REDUCTIONS:
        options = {"ignore_index": ignored, "reduction": reduction, "backend": backend}
        if op == "cross_entropy":
            leaves = [F.linear(x, weight, bias).detach().requires_grad_()]
            loss = cross_entropy(*leaves, targets, **options)
        else:
            leaves = [x, weight, bias]
            loss = linear_cross_entropy(*leaves, targets, **options)
        gradients = torch.autograd.grad(loss.sum(), leaves)
        assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignore_index_may_be_a_class(device, backend):
    targets = torch.tensor([0, 3, 3, 9], device=device)
    assert_passed(
        comparisons(
            lambda z: cross_entropy(z, targets, ignore_index=3, backend=backend),
            lambda z: plain(z, targets, ignore_index=3),
            [randn(device, 4, 10)],
        )
    )


@pytest.mark.parametrize("V", [65, 8200])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(device, backend, V):
    logits = randn(device, 6, V)
    logits[0] *= 1e4
    logits[1, : V - 1] = float("-inf")
    logits[2] += 6e4
    logits[3, -1] = 1e30
    targets = torch.full((6,), V - 1, device=device)
    assert_passed(
        comparisons(
            lambda z: cross_entropy(z, targets, reduction="none", backend=backend),
            lambda z: plain(z, targets, reduction="none"),
            [logits],
        )
    )


@pytest.mark.parametrize("wrong", [-1, 65])
def test_out_of_range_targets(device, chunked, wrong):
    logits = randn(device, 3, 65).requires_grad_()
    targets = torch.tensor([1, wrong, 2], device=device)
    loss = cross_entropy(logits, targets, reduction="none", backend="triton")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert logits.grad.isnan().any(1).tolist() == [False, True, False]
    message = rf"cross_entropy: targets must be in \[0, 65\) or ignore_index -100; got {wrong}"
    x, weight = randn("cpu", 3, 8), randn("cpu", 65, 8)
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits.cpu(), targets.cpu(), backend="eager")
    with pytest.raises(ValueError, match="linear_" + message):
        linear_cross_entropy(x, weight, None, targets.cpu(), backend="eager")


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(device, backend):
    x = randn(device, 0, 4).requires_grad_()
    weight = randn(device, 9, 4).requires_grad_()
    targets = torch.zeros(0, dtype=torch.int64, device=device)
    for op in (
        lambda **o: cross_entropy(x @ weight.mT, targets, backend=backend, **o),
        lambda **o: linear_cross_entropy(x, weight, None, targets, backend=backend, **o),
    ):
        assert op(reduction="mean").isnan()
        assert op(reduction="none").shape == (0,)
        dx, dweight = torch.autograd.grad(op(reduction="sum"), [x, weight])
        assert dx.shape == x.shape and (dweight == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_gives_the_same(device, chunked, backend, reduction):
    """The first one frees what the forward computed; the second computes it again."""
    inputs, targets = linear_inputs(device)
    loss = linear_cross_entropy(*inputs, targets, reduction=reduction, backend=backend)
    gradient = randn(device, *loss.shape)
    first = torch.autograd.grad(loss, inputs, gradient, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, inputs, 2 * gradient, retain_graph=True)
    for once, twice, clone in zip(first, second, kept, strict=True):
        torch.testing.assert_close(2 * once, twice, rtol=1e-6, atol=1e-7)
        assert torch.equal(once, clone)


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reruns_are_bit_identical(device, chunked, backend, op):
    inputs, targets = linear_inputs(device, dtype=torch.float16)

    def once():
        if op == "linear_cross_entropy":
            return run(lambda *i: linear_cross_entropy(*i, targets, backend=backend), inputs)
        logits = F.linear(*inputs)
        return run(lambda z: cross_entropy(z, targets, backend=backend), [logits])

    first, second = once(), once()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_keeps_gradients_under_a_loss_scale(device, chunked, backend):
    """float16 holds neither dlogits / N, too small, nor the loss scale, too large."""
    M, V = 64, 65
    inputs = [
        randn(device, M, 16, dtype=torch.float16),
        randn(device, V, 16, dtype=torch.float16, seed=3) / 8,
        randn(device, V, dtype=torch.float16, seed=4),
    ]
    targets = make_targets(device, (M,), V)
    assert_passed(
        comparisons(
            lambda *i: linear_cross_entropy(*i, targets, backend=backend) / 1024,
            lambda *i: plain_linear(*i, targets) / 1024,
            inputs,
            scale=2.0**17,
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_chunks_are_float32(device, chunked, backend):
    """Five rows of each chunk count, and float16 cannot hold the sum of five 1365 / 4096."""
    x, weight, bias = (torch.zeros(n, device=device).half() for n in ((40, 4), (3, 4), 3))
    targets = torch.where(torch.arange(40, device=device) % 8 < 5, 0, IGNORED)
    options = IGNORED, "sum", torch.float16, (True, True, True), backend
    _, _, dx, dweight, dbias = module._linear_cross_entropy_op(
        x + 1, weight, bias, targets, None, *options
    )
    assert torch.equal(dweight[1:], torch.full((2, 4), 25 * 1365 / 4096, device=device))
    each = 1365 / 4096 if backend == "triton" else 1 / 3  # which rounds for the products alone
    torch.testing.assert_close(dbias[1:], torch.full((2,), 25 * each, device=device))
    assert dx.dtype == (torch.float16 if backend == "triton" else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_weight(device, chunked, backend):
    """Gradients of the embedding and of the head meet in one weight."""
    idx = torch.randint(0, 65, (3, 7), generator=torch.Generator().manual_seed(0)).to(device)
    targets = make_targets(device, (3, 7), 65)

    def fused(weight):
        x = embed(idx, weight, None, backend=backend)
        return linear_cross_entropy(x, weight, None, targets, backend=backend)

    assert_passed(
        comparisons(
            fused,
            lambda weight: plain_linear(F.embedding(idx, weight), weight, None, targets),
            [randn(device, 65, 16)],
        )
    )


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), ()], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_needed_gradients(device, chunked, backend, needed):
    inputs, targets = linear_inputs(device)
    full = torch.autograd.grad(linear_cross_entropy(*inputs, targets, backend=backend), inputs)
    inputs = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
    loss = linear_cross_entropy(*inputs, targets, backend=backend)
    assert loss.requires_grad == bool(needed)
    for i in needed:
        (gradient,) = torch.autograd.grad(loss, inputs[i], retain_graph=True)
        torch.testing.assert_close(gradient, full[i], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_no_gradient_is_computed_under_no_grad(device, chunked, monkeypatch, op):
    written, launch = [], cross_entropy_kernels.launch

    def spy(kernel, grid, *args, **kwargs):
        written.append(kwargs.get("GRADIENT", False))
        launch(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(cross_entropy_kernels, "launch", spy)
    inputs, targets = linear_inputs(device)
    with torch.no_grad():
        if op == "cross_entropy":
            cross_entropy(F.linear(*inputs).requires_grad_(), targets, backend="triton")
            with torch.enable_grad():
                cross_entropy(F.linear(*inputs).detach(), targets, backend="triton")
        else:
            linear_cross_entropy(*inputs, targets, backend="triton")
    assert written and not any(written)


def test_gradcheck_in_chunks(chunked):
    inputs, targets = linear_inputs("cpu", M=19, C=3, V=5, dtype=torch.float64)
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(
            lambda *i, r=reduction: linear_cross_entropy(*i, targets, reduction=r), inputs
        )


def test_a_second_derivative_is_refused_not_wrong(device, chunked):
    """Also where it does not flow through the incoming gradient: through saved tensors alone."""
    inputs, targets = linear_inputs(device)
    logits = randn(device, 4, 5).requires_grad_()
    losses = {
        "linear_cross_entropy": linear_cross_entropy(*inputs, targets, backend="triton"),
        "cross_entropy": cross_entropy(logits, targets.view(-1)[:4] % 5, backend="triton"),
    }
    if device.type == "cpu":
        losses["linear_cross_entropy in chunks"] = linear_cross_entropy(*inputs, targets)
    for op, loss in losses.items():
        message = f"{op.split()[0]}: second derivatives are not implemented"
        with pytest.raises(RuntimeError, match=message):
            loss.backward(create_graph=True)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made under it hold at once, those inside the custom op too."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.kernels.linear_cross_entropy.default:
            with self:
                return module._linear_cross_entropy_forward(*args)
        inputs = [t.untyped_storage() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        self.held = {StorageWeakRef(s): 0 for s in inputs} | self.held
        outputs = function(*args, **(kwargs or {}))
        made = [t.untyped_storage() for t in tree_leaves(outputs) if torch.is_tensor(t)]
        self.held = {StorageWeakRef(s): s.nbytes() for s in made} | self.held
        self.held = {ref: size for ref, size in self.held.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.held.values()))
        return outputs


@pytest.mark.parametrize(
    "backend, reduction, weights, most",
    [
        ("triton", "mean", torch.bfloat16, 0.1),  # 0.047 a chunk, 0.047 dweight beyond bfloat16
        ("triton", "mean", torch.float32, 0.1),  # a chunk and the weights in bfloat16
        ("triton", "none", torch.float32, 0.1),
        ("eager", "mean", torch.bfloat16, 0.26),
        ("eager", "none", torch.float32, 0.26),
    ],
)
def test_memory_beyond_the_gradients_is_a_tenth_of_the_logits(
    device, monkeypatch, backend, reduction, weights, most
):
    """16,384 tokens of 768 channels, 50,257 classes, in bfloat16; fake tensors, so that it fits."""
    M, C, V = 16384, 768, 50257

    def extra():
        with FakeTensorMode():
            x = torch.empty(M, C, device=device, dtype=torch.bfloat16, requires_grad=True)
            weight = torch.empty(V, C, device=device, dtype=weights, requires_grad=True)
            targets = torch.empty(M, device=device, dtype=torch.int64)
            with PeakMemory() as memory, torch.autocast(device.type, torch.bfloat16):
                loss = linear_cross_entropy(
                    x, weight, None, targets, reduction=reduction, backend=backend
                )
                loss.sum().backward()
            return memory.peak - x.grad.nbytes - weight.grad.nbytes

    logits = M * V * 2
    assert 0 < extra() <= most * logits
    monkeypatch.setattr(module, "CHUNK_BYTES", logits)  # one piece: the check can fail
    assert extra() >= logits


def test_chunks_at_the_sizes_that_matter():
    """16,384 rows: V = 65 in one piece; GPT-2's logits in chunks of at most 10%, tile-sized."""
    assert module._rows_per_chunk(16384, 65, 2) == 16384
    for itemsize in (2, 4):
        rows = module._rows_per_chunk(16384, 50257, itemsize)
        assert rows <= 16384 // 10 and rows % 128 == 0 and rows >= 256


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(device, chunked, backend):
    """Products run in autocast's dtype; master weights get float32 gradients, never rounded."""
    inputs, targets = linear_inputs(device)
    with torch.autocast(device.type, torch.float16):
        results = comparisons(
            lambda *i: linear_cross_entropy(*i, targets, backend=backend),
            lambda *i: plain_linear(*i, targets),
            [t.detach() for t in inputs],
        )
        loss = linear_cross_entropy(*inputs, targets, backend=backend)
    assert_passed(results)
    assert loss.dtype == torch.float32
    _, dweight, _ = torch.autograd.grad(loss, inputs)
    assert dweight.dtype == torch.float32
    assert not torch.equal(dweight, dweight.half().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_loss_of_logits_in_float32(device, backend, dtype):
    logits, targets = randn(device, 5, 65, dtype=dtype), make_targets(device, (5,), 65)
    expected = run(lambda z: cross_entropy(z, targets, backend=backend), [logits])
    with torch.autocast(device.type, torch.bfloat16):
        actual = run(lambda z: cross_entropy(z, targets, backend=backend), [logits])
    assert actual["loss"].dtype == torch.float32 and actual["d0"].dtype == dtype
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def op_samples(device):
    logits, targets = randn(device, 5, 9).requires_grad_(), make_targets(device, (5,), 9)
    (x, weight, bias), linear_targets = linear_inputs(device, 19, 8, 9)
    yield module._cross_entropy_op, (logits, targets, IGNORED, "mean", True)
    for backend, reduction in (("triton", "mean"), ("eager", "none")):
        yield (
            module._linear_cross_entropy_op,
            (
                *(x, weight, bias, linear_targets, None, IGNORED),
                *(reduction, torch.float32, [True, True, True], backend),
            ),
        )
    gradient, factor = randn(device, 5), randn(device)
    yield module._scale_op, (logits.detach(), gradient, factor, torch.float16)


def test_opcheck(device, chunked):
    for op, arguments in op_samples(device):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(device, chunked, backend):
    inputs, targets = linear_inputs(device)

    def losses(x, weight, bias):
        logits = F.linear(x, weight, bias)
        return cross_entropy(logits, targets, backend=backend) + linear_cross_entropy(
            x, weight, bias, targets, reduction="none", backend=backend
        )

    torch.compiler.reset()
    actual = run(torch.compile(losses, fullgraph=True, backend="aot_eager"), inputs)
    expected = run(losses, inputs)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-7)


def _change(**changes):
    """A launch with some arguments replaced by functions of all of them."""

    def damage(monkeypatch):
        launch = cross_entropy_kernels.launch

        def damaged(kernel, grid, *args, **kwargs):
            names = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            names |= {name: change(names) for name, change in changes.items() if name in names}
            positional = [names.pop(name) for name in kernel.arg_names]
            launch(kernel, grid, *positional, **names)

        monkeypatch.setattr(cross_entropy_kernels, "launch", damaged)

    return damage


def _replace(name, make):
    def damage(monkeypatch):
        monkeypatch.setattr(module, name, make(getattr(module, name)))

    return damage


DAMAGES = {
    "last class lost": _change(V=lambda names: names["V"] - 1),
    "last row lost": _change(M=lambda names: names["M"] - 1),
    "ignored rows count": _change(ignore_index=lambda names: -1),
    "mean not divided": _change(MEAN=lambda names: False),
    "gradient not scaled": _replace(
        "launch_scale", lambda scale: lambda x, g, f, y: scale(x, torch.ones_like(g), f, y)
    ),
    "last chunk only": _replace(
        "_accumulate_product",
        lambda accumulate: lambda total, a, b, first: accumulate(total, a, b, True),
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen(device, chunked, poisoned, monkeypatch, damage):
    (x, weight, bias), targets = linear_inputs(device)
    DAMAGES[damage](monkeypatch)
    results = comparisons(
        lambda *i: linear_cross_entropy(*i, targets, backend="triton"),
        lambda *i: plain_linear(*i, targets),
        [x, weight, bias],
    )
    assert not all(result.passed for result in results)


def test_messages(device):
    logits, targets = randn(device, 4, 5), torch.zeros(4, dtype=torch.int64, device=device)
    x, weight, bias = randn(device, 4, 3), randn(device, 5, 3), randn(device, 5)

    def rejects(error, message, function, *args, **kwargs):
        with pytest.raises(error) as caught:
            function(*args, **kwargs)
        assert str(caught.value) == message

    ce, linear = cross_entropy, linear_cross_entropy
    rejects(
        TypeError,
        "cross_entropy: logits must be a floating-point tensor; got torch.int64",
        *(ce, targets[:, None], targets),
    )
    rejects(
        ValueError,
        "cross_entropy: logits must be (..., V), V >= 1; got (4, 0)",
        *(ce, logits[:, :0], targets),
    )
    rejects(
        TypeError,
        "cross_entropy: targets must be int64; got torch.int32",
        *(ce, logits, targets.int()),
    )
    rejects(
        ValueError,
        "cross_entropy: targets must have the leading shape of logits; "
        "got targets (3,), logits (4, 5)",
        *(ce, logits, targets[1:]),
    )
    rejects(
        ValueError,
        "cross_entropy: reduction must be one of mean, sum, none; got 'median'",
        *(ce, logits, targets),
        reduction="median",
    )
    rejects(
        TypeError,
        "cross_entropy: logits must be float32, float16 or bfloat16 on the triton backend; "
        "got torch.float64",
        *(ce, logits.double(), targets),
        backend="triton",
    )
    rejects(
        ValueError,
        "linear_cross_entropy: weight must be (V, C), V, C >= 1; got (5,)",
        *(linear, x, bias, None, targets),
    )
    rejects(
        ValueError,
        "linear_cross_entropy: x must be (..., 3) as weight is; got (4, 5)",
        *(linear, logits, weight, bias, targets),
    )
    rejects(
        ValueError,
        "linear_cross_entropy: bias must be (5,) as weight is; got (4,)",
        *(linear, x, weight, bias[1:], targets),
    )
    rejects(
        ValueError,
        "linear_cross_entropy: targets must have the leading shape of x; "
        "got targets (3,), x (4, 3)",
        *(linear, x, weight, bias, targets[1:]),
    )
    rejects(
        TypeError,
        "linear_cross_entropy: dtypes must agree outside autocast; "
        "got x torch.float16, weight torch.float32, bias torch.float32",
        *(linear, x.half(), weight, bias, targets),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_the_backward_must_make_again_are_not_made(device, backend, reduction):
    """It knows the scale of each row, which "none" needs."""
    x, weight = torch.randn(9, 24, device=device), torch.randn(70, 24, device=device)
    targets = torch.arange(9, device=device)
    options = IGNORED, reduction, torch.float32, (True, True, False), backend
    _, _, *gradients = module._linear_cross_entropy_op(x, weight, None, targets, None, *options)
    made = reduction != "none"
    assert [g.numel() for g in gradients] == [made * x.numel(), made * weight.numel(), 0]


def test_targets_are_looked_at_on_a_cpu_only():
    """Elsewhere looking would make the host wait, and break a CUDA graph's capture."""

    class Looked(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            assert op is not torch.ops.aten.index.Tensor
            return op(*args, **(kwargs or {}))

    with Looked():
        module._check_range("op", torch.zeros(4, dtype=torch.int64, device="meta"), 3, IGNORED)
    with pytest.raises(AssertionError), Looked():
        module._check_range("op", torch.zeros(4, dtype=torch.int64), 3, IGNORED)
