"""Linear, bias and activation: the first half of a feed-forward network.

    z = x weight^T + bias                              x (M, K), weight (N, K), y, z (M, N)
    y = relu(z), relu(z)^2 or gelu(z) = z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))

    dz = dy * act'(z), dbias = sum_M dz, dx = dz weight, dweight = dz^T x

act' needs only y for ReLU (y > 0) and ReLU^2 (2 sqrt(y)); GELU keeps z, and so does ReLU^2 in
float16, where squares of numbers below 0.008 have lost bits. Hendrycks, Gimpel 2016,
arXiv:1606.08415; So et al. 2021, "Primer", arXiv:2109.08668.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import backend
from kernels.backend import autocast_dtype, jit, tl
from kernels.reduce import sum_partials

ACTIVATIONS = ("relu", "gelu", "relu2")

# ---------------------------------------------------------------------------------------- eager


def _eager_linear_act(x, weight, bias, activation):
    if activation == "relu":
        # F.linear keeps no output, so relu_ costs neither memory nor a copy: not on its views,
        # though, which the products of (..., K) are, for autograd copies what they look at.
        z = F.linear(x.reshape(-1, x.shape[-1]), weight, bias).relu_()
        return z.view(*x.shape[:-1], z.shape[-1])
    z = F.linear(x, weight, bias)
    if activation == "gelu":
        return F.gelu(z, approximate="tanh")
    if backend.traced():
        return z.relu().square()
    return _SquaredReLU.apply(z)


class _SquaredReLU(torch.autograd.Function):
    """relu(z)^2 in place of z, which is no longer needed: one pass forward and two backward."""

    @staticmethod
    def forward(ctx, z):
        z.relu_()
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx, dy):
        (r,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative has the gate, too, which `r` has passed
            r = r.relu()
        return (dy * r).mul_(2)


# -------------------------------------------------------------------------------------- kernels


@jit
def _gelu_gate(z):
    """gate = gelu(z) / z = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), and gate * (1 - gate).

    Both from exp(-|2 u|), so that neither overflows nor cancels; u is the tanh's argument above.
    """
    power = z * (2.302208198144325 + 0.1029432395800235 * (z * z))  # 2 u log2(e)
    e = tl.exp2(-tl.abs(power))
    r = 1 / (1 + e)
    return tl.where(power >= 0, r, e * r), e * r * r


@jit
def _positive(z):
    """max(z, 0), and NaN of NaN: of a GPU's plain maximum it would be 0, and the loss finite."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def _activate(z, ACTIVATION: tl.constexpr):
    """act(z), float32."""
    if ACTIVATION == "gelu":
        gate, _ = _gelu_gate(z)
        y = z * gate
    else:
        y = _positive(z)
        if ACTIVATION == "relu2":
            y *= y
    return y


@jit
def _activation_backward(dy, saved, ACTIVATION: tl.constexpr, KEPT_Z: tl.constexpr):
    """dy * act'(z), float32, from what was saved: y, or KEPT_Z."""
    if ACTIVATION == "relu":
        dz = tl.where(saved > 0, dy, 0.0)
    elif ACTIVATION == "relu2":
        dz = dy * (2 * (_positive(saved) if KEPT_Z else tl.sqrt(saved)))
    else:
        gate, dgate = _gelu_gate(saved)
        slope = 1.5957691216057308 + 0.2140644488178 * (saved * saved)  # 2 du/dz
        dz = dy * (gate + saved * dgate * slope)
    return dz


