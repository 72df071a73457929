"""The Triton kernels of LayerNorm, their launch plans and launchers; equations in layer_norm.py."""

from dataclasses import dataclass

import torch

from kernels import backend, rng
from kernels.backend import jit, tl
from kernels.reduce import sum_partials
from kernels.rng import dropout_scale, dropout_threshold

# -------------------------------------------------------------------------------------- kernels


@jit(do_not_specialize=["site", "threshold", "rows_per_sequence"])
def _layer_norm_forward_kernel(
    x_ptr,  # (M, C)
    residual_ptr,  # (M, C) or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,) or None
    x_bias_ptr,  # (C,) or None
    key_ptr,  # (2,) or (3,) or None
    y_ptr,  # (M, C) contiguous
    new_residual_ptr,  # (M, C) contiguous; written if there is a residual
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    M,
    stride_xm,
    stride_xc,
    stride_rm,
    stride_rc,
    stride_w,
    stride_b,
    stride_xb,
    eps,
    site,
    threshold,
    scale,
    rows_per_sequence,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """Program i owns rows i * BLOCK_M ... of all tensors."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    mask_m, mask_c = rows < M, cols < C
    mask = mask_m[:, None] & mask_c[None, :]
    cols64 = cols.to(tl.int64)
    offsets = rows[:, None] * C + cols[None, :]
    x = tl.load(
        x_ptr + rows[:, None] * stride_xm + cols64[None, :] * stride_xc, mask, other=0.0
    ).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(
            residual_ptr + rows[:, None] * stride_rm + cols64[None, :] * stride_rc,
            mask,
            other=0.0,
        ).to(tl.float32)
        if x_bias_ptr is not None:
            x += tl.load(x_bias_ptr + cols64 * stride_xb, mask_c, other=0.0).to(tl.float32)[None, :]
        if key_ptr is not None:
            seed, step, first = rng.load_key(key_ptr, HAS_FIRST)
            row = first * rows_per_sequence.to(tl.uint32) + rows.to(tl.uint32)
            keep = rng.keep_tile(seed, step, 0, site, row, 0, threshold, BLOCK_C)
            x = tl.where(keep, x * scale, 0.0)
        new_residual = (residual + x).to(new_residual_ptr.dtype.element_ty)
        tl.store(new_residual_ptr + offsets, new_residual, mask)
        x = new_residual.to(tl.float32)  # y is the LayerNorm of what is stored
    mean = tl.sum(x, 1) / C
    centered = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / C + eps)
    tl.store(mean_ptr + rows, mean, mask_m)
    tl.store(rstd_ptr + rows, rstd, mask_m)
    weight = tl.load(weight_ptr + cols64 * stride_w, mask_c, other=0.0).to(tl.float32)
    y = centered * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols64 * stride_b, mask_c, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)


@jit(do_not_specialize=["site", "threshold", "rows_per_sequence"])
def _layer_norm_backward_kernel(
    dy_ptr,  # (M, C)
    dnew_ptr,  # (M, C) or None: gradient of the new residual
    r_ptr,  # (M, C): what was normalised
    weight_ptr,  # (C,)
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    key_ptr,  # (2,) or (3,) or None
    dr_ptr,  # (M, C) contiguous
    dx_ptr,  # (M, C) contiguous, or None: dropout'(dr)
    partials_ptr,  # (1, 2 or 3, P, C) float32: dweight, dbias, dx_bias
    M,
    stride_dym,
    stride_dyc,
    stride_dnm,
    stride_dnc,
    stride_rm,
    stride_rc,
    stride_w,
    site,
    threshold,
    scale,
    rows_per_sequence,
    P,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program i of P owns row tiles i, i + P, i + 2P, ... and partial row i."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_C)
    mask_c = cols < C
    cols64 = cols.to(tl.int64)
    weight = tl.load(weight_ptr + cols64 * stride_w, mask_c, other=0.0).to(tl.float32)[None, :]
    cols64 = cols64[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    dx_bias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if key_ptr is not None:
        seed, step, first = rng.load_key(key_ptr, HAS_FIRST)
        first_row = first * rows_per_sequence.to(tl.uint32)
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), P, num_stages=STAGES):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        mask = mask_m[:, None] & mask_c[None, :]
        offsets = rows[:, None] * C + cols[None, :]
        r = tl.load(r_ptr + rows[:, None] * stride_rm + cols64 * stride_rc, mask, other=0.0)
        dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols64 * stride_dyc, mask, other=0.0)
        dy = dy.to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask_m, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask_m, other=0.0)[:, None]
        xhat = (r.to(tl.float32) - mean) * rstd
        dweight += dy * xhat
        if HAS_BIAS:
            dbias += dy
        g = dy * weight
        mean_g = tl.sum(g, 1)[:, None] / C
        mean_gx = tl.sum(g * xhat, 1)[:, None] / C
        dr = (g - mean_g - xhat * mean_gx) * rstd
        if dnew_ptr is not None:
            dnew = tl.load(
                dnew_ptr + rows[:, None] * stride_dnm + cols64 * stride_dnc, mask, other=0.0
            )
            dr += dnew.to(tl.float32)
        tl.store(dr_ptr + offsets, dr.to(dr_ptr.dtype.element_ty), mask)
        if dx_ptr is not None:
            if key_ptr is not None:
                row = first_row + rows.to(tl.uint32)
                keep = rng.keep_tile(seed, step, 0, site, row, 0, threshold, BLOCK_C)
                dr = tl.where(keep, dr * scale, 0.0)
            tl.store(dx_ptr + offsets, dr.to(dx_ptr.dtype.element_ty), mask)
        if HAS_X_BIAS:
            dx_bias += tl.where(mask, dr, 0.0)
    partials_ptr += program * C
    tl.store(partials_ptr + cols, tl.sum(dweight, 0), mask_c)
    if HAS_BIAS:
        tl.store(partials_ptr + P * C + cols, tl.sum(dbias, 0), mask_c)
    if HAS_X_BIAS:
        partials_ptr += (1 + HAS_BIAS) * P * C
        tl.store(partials_ptr + cols, tl.sum(dx_bias, 0), mask_c)


@jit(do_not_specialize=["site", "threshold", "rows_per_sequence"])
def _layer_norm_wide_backward_kernel(
    dy_ptr,  # (M, C)
    dnew_ptr,  # (M, C) or None: gradient of the new residual
    r_ptr,  # (M, C): what was normalised
    weight_ptr,  # (C,)
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    key_ptr,  # (2,) or (3,) or None
    dr_ptr,  # (M, C) contiguous
    dx_ptr,  # (M, C) contiguous, or None: dropout'(dr)
    stride_dym,
    stride_dyc,
    stride_dnm,
    stride_dnc,
    stride_rm,
    stride_rc,
    stride_w,
    site,
    threshold,
    scale,
    rows_per_sequence,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """Program i owns row i, in pieces: once for the two means, once more, from cache, for dr."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * stride_dym
    r_ptr += row * stride_rm
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    sum_g = tl.zeros((1, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((1, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
        mask = cols < C
        g = tl.load(dy_ptr + cols * stride_dyc, mask, other=0.0).to(tl.float32)
        g *= tl.load(weight_ptr + cols * stride_w, mask, other=0.0).to(tl.float32)
        sum_g += g
        sum_gx += g * (tl.load(r_ptr + cols * stride_rc, mask, other=0.0).to(tl.float32) - mean)
    mean_g = tl.sum(sum_g) / C
    mean_gx = tl.sum(sum_gx) * rstd / C
    for start in range(0, C, BLOCK_C):
        cols = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
        mask = cols < C
        g = tl.load(dy_ptr + cols * stride_dyc, mask, other=0.0).to(tl.float32)
        g *= tl.load(weight_ptr + cols * stride_w, mask, other=0.0).to(tl.float32)
        xhat = tl.load(r_ptr + cols * stride_rc, mask, other=0.0).to(tl.float32)
        xhat = (xhat - mean) * rstd
        dr = (g - mean_g - xhat * mean_gx) * rstd
        if dnew_ptr is not None:
            dnew = tl.load(dnew_ptr + row * stride_dnm + cols * stride_dnc, mask, other=0.0)
            dr += dnew.to(tl.float32)
        tl.store(dr_ptr + row * C + cols, dr.to(dr_ptr.dtype.element_ty), mask)
        if dx_ptr is not None:
            if key_ptr is not None:
                seed, step, first = rng.load_key(key_ptr, HAS_FIRST)
                c1 = first * rows_per_sequence.to(tl.uint32) + rows.to(tl.uint32)
                keep = rng.keep_tile(seed, step, 0, site, c1, start, threshold, BLOCK_C)
                dr = tl.where(keep, dr * scale, 0.0)
            tl.store(dx_ptr + row * C + cols, dr.to(dx_ptr.dtype.element_ty), mask)


@jit
def _layer_norm_parameter_gradient_kernel(
    dy_ptr,  # (M, C)
    r_ptr,  # (M, C)
    dx_ptr,  # (M, C) contiguous
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    partials_ptr,  # (1, 2 or 3, P, C) float32: dweight, dbias, dx_bias
    M,
    stride_dym,
    stride_dyc,
    stride_rm,
    stride_rc,
    P,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
):
    """Program (j, i) owns column tile j, row tiles i, i + P, ... and that part of partial row i."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = tl.program_id(1)
    mask_c = cols < C
    cols64 = cols[None, :].to(tl.int64)
    dweight = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    dx_bias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for tile in range(program, tl.cdiv(M, BLOCK_M), P):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        mask = mask_m[:, None] & mask_c[None, :]
        r = tl.load(r_ptr + rows[:, None] * stride_rm + cols64 * stride_rc, mask, other=0.0)
        dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols64 * stride_dyc, mask, other=0.0)
        dy = dy.to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask_m, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask_m, other=0.0)[:, None]
        dweight += dy * ((r.to(tl.float32) - mean) * rstd)
        if HAS_BIAS:
            dbias += dy
        if HAS_X_BIAS:
            offsets = rows[:, None] * C + cols64
            dx_bias += tl.load(dx_ptr + offsets, mask, other=0.0).to(tl.float32)
    partials_ptr += program * C
    tl.store(partials_ptr + cols, tl.sum(dweight, 0), mask_c)
    if HAS_BIAS:
        tl.store(partials_ptr + P * C + cols, tl.sum(dbias, 0), mask_c)
    if HAS_X_BIAS:
        partials_ptr += (1 + HAS_BIAS) * P * C
        tl.store(partials_ptr + cols, tl.sum(dx_bias, 0), mask_c)


# ------------------------------------------------------------------------------------ launchers


@dataclass(frozen=True)
class LayerNormPlan:
    """Tiles and warps of one launch.

    Attributes:
        programs: persistent ones a multiprocessor, 0 for none.
        stages: 2 if the next tile is loaded while one is computed.
    """

    BLOCK_M: int
    BLOCK_C: int
    num_warps: int
    programs: int = 0
    stages: int = 1


def forward_plan(C: int) -> LayerNormPlan:
    """One warp for 512 channels, two rows of them where a row is short: 16 to 32 values a thread.

    Chosen by compiled code (no spills, 128-bit accesses, occupancy), not yet by a measurement.
    """
    BLOCK_C = max(16, backend.next_power_of_2(C))
    return LayerNormPlan(
        BLOCK_M=max(1, min(16, 1024 // BLOCK_C)),
        BLOCK_C=BLOCK_C,
        num_warps=max(1, min(16, BLOCK_C // 512)),
    )


WIDE_C = 8192  # beyond it a row and its columns' sums no longer fit in registers together


def backward_plan(architecture: str, C: int, residual: bool) -> LayerNormPlan:
    """A thread has 16 values of a tile, and of each column sum, in registers; 8 of long rows.

    As many programs as fit a multiprocessor, four or three of four warps, take the tiles in turns.
    Each loads the next one behind the one it computes, so that 25 to 37 KB are always under way;
    on sm_100 that spills at 2048 channels. Partial sums are (programs, C). Wide rows go in pieces,
    one program a row, and `_parameter_gradients` sums the columns. Chosen by compiled code, not yet
    by a measurement.

    Args:
        residual: a gradient of the residual is added, which takes registers.
    """
    if C > WIDE_C:
        return LayerNormPlan(BLOCK_M=1, BLOCK_C=4096, num_warps=8)
    BLOCK_C = max(16, backend.next_power_of_2(C))
    stages = 2 if architecture.startswith(("sm_8", "sm_9")) else 1
    if BLOCK_C > 4096 and architecture in ("sm_86", "sm_89"):  # a program has 99 KB there, not 163
        stages = 1
    if BLOCK_C > 2048:
        programs = 2 if BLOCK_C == 4096 and not residual else 1
        return LayerNormPlan(1, BLOCK_C, 16, programs, stages)
    programs = 3 if residual or architecture.startswith("gfx") else 4
    return LayerNormPlan(max(1, min(32, 2048 // BLOCK_C)), BLOCK_C, 4, programs, stages)


# Tiles of whole 512-byte pieces of rows; with some 64 column tiles, 8 programs share each.
PARAMETER_GRADIENT_PLAN = LayerNormPlan(BLOCK_M=16, BLOCK_C=256, num_warps=8, programs=8)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(..., C) as (M, C): a view wherever the leading dimensions collapse."""
    return tensor.reshape(-1, tensor.shape[-1])


def _dropout_arguments(shape, dropout_p: float, site: int):
    return {
        "site": site,
        "threshold": dropout_threshold(dropout_p),
        "scale": dropout_scale(dropout_p),
        "rows_per_sequence": torch.Size(shape[1:-1]).numel(),
    }


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    key: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    site: int,
    y_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, new residual (empty without a residual), mean (M,), rstd (M,)."""
    rows, C = _rows(x), x.shape[-1]
    M, device = rows.shape[0], x.device
    y = torch.empty(x.shape, dtype=y_dtype, device=device)
    new_residual = torch.empty(
        x.shape if residual is not None else 0,
        dtype=x.dtype if residual is None else residual.dtype,
        device=device,
    )
    mean = torch.empty(M, dtype=torch.float32, device=device)
    rstd = torch.empty(M, dtype=torch.float32, device=device)
    residual_rows = rows if residual is None else _rows(residual)
    plan = forward_plan(C)
    backend.launch(
        _layer_norm_forward_kernel,
        (-(-M // plan.BLOCK_M),),
        rows,
        None if residual is None else residual_rows,
        weight,
        bias,
        x_bias,
        key if dropout_p else None,
        y,
        new_residual,
        mean,
        rstd,
        M,
        *rows.stride(),
        *residual_rows.stride(),
        weight.stride(0),
        1 if bias is None else bias.stride(0),
        1 if x_bias is None else x_bias.stride(0),
        eps,
        **_dropout_arguments(x.shape, dropout_p, site),
        C=C,
        BLOCK_M=plan.BLOCK_M,
        BLOCK_C=plan.BLOCK_C,
        HAS_FIRST=key is not None and key.numel() == 3,
        num_warps=plan.num_warps,
    )
    return y, new_residual, mean, rstd


def backward(
    dy: torch.Tensor,
    dnew: torch.Tensor | None,
    r: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    key: torch.Tensor | None,
    dropout_p: float,
    site: int,
    x_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    x_bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dr, dx (empty where it equals dr), dweight, dbias and dx_bias (empty without a bias)."""
    rows, dy = _rows(r), _rows(dy)
    (M, C), device = rows.shape, r.device
    dnew_rows = rows if dnew is None else _rows(dnew)
    dr = torch.empty(r.shape, dtype=r.dtype, device=device)
    distinct = dropout_p > 0 or x_dtype != r.dtype
    dx = torch.empty(r.shape if distinct else 0, dtype=x_dtype, device=device)
    architecture = backend.architecture(device)
    plan = backward_plan(architecture, C, dnew is not None)
    has_bias, has_x_bias = bias_dtype is not None, x_bias_dtype is not None
    tensors = (
        dy,
        None if dnew is None else dnew_rows,
        rows,
        weight,
        mean,
        rstd,
        key if dropout_p else None,
        dr,
        dx if distinct else None,
    )
    strides = (*dy.stride(), *dnew_rows.stride(), *rows.stride(), weight.stride(0))
    constants = {
        **_dropout_arguments(r.shape, dropout_p, site),
        "C": C,
        "BLOCK_C": plan.BLOCK_C,
        "HAS_FIRST": key is not None and key.numel() == 3,
        "num_warps": plan.num_warps,
    }
    if plan.programs:
        P = _programs(architecture, device, plan.programs)
        partials = torch.empty(1 + has_bias + has_x_bias, P, C, device=device)
        backend.launch(
            _layer_norm_backward_kernel,
            (P,),
            *tensors,
            partials,
            M,
            *strides,
            P=P,
            BLOCK_M=plan.BLOCK_M,
            HAS_BIAS=has_bias,
            HAS_X_BIAS=has_x_bias,
            STAGES=plan.stages,
            **constants,
        )
    else:
        backend.launch(_layer_norm_wide_backward_kernel, (M,), *tensors, *strides, **constants)
        dx_rows = _rows(dx if distinct else dr)
        partials = _parameter_gradients(dy, rows, dx_rows, mean, rstd, has_bias, has_x_bias)
    dtypes = (weight.dtype, bias_dtype, x_bias_dtype)
    dweight, *sums = sum_partials(partials, *(dtype for dtype in dtypes if dtype is not None))
    dbias = sums.pop(0) if has_bias else dweight.new_empty(0)
    dx_bias = sums.pop() if has_x_bias else dweight.new_empty(0)
    return dr, dx, dweight, dbias, dx_bias


def _parameter_gradients(dy, rows, dx, mean, rstd, has_bias: bool, has_x_bias: bool):
    """Partial sums (1, 2 or 3, P, C) of dweight, dbias and dx_bias for wide rows."""
    (M, C), device = rows.shape, rows.device
    plan = PARAMETER_GRADIENT_PLAN
    P = plan.programs
    partials = torch.empty(1 + has_bias + has_x_bias, P, C, device=device)
    backend.launch(
        _layer_norm_parameter_gradient_kernel,
        (-(-C // plan.BLOCK_C), P),
        dy,
        rows,
        dx,
        mean,
        rstd,
        partials,
        M,
        *dy.stride(),
        *rows.stride(),
        P=P,
        C=C,
        BLOCK_M=plan.BLOCK_M,
        BLOCK_C=plan.BLOCK_C,
        HAS_BIAS=has_bias,
        HAS_X_BIAS=has_x_bias,
        num_warps=plan.num_warps,
    )
    return partials


def _programs(architecture: str, device: torch.device, per_multiprocessor: int) -> int:
    if architecture == "interpreter":
        return 2 * per_multiprocessor
    return backend.multiprocessors(device) * per_multiprocessor
