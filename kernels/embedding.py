"""Token plus position embedding with dropout, in one kernel.

    x[b, t] = dropout(token_weight[idx[b, t]] + position_weight[t])

    dtoken_weight[v] = sum_{b, t: idx[b, t] = v} dy[b, t]
    dposition_weight[t] = sum_b dy[b, t]
    with dy the incoming gradient through the same mask

Many rows of dy may belong to one token, and atomics would add them in any order. Instead few tokens
are summed as a product onehot(idx)^T dy, in pieces added in order, and many by sorting the rows of
dy by token first, so that each token's rows are one segment with one owner. The backward draws
the mask again instead of storing it.
"""

import torch
import torch.nn.functional as F

from kernels import rng
from kernels.backend import (
    architecture,
    jit,
    launch,
    next_power_of_2,
    operator,
    resolve,
    tl,
    traced,
)
from kernels.layer_norm import keep_rows

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_ONE_HOT = 256  # tokens; characters and bytes
_PIECES = 64  # of the rows in the one-hot product: with 64 columns a tile, 384 programs at C = 384


# --- Eager ----------------------------------------------------------------------------------------


class _EagerEmbed(torch.autograd.Function):
    """In-place steps on one fresh tensor; the mask stays, a byte an element."""

    @staticmethod
    def forward(ctx, idx, token_weight, position_weight, keep, scale):
        x = F.embedding(idx, token_weight)
        if position_weight is not None:
            x.add_(position_weight[: idx.shape[1]])
        if keep is not None:
            x.mul_(keep).mul_(scale)
        ctx.save_for_backward(idx, keep)
        ctx.scale, ctx.dtype = scale, x.dtype
        ctx.tokens = token_weight.shape[0]
        ctx.positions = 0 if position_weight is None else position_weight.shape[0]
        return x

    @staticmethod
    def backward(ctx, dy):
        (idx, keep), dtoken, dposition = ctx.saved_tensors, None, None
        dy = dy.to(torch.promote_types(dy.dtype, torch.float32))
        if keep is not None:
            dy = (dy * keep).mul_(ctx.scale)
        if ctx.needs_input_grad[1]:
            dtoken = torch.ops.aten.embedding_dense_backward(dy, idx, ctx.tokens, -1, False)
            dtoken = dtoken.to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            dposition = dy.sum(0).to(ctx.dtype)
            if unused := ctx.positions - idx.shape[1]:
                dposition = F.pad(dposition, (0, 0, 0, unused))
        return None, dtoken, dposition, None, None


# --- Triton kernels -------------------------------------------------------------------------------


@jit
def _masked_gradient(
    dy_ptr,
    key_ptr,
    rows,  # (BLOCK_M,) int64
    mask_m,
    col,
    rows_per_sequence,
    C,
    stride_dm,
    stride_dc,
    site,
    threshold,
    BLOCK_C: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """dy (BLOCK_M, BLOCK_C) of these rows from column col on, 0 where dropped, not scaled."""
    cols = col + tl.arange(0, BLOCK_C)
    mask = mask_m[:, None] & (cols < C)[None, :]
    offsets = rows[:, None] * stride_dm + cols[None, :].to(tl.int64) * stride_dc
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0)
    if key_ptr is not None:
        seed, step, first = rng.load_key(key_ptr, HAS_FIRST)
        row = first * rows_per_sequence.to(tl.uint32) + rows.to(tl.uint32)
        keep = rng.keep_tile(seed, step, seed ^ seed, site, row, col, threshold, BLOCK_C)
        dy = tl.where(keep, dy, 0.0)
    return dy


