"""Rotary positions, and the normalisation of queries and keys before them.

    n = x / sqrt(mean_D(x^2) + eps)                     with normalize; else n = x
    y[2i]     = n[2i] cos(t w_i) - n[2i + 1] sin(t w_i)         w_i = base^(-2i / D)
    y[2i + 1] = n[2i] sin(t w_i) + n[2i + 1] cos(t w_i)

    g = dy turned back by the same angles,   dx = rstd (g - n mean_D(g n)),   rstd = n / x

for x a query or a key at position t; values pass. Rotated, a query and a key meet in q.k by how far
apart they are. Su et al. 2021, "RoFormer", arXiv:2104.09864; Henry et al. 2020, "Query-Key
Normalization", arXiv:2010.04245.
"""

import torch

from kernels import backend
from kernels.backend import jit, tl, traced

EPS = 1e-6
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def rotary_table(T: int, D: int, *, base: float = 10_000.0, device=None) -> torch.Tensor:
    """Cosine and sine of every angle.

    Args:
        T: positions 0 .. T - 1.
        D: head size, even.
        base: the longest wavelength is about 2 pi base positions.
    Returns: (T, D // 2, 2) float32.
    Raises: ValueError if D is odd, or T or D negative.
    """
    if D % 2 or D < 0:
        raise ValueError(f"rotary_table: head size D must be even and not negative; got {D}")
    if T < 0:
        raise ValueError(f"rotary_table: T must not be negative; got {T}")
    frequencies = base ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.arange(T, dtype=torch.float64)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-1).to(device, torch.float32)


# ---------------------------------------------------------------------------------------- eager


def rotary_reference(qkv, table, *, normalize=False):
    """The equations, written plainly; dtype of the computation is dtype of qkv."""
    x, v = qkv[:, :, :2], qkv[:, :, 2:]
    if normalize:
        x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    cos, sin = table[:, None, None].to(qkv.dtype).unbind(-1)  # (T, 1, 1, D // 2)
    even, odd = x[..., 0::2], x[..., 1::2]
    y = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((y, v), dim=2)