@jit
def _linear_act_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,) or None
    y_ptr,  # (M, N) contiguous
    z_ptr,  # (M, N) contiguous, or None
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter's bfloat16 products are wrong
):
    """Program i owns one output tile; GROUP_M tile rows go together so that weights stay in L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP_M * tiles_n)
    group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    rows = (group * GROUP_M + within % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (within // group_rows) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = rows < M, cols < N
    rows = rows.to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    # Rows and columns past the edge are never stored, so they may read any valid address.
    x_rows = x_ptr + tl.where(mask_m, rows, 0)[:, None] * stride_xm
    weight_cols = weight_ptr + tl.where(mask_n, cols, 0).to(tl.int64)[None, :] * stride_wn
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + ks
        x_ptrs = x_rows + k[None, :].to(tl.int64) * stride_xk
        weight_ptrs = weight_cols + k[:, None].to(tl.int64) * stride_wk
        x = tl.load(x_ptrs, k[None, :] < K, other=0.0)
        w = tl.load(weight_ptrs, k[:, None] < K, other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        accumulator = tl.dot(x, w, accumulator, input_precision=PRECISION)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols.to(tl.int64) * stride_b, mask_n, other=0.0)
        accumulator += bias.to(tl.float32)[None, :]
    offsets = rows[:, None] * N + cols[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    z = accumulator.to(y_ptr.dtype.element_ty)
    if z_ptr is not None:
        tl.store(z_ptr + offsets, z, mask)
    y = _activate(z.to(tl.float32), ACTIVATION)  # of the rounded z, which the backward sees
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)


@jit
def _activation_backward_kernel(
    dy_ptr,  # (M, N)
    saved_ptr,  # (M, N) contiguous: z if KEPT_Z, else y
    dz_ptr,  # (M, N) contiguous
    partials_ptr,  # (1, P, N) float32: dbias; or None
    M,
    N,
    stride_dym,
    stride_dyn,
    P,
    ACTIVATION: tl.constexpr,
    KEPT_Z: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (j, i) owns column tile j, row tiles i, i + P, ... and that part of partial row i."""
    program = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(program, tl.cdiv(M, BLOCK_M), P):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (rows < M)[:, None] & mask_n[None, :]
        offsets = rows[:, None] * N + cols[None, :]
        dy_offsets = rows[:, None] * stride_dym + cols[None, :].to(tl.int64) * stride_dyn
        dy = tl.load(dy_ptr + dy_offsets, mask, other=0.0).to(tl.float32)
        saved = tl.load(saved_ptr + offsets, mask, other=0.0).to(tl.float32)
        dz = _activation_backward(dy, saved, ACTIVATION, KEPT_Z)
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask)
        if partials_ptr is not None:
            dbias += dz
    if partials_ptr is not None:
        tl.store(partials_ptr + program * N + cols, tl.sum(dbias, 0), mask_n)


# ------------------------------------------------------------------------------------ launchers


@dataclass(frozen=True)
class LinearActPlan:
    """How the forward runs: `library` (cuBLASLt and a pass over z) or the Triton GEMM's tiles."""

    library: bool
    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 32
    num_warps: int = 8
    num_stages: int = 4


def linear_act_plan(
    architecture: str, activation: str, dtype: torch.dtype, has_bias: bool, needs_z: bool
) -> LinearActPlan:
    """Reasoned, not yet measured (python -m bench mlp does): what each way moves beside the GEMM.

    With S = M * N * itemsize, 50 MB or 12 us at 4.3 TB/s for the notebook's 16,384 x 1,536 in
    bf16, beside a GEMM of 24 us at the full 790 TFLOP/s:

        relu    library: nothing, its epilogue does it        Triton: nothing
        relu2   library: 2 S, squares y in place              Triton: nothing
        gelu    library: 2 S, reads z and writes y            Triton: S, writes z as well
                without gradients nothing, an epilogue        Triton: nothing

    So the library wins where it has an epilogue (which needs a bias); elsewhere Triton may run its
    GEMM at half the library's rate before it loses. float32 stays with the library, whose TF32
    switch users know. The backward is the same for both.

    At K = 384 GELU of a tile takes about as many clocks to issue as its products, some 3,000, so a
    multiprocessor should hold two programs, one for each. With BLOCK_K = 32 it does; with 64 GELU
    holds 135 registers a thread on sm_90 and 160 on sm_80, and there is one (python -m
    kernels.codegen --op linear_act).
    """
    epilogue = has_bias and (activation == "relu" or (activation == "gelu" and not needs_z))
    if epilogue or dtype == torch.float32 or architecture == "interpreter":
        return LinearActPlan(library=True)
    if architecture.startswith("gfx"):
        return LinearActPlan(library=False, num_stages=2)
    return LinearActPlan(library=False)