@jit(do_not_specialize=["T", "site", "threshold"])
def _embed_kernel(
    idx_ptr,  # (B, T) int64
    token_ptr,  # (V, C)
    position_ptr,  # (P, C) or None
    key_ptr,  # (2,) or (3,) or None
    x_ptr,  # (B, T, C) contiguous
    stride_ib,
    stride_it,
    stride_vv,
    stride_vc,
    stride_pp,
    stride_pc,
    M,
    T,
    C,
    V,
    site,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """Program (i, j) owns tile i of the M = B * T rows and tile j of the columns."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_C
    cols = (col + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask_m, mask_c = offs_m < M, cols < C
    b, t = (offs_m // T).to(tl.int64), (offs_m % T).to(tl.int64)
    token = tl.load(idx_ptr + b * stride_ib + t * stride_it, mask=mask_m, other=0)
    known = (token >= 0) & (token < V)
    mask = (mask_m & known)[:, None] & mask_c[None, :]
    offsets = token[:, None] * stride_vv + cols[None, :] * stride_vc
    x = tl.load(token_ptr + offsets, mask=mask, other=float("nan")).to(tl.float32)
    mask = mask_m[:, None] & mask_c[None, :]
    if position_ptr is not None:
        offsets = t[:, None] * stride_pp + cols[None, :] * stride_pc
        x += tl.load(position_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if key_ptr is not None:
        seed, step, first = rng.load_key(key_ptr, HAS_FIRST)
        row = first * T.to(tl.uint32) + offs_m.to(tl.uint32)
        keep = rng.keep_tile(seed, step, seed ^ seed, site, row, col, threshold, BLOCK_C)
        x = tl.where(keep, x * scale, 0.0)
    offsets = offs_m.to(tl.int64)[:, None] * C + cols[None, :]
    tl.store(x_ptr + offsets, x.to(x_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["T", "site", "threshold"])
def _position_gradient_kernel(
    dy_ptr,  # (B * T, C)
    key_ptr,  # (2,) or (3,) or None
    dposition_ptr,  # (P, C) contiguous
    stride_dm,
    stride_dc,
    B,
    T,
    C,
    site,
    threshold,
    scale,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """Program (t, j) sums tile j of the columns over the batch, for position t: 0 from T on."""
    t = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_C
    total = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for start in range(0, B, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        rows = offs_b.to(tl.int64) * T + t
        dy = _masked_gradient(
            dy_ptr, key_ptr, rows, (offs_b < B) & (t < T), col, T, C, stride_dm, stride_dc,
            site, threshold, BLOCK_C, HAS_FIRST,
        )  # fmt: skip
        total += dy.to(tl.float32)
    cols = col + tl.arange(0, BLOCK_C)
    dposition = (tl.sum(total, 0) * scale).to(dposition_ptr.dtype.element_ty)
    tl.store(dposition_ptr + t.to(tl.int64) * C + cols, dposition, mask=cols < C)


@jit(do_not_specialize=["T", "site", "threshold"])
def _token_gradient_one_hot_kernel(
    idx_ptr,  # (M,) int64
    dy_ptr,  # (M, C)
    key_ptr,  # (2,) or (3,) or None
    partials_ptr,  # (pieces, V, C) float32
    stride_dm,
    stride_dc,
    M,
    T,
    C,
    V,
    rows_per_piece,
    site,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    INTERPRET: tl.constexpr,  # bfloat16 is wrong there, float32 products exact
):
    """Program (s, j, i) sums piece s of the rows into tile i of the tokens, j of the columns."""
    piece, col = tl.program_id(0), tl.program_id(1) * BLOCK_C
    offs_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    for start in range(0, rows_per_piece, BLOCK_M):
        offs_m = piece * rows_per_piece + start + tl.arange(0, BLOCK_M)
        rows, mask_m = offs_m.to(tl.int64), offs_m < M
        token = tl.load(idx_ptr + rows, mask=mask_m, other=-1)
        dy = _masked_gradient(
            dy_ptr, key_ptr, rows, mask_m, col, T, C, stride_dm, stride_dc,
            site, threshold, BLOCK_C, HAS_FIRST,
        )  # fmt: skip
        one_hot = offs_v[:, None] == token[None, :]
        if INTERPRET:
            total = tl.dot(one_hot.to(tl.float32), dy.to(tl.float32), total)
        elif dy.dtype == tl.float32:
            # Tensor cores round float32, but it is the exact sum of three bfloat16.
            for _ in tl.static_range(3):
                part = dy.to(tl.bfloat16)
                total = tl.dot(one_hot.to(tl.bfloat16), part, total)
                dy -= part.to(tl.float32)
        else:
            total = tl.dot(one_hot.to(dy.dtype), dy, total)
    cols = col + tl.arange(0, BLOCK_C)
    offsets = (piece.to(tl.int64) * V + offs_v)[:, None] * C + cols[None, :]
    mask = (offs_v < V)[:, None] & (cols < C)[None, :]
    tl.store(partials_ptr + offsets, total * scale, mask=mask)


@jit(do_not_specialize=["T", "site", "threshold"])
def _token_gradient_sorted_kernel(
    order_ptr,  # (M,) int64: rows in the order of their tokens
    starts_ptr,  # (V + 1,) int64: where each token's rows start in it
    dy_ptr,  # (M, C)
    key_ptr,  # (2,) or (3,) or None
    dtoken_ptr,  # (V, C) contiguous
    stride_dm,
    stride_dc,
    T,
    C,
    site,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """Program (v, j) sums tile j of the columns over the rows of token v."""
    v, col = tl.program_id(0), tl.program_id(1) * BLOCK_C
    first_row, end = tl.load(starts_ptr + v), tl.load(starts_ptr + v + 1)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    # A frequent token has many rows: the loads of the next ones overlap.
    for start in tl.range(first_row, end, BLOCK_M, num_stages=4):
        place = start + tl.arange(0, BLOCK_M)
        rows = tl.load(order_ptr + place, mask=place < end, other=0)
        dy = _masked_gradient(
            dy_ptr, key_ptr, rows, place < end, col, T, C, stride_dm, stride_dc,
            site, threshold, BLOCK_C, HAS_FIRST,
        )  # fmt: skip
        total += dy.to(tl.float32)
    cols = col + tl.arange(0, BLOCK_C)
    dtoken = (tl.sum(total, 0) * scale).to(dtoken_ptr.dtype.element_ty)
    tl.store(dtoken_ptr + v.to(tl.int64) * C + cols, dtoken, mask=cols < C)


# --- Launchers ------------------------------------------------------------------------------------


def _columns(C: int, most: int) -> tuple[int, int]:
    """(BLOCK_C, tiles): columns of a tile, a power of two of at least 16, and how many tiles."""
    BLOCK_C = min(most, max(16, next_power_of_2(C)))
    return BLOCK_C, -(-C // BLOCK_C)


def _dropout_arguments(key, dropout_p: float, site: int) -> dict:
    return {
        "key_ptr": key if dropout_p else None,
        "site": site,
        "threshold": rng.dropout_threshold(dropout_p),
        "scale": rng.dropout_scale(dropout_p),
        "HAS_FIRST": key is not None and key.numel() == 3,
    }


def _forward(
    idx: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor | None,
    key: torch.Tensor | None,
    dropout_p: float,
    site: int,
) -> torch.Tensor:
    """x (B, T, C)."""
    (B, T), (V, C) = idx.shape, token_weight.shape
    x = token_weight.new_empty(B, T, C)
    BLOCK_M, (BLOCK_C, tiles) = 16, _columns(C, 128)
    launch(
        _embed_kernel,
        (-(-B * T // BLOCK_M), tiles),
        idx,
        token_weight,
        position_weight,
        x_ptr=x,
        stride_ib=idx.stride(0),
        stride_it=idx.stride(1),
        stride_vv=token_weight.stride(0),
        stride_vc=token_weight.stride(1),
        stride_pp=0 if position_weight is None else position_weight.stride(0),
        stride_pc=0 if position_weight is None else position_weight.stride(1),
        M=B * T,
        T=T,
        C=C,
        V=V,
        **_dropout_arguments(key, dropout_p, site),
        BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
        num_warps=4,
    )
    return x


def _backward(
    dy: torch.Tensor,
    idx: torch.Tensor,
    key: torch.Tensor | None,
    V: int,
    P: int,
    dropout_p: float,
    site: int,
    needs_dtoken: bool,
    needs_dposition: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dtoken (V, C), dposition (P, C)), each empty where it is not needed."""
    B, T, C = dy.shape
    dy, idx = dy.reshape(-1, C), idx.reshape(-1).contiguous()  # one stride, of rows, not 1 perhaps
    common = {
        "stride_dm": dy.stride(0),
        "stride_dc": dy.stride(1),
        "T": T,
        "C": C,
        **_dropout_arguments(key, dropout_p, site),
    }
    dposition = dy.new_empty(P if needs_dposition else 0, C)
    BLOCK_C, tiles = _columns(C, 128)
    launch(
        _position_gradient_kernel,
        (dposition.shape[0], tiles),
        dy,
        dposition_ptr=dposition,
        B=B,
        BLOCK_B=16,
        BLOCK_C=BLOCK_C,
        num_warps=4,
        **common,
    )
    if not needs_dtoken:
        dtoken = dy.new_empty(0, C)
    elif V <= _LARGEST_ONE_HOT:
        dtoken = _token_gradient_one_hot(dy, idx, V, common)
    else:
        dtoken = _token_gradient_sorted(dy, idx, V, common)
    return dtoken, dposition


def _token_gradient_one_hot(dy, idx, V, common):
    """dtoken (V, C) as a product with one-hot rows."""
    (M, C), BLOCK_M = dy.shape, 32
    rows_per_piece = BLOCK_M * max(1, -(-M // (BLOCK_M * _PIECES)))
    pieces = max(1, -(-M // rows_per_piece))
    partials = dy.new_empty(pieces, V, C, dtype=torch.float32)
    BLOCK_V = min(128, max(16, next_power_of_2(V)))
    BLOCK_C, tiles = _columns(C, 64)
    launch(
        _token_gradient_one_hot_kernel,
        (pieces, tiles, -(-V // BLOCK_V)),
        idx,
        dy,
        partials_ptr=partials,
        M=M,
        V=V,
        rows_per_piece=rows_per_piece,
        BLOCK_M=BLOCK_M,
        BLOCK_V=BLOCK_V,
        BLOCK_C=BLOCK_C,
        INTERPRET=architecture(dy.device) == "interpreter",
        num_warps=4,
        **common,
    )
    return partials.sum(0).to(dy.dtype)


def _token_gradient_sorted(dy, idx, V, common):
    """dtoken (V, C) as sums of segments of the rows sorted by token."""
    tokens, order = torch.sort(idx, stable=True)
    starts = torch.searchsorted(tokens, torch.arange(V + 1, device=idx.device))
    dtoken = dy.new_empty(V, dy.shape[1])
    BLOCK_C, tiles = _columns(dy.shape[1], 1024)
    launch(
        _token_gradient_sorted_kernel,
        (V, tiles),
        order,
        starts,
        dy,
        dtoken_ptr=dtoken,
        BLOCK_M=max(1, 2048 // BLOCK_C),
        BLOCK_C=BLOCK_C,
        num_warps=4,
        **common,
    )
    return dtoken


# --- Binding --------------------------------------------------------------------------------------

_embed_op = operator("embed", _forward)
_embed_backward_op = operator("embed_backward", _backward)


def _save(ctx, inputs, output):
    idx, token_weight, position_weight, key, *ctx.settings = inputs
    ctx.save_for_backward(idx, key)
    ctx.tokens = token_weight.shape[0]
    ctx.positions = 0 if position_weight is None else position_weight.shape[0]


def _embed_backward(ctx, dy):
    idx, key = ctx.saved_tensors
    _, needs_dtoken, needs_dposition, *_ = ctx.needs_input_grad
    dtoken, dposition = _embed_backward_op(
        dy, idx, key, ctx.tokens, ctx.positions, *ctx.settings, needs_dtoken, needs_dposition
    )
    return (
        None,
        dtoken if needs_dtoken else None,
        dposition if needs_dposition else None,
        *[None] * 3,
    )


_embed_op.register_autograd(_embed_backward, setup_context=_save)


# --- Public function ------------------------------------------------------------------------------


def embed(
    idx: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor | None,
    *,
    dropout_p: float = 0.0,
    key: torch.Tensor | None = None,
    site: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Token plus position embedding, with dropout, in one call.

    x[b, t] = dropout(token_weight[idx[b, t]] + position_weight[t])

    Args:
        idx: (B, T) int64, each in [0, V); any strides.
        token_weight: (V, C); float32, float16 or bfloat16 (eager: float64 too); any strides.
        position_weight: (P, C), T <= P, dtype of token_weight; or None for no positions. Its rows
            from n on where idx follows n cached tokens.
        dropout_p: in [0, 1). The mask is that of an activation (B, T, C): see `kernels.rng`.
        key: (2,) or (3,) int64 [seed, step(, first)]; drawn from torch's generator if None.
        site: which dropout of the model.
    Returns: x, (B, T, C), dtype of token_weight, autocast or not.
    Raises: ValueError on shapes, ranges or devices; TypeError on dtypes; RuntimeError if the
        backend cannot run. Indices out of range: ValueError from eager; NaN rows and no gradient
        from Triton, where looking at them would make the host wait for the device.
    """
    backend = _check(idx, token_weight, position_weight, dropout_p, site, backend)
    key = rng.check_key("embed", key, idx.device) if dropout_p else None
    if backend == "triton":
        return _embed_op(idx, token_weight, position_weight, key, dropout_p, site)
    keep = None
    if dropout_p:
        shape = torch.Size((*idx.shape, token_weight.shape[1]))
        keep = keep_rows(key, site, shape, dropout_p)
    scale = rng.dropout_scale(dropout_p)
    if traced():  # the compiler fuses the plain form
        x = F.embedding(idx, token_weight)
        if position_weight is not None:
            x = x + position_weight[: idx.shape[1]]
        return x if keep is None else torch.where(keep, x, 0.0) * scale
    keep = None if keep is None else rng.as_bytes(keep)
    try:
        return _EagerEmbed.apply(idx, token_weight, position_weight, keep, scale)
    except IndexError:
        V = token_weight.shape[0]
        wrong = idx[(idx < 0) | (idx >= V)]
        raise ValueError(f"embed: idx must be in [0, {V}); got {wrong[0].item()}") from None


def _check(idx, token_weight, position_weight, dropout_p, site, backend) -> str:
    """The backend to run on. Raises: what `embed` documents."""
    if idx.dtype != torch.int64:
        raise TypeError(f"embed: idx must be int64; got {idx.dtype}")
    if not token_weight.is_floating_point():
        raise TypeError(f"embed: token_weight must be floating point; got {token_weight.dtype}")
    if idx.ndim != 2:
        raise ValueError(f"embed: idx must be (B, T); got {tuple(idx.shape)}")
    if token_weight.ndim != 2 or 0 in token_weight.shape:
        raise ValueError(
            f"embed: token_weight must be (V, C), V, C >= 1; got {tuple(token_weight.shape)}"
        )
    T, C = idx.shape[1], token_weight.shape[1]
    if position_weight is not None:
        if position_weight.dtype != token_weight.dtype:
            raise TypeError(
                "embed: token_weight and position_weight must agree in dtype; "
                f"got {token_weight.dtype}, {position_weight.dtype}"
            )
        if position_weight.ndim != 2 or position_weight.shape[1] != C:
            raise ValueError(
                f"embed: position_weight must be (P, {C}) as token_weight is; "
                f"got {tuple(position_weight.shape)}"
            )
        if T > position_weight.shape[0]:
            raise ValueError(
                "embed: T must be at most the rows of position_weight; "
                f"got {T} > {position_weight.shape[0]}"
            )
    rng.check_dropout("embed", dropout_p, site)
    backend = resolve("embed", backend, idx, token_weight, position_weight)
    if backend == "triton" and token_weight.dtype not in _DTYPES:
        raise TypeError(
            "embed: token_weight must be float32, float16 or bfloat16 on the triton backend; "
            f"got {token_weight.dtype}"
        )
    return backend