def _pairs(x):
    """x (..., D) as complex numbers (..., D // 2), a view."""
    return torch.view_as_complex(x.view(*x.shape[:-1], x.shape[-1] // 2, 2))


def _turns(table):
    """table (T, D // 2, 2) as complex numbers (T, D // 2), a view unless its strides forbid one."""
    places = table.storage_offset(), *table.stride()[:-1]
    if table.stride(-1) != 1 or any(place % 2 for place in places):
        table = table.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(table)


def turn_(x, table, normalize):
    """Normalise and rotate x (..., T, D), float32 or float64, in place; returns rstd or None.

    One complex product does what six real ones would.
    """
    rstd = None
    if normalize:
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = rstd.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
        x.mul_(rstd)
    _pairs(x).mul_(_turns(table))
    return rstd


def turn_back_(g, y, table, rstd):
    """From g, the gradient of y = turn_(x), that of x, in place of g; y, if normalised, goes too.

    A turn changes no inner product, so mean_D(g n) is that of g and y before either is turned;
    the table being float32, this holds to its rounding.
    """
    if rstd is not None:
        along = (g * y).sum(-1, keepdim=True).div_(g.shape[-1])  # vecdot rounds under autocast
        g.addcmul_(y, along, value=-1).mul_(rstd)
    _pairs(g).mul_(_turns(table).conj())


class _EagerRotary(torch.autograd.Function):
    """In the fewest passes over memory; low precision computes in float32."""

    @staticmethod
    def forward(ctx, qkv, table, normalize):
        wide = torch.promote_types(qkv.dtype, torch.float32)
        y = qkv.to(wide, copy=True, memory_format=torch.contiguous_format)
        rstd = turn_(y[:, :, :2].transpose(1, 3), table, normalize)
        ctx.save_for_backward(y if normalize else None, table, rstd)
        return y.to(qkv.dtype)

    @staticmethod
    @backend.once_differentiable("rotary_qkv")
    def backward(ctx, dy):
        y, table, rstd = ctx.saved_tensors
        wide = torch.promote_types(dy.dtype, torch.float32)
        dqkv = dy.to(wide, copy=True, memory_format=torch.contiguous_format)
        g = dqkv[:, :, :2].transpose(1, 3)
        turn_back_(g, None if y is None else y[:, :, :2].transpose(1, 3), table, rstd)
        return dqkv.to(dy.dtype), None, None


# -------------------------------------------------------------------------------------- kernels


@jit
def _rotary_kernel(
    x_ptr,  # (B, T, 3, H, D) contiguous: qkv
    dy_ptr,  # like x_ptr, or None: then y is computed, else dx
    table_ptr,  # (T, D // 2, 2) contiguous
    y_ptr,  # like x_ptr: y or dx
    T,
    H,
    eps,
    NORMALIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two, at least HEAD_DIM
):
    """Program i * 3H + place owns BLOCK_M positions of one head's queries, keys or values.

    Neighbours take the places of the same positions, which lie together in memory.
    """
    tiles, place = tl.cdiv(T, BLOCK_M), tl.program_id(0) % (3 * H)
    i = tl.program_id(0) // (3 * H)
    b, tile = i // tiles, i % tiles
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (t < T)[:, None] & (offs_d < HEAD_DIM)[None, :]
    row = (b.to(tl.int64) * T + t) * (3 * H) + place
    offsets = row[:, None] * HEAD_DIM + offs_d[None, :]
    BACKWARD: tl.constexpr = dy_ptr is not None
    if BACKWARD:
        y = tl.load(dy_ptr + offsets, mask, other=0.0).to(tl.float32)
    else:
        y = tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)
    if place < 2 * H:
        if NORMALIZE:
            x = y
            if BACKWARD:
                x = tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)
            rstd = (1 / tl.sqrt(tl.sum(x * x, 1) / HEAD_DIM + eps))[:, None]
            x *= rstd
            if not BACKWARD:
                y = x
        angles = tl.load(table_ptr + t[:, None] * HEAD_DIM + offs_d[None, :], mask, other=0.0)
        cos, sin = tl.split(angles.reshape(BLOCK_M, BLOCK_D // 2, 2))
        if BACKWARD:
            sin = -sin
        even, odd = tl.split(y.reshape(BLOCK_M, BLOCK_D // 2, 2))
        y = tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(BLOCK_M, BLOCK_D)
        if NORMALIZE and BACKWARD:
            y = (y - x * (tl.sum(y * x, 1) / HEAD_DIM)[:, None]) * rstd
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)


def _launch(qkv, dy, table, normalize):
    """y of qkv, or with dy the gradient of qkv."""
    B, T, _, H, D = qkv.shape
    y = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    BLOCK_D = max(2, backend.next_power_of_2(D))
    BLOCK_M = max(1, 2048 // BLOCK_D)  # 16 elements a thread
    backend.launch(
        _rotary_kernel,
        (B * -(-T // BLOCK_M) * 3 * H,),
        qkv,
        dy,
        table,
        y,
        T,
        H,
        EPS,
        NORMALIZE=normalize,
        HEAD_DIM=D,
        BLOCK_M=BLOCK_M,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
    return y


def _forward(qkv: torch.Tensor, table: torch.Tensor, normalize: bool) -> torch.Tensor:
    return _launch(qkv.contiguous(), None, table.contiguous(), normalize)


def _backward(
    dy: torch.Tensor, qkv: torch.Tensor | None, table: torch.Tensor, normalize: bool
) -> torch.Tensor:
    dy = dy.contiguous()
    qkv = qkv.contiguous() if normalize else dy  # which nothing reads
    return _launch(qkv, dy, table.contiguous(), normalize)


# ------------------------------------------------------------------------------------- autograd

_forward_op = backend.operator("rotary_forward", _forward)
_backward_op = backend.operator("rotary_backward", _backward)


def _setup_context(ctx, inputs, output):
    qkv, table, ctx.normalize = inputs
    ctx.save_for_backward(qkv if ctx.normalize else None, table)


def _autograd_backward(ctx, dy):
    return _backward_op(dy, *ctx.saved_tensors, ctx.normalize), None, None


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)

# --------------------------------------------------------------------------------------- public


def rotary_qkv(qkv, table, *, normalize=False, backend="auto"):
    """A packed projection with rotated queries and keys.

    y[..., :2, :, :] = rotate(normalize(qkv[..., :2, :, :])), values as they are

    Args:
        qkv: (B, T, 3, H, D), D even; float32, float16, bfloat16, or float64 (eager only); any
            strides.
        table: (T, D // 2, 2) float32, the rows of `rotary_table` at the positions of qkv.
        normalize: divide every query and key by its root mean square first.
        backend: "auto", "triton" or "eager".
    Returns: y, shape and dtype of qkv, contiguous.
    Raises: ValueError on shapes; TypeError on dtypes; RuntimeError if the backend cannot run, and
        from backward with create_graph=True.
    Source: arXiv:2104.09864 (rotation of neighbouring pairs), arXiv:2010.04245 (normalisation).
    """
    where = check_table("rotary_qkv", "table", qkv, table, backend)
    if where == "triton":
        return _forward_op(qkv, table, normalize)
    if traced():
        return rotary_reference(qkv, table, normalize=normalize)
    return _EagerRotary.apply(qkv, table, normalize)


def check_table(op, name, qkv, table, choice) -> str:
    """The backend, once the arguments of `op`, which calls its table `name`, obey the rules."""
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[-1] % 2 or qkv.shape[-1] == 0:
        raise ValueError(
            f"{op}: qkv must be (B, T, 3, H, D) with an even D; got {tuple(qkv.shape)}"
        )
    expected = (qkv.shape[1], qkv.shape[-1] // 2, 2)
    if tuple(table.shape) != expected:
        raise ValueError(
            f"{op}: {name} must be (T, D // 2, 2), here {expected}; got {tuple(table.shape)}"
        )
    if qkv.dtype not in _DTYPES or table.dtype != torch.float32:
        raise TypeError(
            f"{op}: qkv must be float32, float16, bfloat16 or float64 and {name} float32; "
            f"got {qkv.dtype}, {table.dtype}"
        )
    where = backend.resolve(op, choice, qkv, table)
    if where == "triton" and qkv.dtype == torch.float64:
        raise TypeError(f"{op}: float64 needs backend='eager'; got qkv {qkv.dtype}")
    return where