def _keeps_z(activation: str, dtype: torch.dtype) -> bool:
    """Whether the backward needs z itself."""
    return activation == "gelu" or (activation == "relu2" and dtype == torch.float16)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _library_forward(x, weight, bias, activation, needs_z):
    """y and, if needed, z (M, N) through the BLAS."""
    if bias is None:
        z = x @ weight.t()
    elif activation != "gelu":
        z = torch._addmm_activation(bias, x, weight.t())  # relu
    elif needs_z or not x.is_cuda:  # on the CPU the epilogue is the other, the erf GELU
        z = torch.addmm(bias, x, weight.t())
    else:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True), None
    if activation == "gelu":
        return F.gelu(z, approximate="tanh"), z
    z = z.relu_() if bias is None else z
    if activation == "relu2":
        return (z.square(), z) if needs_z else (z.square_(), None)
    return z, None


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    needs_z: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (..., N), and z (M, N) or, where it is not needed, an empty tensor."""
    rows = _rows(x)
    (M, K), N = rows.shape, weight.shape[0]
    shape, device = (*x.shape[:-1], N), x.device
    plan = linear_act_plan(
        backend.architecture(device), activation, x.dtype, bias is not None, needs_z
    )
    if plan.library:
        y, z = _library_forward(rows, weight, bias, activation, needs_z)
        return y.view(shape), z if needs_z else x.new_empty(0)
    y = torch.empty(shape, dtype=x.dtype, device=device)
    z = torch.empty((M, N) if needs_z else 0, dtype=x.dtype, device=device)
    backend.launch(
        _linear_act_kernel,
        (-(-M // plan.BLOCK_M) * -(-N // plan.BLOCK_N),),
        rows,
        weight,
        bias,
        y,
        z if needs_z else None,
        M,
        N,
        K,
        *rows.stride(),
        *weight.stride(),
        1 if bias is None else bias.stride(0),
        ACTIVATION=activation,
        PRECISION=backend.product_precision(x),
        BLOCK_M=plan.BLOCK_M,
        BLOCK_N=plan.BLOCK_N,
        BLOCK_K=plan.BLOCK_K,
        GROUP_M=8,
        UPCAST=backend.interpreting(),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    return y, z


def _backward(
    dy: torch.Tensor, saved: torch.Tensor, activation: str, bias_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """dz (M, N) and dbias (N,), empty without a bias."""
    dy, saved = _rows(dy), _rows(saved)
    (M, N), device = saved.shape, saved.device
    dz = torch.empty(M, N, dtype=saved.dtype, device=device)
    architecture = backend.architecture(device)
    BLOCK_M, BLOCK_N, num_warps = 16, 256, 4
    tiles_n = -(-N // BLOCK_N)
    # About eight programs a multiprocessor in all; fewer partial rows where columns abound.
    programs = 4 if architecture == "interpreter" else 8 * backend.multiprocessors(device)
    P = max(1, programs // tiles_n)
    partials = torch.empty(1, P, N, dtype=torch.float32, device=device)
    backend.launch(
        _activation_backward_kernel,
        (tiles_n, P),
        dy,
        saved,
        dz,
        partials if bias_dtype is not None else None,
        M,
        N,
        *dy.stride(),
        P=P,
        ACTIVATION=activation,
        KEPT_Z=_keeps_z(activation, saved.dtype),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=num_warps,
    )
    if bias_dtype is None:
        return dz, dz.new_empty(0)
    return dz, *sum_partials(partials, bias_dtype)


# ------------------------------------------------------------------------------------- autograd

_forward_op = backend.operator("linear_act_forward", _forward)
_backward_op = backend.operator("activation_backward", _backward)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.activation, _ = inputs
    y, z = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)  # z has none, and zeros would be a kernel
    ctx.save_for_backward(x, weight, z if _keeps_z(ctx.activation, y.dtype) else y)


def _autograd_backward(ctx, dy, _dz):
    x, weight, saved = ctx.saved_tensors
    if dy is None:
        return (None,) * 5
    dz, dbias = _backward_op(dy, saved, ctx.activation, ctx.bias_dtype)
    dx = (dz @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
    dweight = dz.t() @ _rows(x) if ctx.needs_input_grad[1] else None
    return dx, dweight, None if ctx.bias_dtype is None else dbias, None, None


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)

# --------------------------------------------------------------------------------------- public


def linear_act(x, weight, bias=None, *, activation="relu", backend="auto"):
    """A linear layer and its activation in one step.

    y = act(x weight^T + bias)

    Args:
        x: (..., K); float32, float16, bfloat16, or float64 (eager only); any strides.
        weight: (N, K), bias: (N,); dtype of x, or any under autocast.
        activation: "relu", "gelu" (tanh approximation) or "relu2", relu squared.
        backend: "auto", "triton" or "eager".
    Returns: y, (..., N), dtype of x, or under autocast autocast's.
    Raises: ValueError on shapes or names; TypeError on dtypes; RuntimeError if the backend cannot
        run.
    Source: arXiv:1606.08415 (GELU), arXiv:2109.08668 (ReLU^2).
    """
    where = _check(x, weight, bias, activation, backend)
    if where == "eager":
        return _eager_linear_act(x, weight, bias, activation)
    dtype = autocast_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    needs_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)
    )
    needs_z = needs_gradient and _keeps_z(activation, dtype)
    return _forward_op(x, weight, bias, activation, needs_z)[0]


def _check(x, weight, bias, activation, choice) -> str:
    """The backend, once the arguments obey the rules."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"linear_act: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise TypeError(
                f"linear_act: {name} must be float32, float16, bfloat16 or float64; "
                f"got {tensor.dtype}"
            )
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_act: x must be (..., K) and weight (N, K); "
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_act: bias must be (N,) with N {weight.shape[0]}, the rows of weight; "
            f"got {tuple(bias.shape)}"
        )
    if not x.shape[-1]:
        raise ValueError(f"linear_act: K must be at least 1; got x {tuple(x.shape)}")
    where = backend.resolve("linear_act", choice, x, weight, bias)
    if len({autocast_dtype(tensor) for tensor in tensors.values()}) > 1:
        got = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise TypeError(f"linear_act: dtypes must agree (autocast leaves float64 alone); got {got}")
    if where == "triton" and x.dtype == torch.float64:
        raise TypeError(f"linear_act: float64 needs backend='eager'; got x {x.dtype}")
    return where
