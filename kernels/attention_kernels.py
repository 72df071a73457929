"""The Triton kernels of `kernels.attention`, their launch plans and launchers.

Forward, per query tile: FlashAttention-2's online softmax in base 2 (float32: e), which saves

    lse[i] = log2 sum_{j<=i} 2^s[i,j],   s = scale * log2(e) * q k^T

Backward, without atomics, from P = 2^(s - lse), the mask R of dropout and c = 1 / (1 - p):

    delta = rowsum(do * o) / c      dS = P * (R * (do v^T) - delta)
    dv = c * (R * P)^T do           dk = scale * c * dS^T q           dq = scale * c * dS k

float32 saves lse[0,i] = m = max_j s[i,j] and lse[1,i] = 1 / sum_j e^(s[i,j] - m) instead: where P
is large s - m is small, and its rounding too, while s - lse rounds like lse. Its delta is the
rowsum of P * R * (do v^T), summed from the very numbers that dS subtracts it from.

Query i of Tq stands at position i + Tk - Tq: the causal mask is aligned bottom-right. Positions
are also the rows of the dropout mask, and b * H + h, counted in the global batch, its planes.
"""

import math
from dataclasses import dataclass, replace

import torch

from kernels import backend
from kernels.backend import jit, tl
from kernels.rng import dropout_scale, dropout_threshold, keep_tile, lane_order, load_key

LOG2E = math.log2(math.e)


@jit
def _dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b + acc in float32; WIDEN spares the interpreter bfloat16, which it gets wrong."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def _dot_rows(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr, PARTS: tl.constexpr):
    """a @ b^T in float32, its sums in PARTS: four of them round half as much as one.

    A score's error is that of its P. Four parts cost next to nothing where rows are read four
    elements at a time: each of them goes to a part of its own.
    """
    WIDTH: tl.constexpr = a.shape[1]
    if PARTS > 1 and WIDTH > 16:
        a_even, a_odd = tl.split(tl.reshape(a, (a.shape[0], WIDTH // 2, 2)))
        b_even, b_odd = tl.split(tl.reshape(b, (b.shape[0], WIDTH // 2, 2)))
        even = _dot_rows(a_even, b_even, PRECISION, WIDEN, PARTS // 2)
        return even + _dot_rows(a_odd, b_odd, PRECISION, WIDEN, PARTS // 2)
    else:
        return _dot(a, b.T, None, PRECISION, WIDEN)


@jit
def _exp(x, EXACT: tl.constexpr):
    """2^x, one instruction, or EXACT e^x: log2(e) in qk_scale rounds every score."""
    return tl.exp(x) if EXACT else tl.exp2(x)


@jit
def _probabilities(s, visible, qk_scale, lse, inv_l, MASKED: tl.constexpr, EXACT: tl.constexpr):
    """2^(s * qk_scale - lse) where `visible`, else 0; EXACT: e^(s * qk_scale - lse) * inv_l."""
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    p = _exp(s * qk_scale - lse, EXACT)
    return p * inv_l if EXACT else p


@jit
def _eights(stride_b, stride_h, stride_t):
    """The same strides, multiples of 8, so that the compiler knows it of them and loads 16 bytes.

    By itself it looks for multiples of 16 alone, which rows of 8, 24, 40 ... elements are not.
    """
    return stride_b // 8 * 8, stride_h // 8 * 8, stride_t // 8 * 8


@jit
def _tile(
    ptr, offs_t, stride_t, stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """Pointers (BLOCK, BLOCK_D) to the rows offs_t (BLOCK,), or of odd rows (BLOCK, 32).

    Elements of odd rows, no multiple of 16 nor EIGHTS, are loaded one by one. A thread then has one
    pointer for all chunks of 32 in a row, whose distances are constants in the instructions, and
    not one for every element. float32 has no registers to spare for what that takes.
    """
    IS_ODD: tl.constexpr = HEAD_DIM % 16 > 0 and not EIGHTS and ptr.dtype.element_ty != tl.float32
    offs_d = tl.arange(0, 32 if IS_ODD and BLOCK_D > 32 else BLOCK_D).to(tl.int64)
    return ptr + offs_t.to(tl.int64)[:, None] * stride_t + offs_d[None, :] * stride_d


@jit
def _chunks(ptrs, stride_d, BLOCK_D: tl.constexpr):
    """(pointers, columns) of all elements in a `_tile`: if it is odd (BLOCK_D // 32, BLOCK, 32)."""
    offs_d = tl.arange(0, ptrs.shape[1])[None, :]
    if ptrs.shape[1] < BLOCK_D:
        chunks = tl.arange(0, BLOCK_D // ptrs.shape[1])[:, None, None] * ptrs.shape[1]
        ptrs, offs_d = ptrs + chunks.to(tl.int64) * stride_d, offs_d + chunks
    return ptrs, offs_d


@jit
def _load(tile, mask, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows (BLOCK, BLOCK_D) of a `_tile`; 0 where mask (BLOCK, 1), if any, is not set."""
    ptrs, offs_d = _chunks(tile, stride_d, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    x = tl.load(ptrs, mask=mask_d if mask is None else mask_d & mask, other=0.0)
    if tile.shape[1] < BLOCK_D:
        x = tl.reshape(tl.permute(x, (1, 0, 2)), (tile.shape[0], BLOCK_D))
    return x


@jit
def _store(tile, x, mask, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write x (BLOCK, BLOCK_D) to those rows of a `_tile` where mask (BLOCK, 1) is set."""
    ptrs, offs_d = _chunks(tile, stride_d, BLOCK_D)
    x = x.to(tile.dtype.element_ty)
    if tile.shape[1] < BLOCK_D:
        WIDTH: tl.constexpr = tile.shape[1]
        x = tl.permute(tl.reshape(x, (tile.shape[0], BLOCK_D // WIDTH, WIDTH)), (1, 0, 2))
    tl.store(ptrs, x, mask=(offs_d < HEAD_DIM) & mask)


@jit
def _forward_tiles(
    acc, m_i, l_i, q, k_ptrs, v_ptrs, stride_kt, stride_kd, stride_vt, stride_vd, low, high,
    offs_m, Tk, qk_scale, seed, step, plane, site, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
    QUADS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, EXACT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys low ... high into the running softmax of one query tile.

    offs_m (BLOCK_M,) are positions; MASKED tiles touch the diagonal or the end of the keys.
    """
    PARTS: tl.constexpr = 4 if EXACT and PRECISION == "ieee" else 1
    offs_n = lane_order(BLOCK_N, QUADS)
    for start_n in range(low, high, BLOCK_N):
        step_n = tl.cast(start_n, tl.int64)
        mask = (start_n + offs_n)[:, None] < Tk if MASKED else None
        k = _load(k_ptrs + step_n * stride_kt, mask, stride_kd, HEAD_DIM, BLOCK_D)
        s = _dot_rows(q, k, PRECISION, WIDEN, PARTS)
        if MASKED:
            s = tl.where((start_n + offs_n)[None, :] <= offs_m[:, None], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
        p = _exp(s * qk_scale - m_new[:, None], EXACT)
        alpha = _exp(m_i - m_new, EXACT)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if DROPOUT:
            keep = keep_tile(seed, step, plane, site, offs_m, start_n, threshold, BLOCK_N, QUADS)
            # A zero that the compiler cannot know: it then needs fewer instructions (sm_80, sm_90).
            p = tl.where(keep, p, qk_scale * 0.0)
        v = _load(v_ptrs + step_n * stride_vt, mask, stride_vd, HEAD_DIM, BLOCK_D)
        acc = _dot(p.to(v.dtype), v, acc, PRECISION, WIDEN)
        m_i = m_new
    return acc, m_i, l_i


# Lengths, sites and thresholds change from call to call; a kernel for each would be compiled.
_UNSPECIALISED = ["H", "Tq", "Tk", "site", "threshold"]


@jit(do_not_specialize=_UNSPECIALISED)
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr,  # (B, H, Tq or Tk, D), any strides
    lse_ptr,  # (1 or 2, B, H, Tq) float32
    key_ptr,  # (2,) or (3,) int64
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    H, Tq, Tk, qk_scale, keep_scale, site, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, QUADS: tl.constexpr, HAS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, EXACT: tl.constexpr, EIGHTS: tl.constexpr, ONE_LOOP: tl.constexpr,
):  # fmt: skip
    """Program bh * tiles + i owns query tile tiles - 1 - i, the longest first."""
    if EIGHTS:
        stride_qb, stride_qh, stride_qt = _eights(stride_qb, stride_qh, stride_qt)
        stride_kb, stride_kh, stride_kt = _eights(stride_kb, stride_kh, stride_kt)
        stride_vb, stride_vh, stride_vt = _eights(stride_vb, stride_vh, stride_vt)
        stride_ob, stride_oh, stride_ot = _eights(stride_ob, stride_oh, stride_ot)
    tiles = tl.cdiv(Tq, BLOCK_M)
    bh = tl.program_id(0) // tiles
    start_m = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    rows = start_m + tl.arange(0, BLOCK_M)
    mask = rows[:, None] < Tq
    offs_m = rows + (Tk - Tq)

    q_base, o_base = q_ptr + b * stride_qb + h * stride_qh, o_ptr + b * stride_ob + h * stride_oh
    k_base, v_base = k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh
    tile = _tile(q_base, rows, stride_qt, stride_qd, HEAD_DIM, BLOCK_D, EIGHTS)
    q = _load(tile, mask, stride_qd, HEAD_DIM, BLOCK_D)
    offs_n = lane_order(BLOCK_N, QUADS)
    k_ptrs = _tile(k_base, offs_n, stride_kt, stride_kd, HEAD_DIM, BLOCK_D, EIGHTS)
    v_ptrs = _tile(v_base, offs_n, stride_vt, stride_vd, HEAD_DIM, BLOCK_D, EIGHTS)
    if DROPOUT:
        seed, step, first = load_key(key_ptr, HAS_FIRST)
        plane = first * H.to(tl.uint32) + bh.to(tl.uint32)
    else:
        seed, step, plane = 0, 0, 0

    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Every row of the tile sees the keys before `full`, some row those before `high`.
    full = (start_m + Tk - Tq + 1) // BLOCK_N * BLOCK_N
    high = tl.minimum(start_m + BLOCK_M, Tq) + Tk - Tq
    if ONE_LOOP:
        full = 0
    else:
        acc, m_i, l_i = _forward_tiles(
            acc, m_i, l_i, q, k_ptrs, v_ptrs, stride_kt, stride_kd, stride_vt, stride_vd, 0, full,
            offs_m, Tk, qk_scale, seed, step, plane, site, threshold,
            HEAD_DIM, BLOCK_D, BLOCK_N, DROPOUT, QUADS, PRECISION, WIDEN, EXACT, MASKED=False,
        )  # fmt: skip
    acc, m_i, l_i = _forward_tiles(
        acc, m_i, l_i, q, k_ptrs, v_ptrs, stride_kt, stride_kd, stride_vt, stride_vd, full, high,
        offs_m, Tk, qk_scale, seed, step, plane, site, threshold,
        HEAD_DIM, BLOCK_D, BLOCK_N, DROPOUT, QUADS, PRECISION, WIDEN, EXACT, MASKED=True,
    )  # fmt: skip

    o = acc * (keep_scale / l_i)[:, None]
    o_ptrs = _tile(o_base, rows, stride_ot, stride_od, HEAD_DIM, BLOCK_D, EIGHTS)
    _store(o_ptrs, o, mask, stride_od, HEAD_DIM, BLOCK_D)
    lse_ptr += bh.to(tl.int64) * Tq
    tl.store(lse_ptr + rows, m_i if EXACT else m_i + tl.log2(l_i), rows < Tq)
    if EXACT:
        planes = tl.num_programs(0) // tiles
        tl.store(lse_ptr + planes.to(tl.int64) * Tq + rows, 1.0 / l_i, rows < Tq)


@jit
def _dq_tiles(
    acc, q, do, lse, inv_l, delta, k_ptrs, v_ptrs, stride_kt, stride_kd, stride_vt, stride_vd,
    low, high, offs_m, Tk, qk_scale, seed, step, plane, site, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
    QUADS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, EXACT: tl.constexpr,
    MASKED: tl.constexpr, ONLY_DELTA: tl.constexpr,
):  # fmt: skip
    """Add to acc, dq (BLOCK_M, BLOCK_D) or delta (BLOCK_M,), what keys low ... high contribute."""
    PARTS: tl.constexpr = 4 if EXACT and PRECISION == "ieee" else 1
    offs_n = lane_order(BLOCK_N, QUADS)
    for start_n in range(low, high, BLOCK_N):
        step_n = tl.cast(start_n, tl.int64)
        mask = (start_n + offs_n)[:, None] < Tk if MASKED else None
        k = _load(k_ptrs + step_n * stride_kt, mask, stride_kd, HEAD_DIM, BLOCK_D)
        v = _load(v_ptrs + step_n * stride_vt, mask, stride_vd, HEAD_DIM, BLOCK_D)
        s = _dot_rows(q, k, PRECISION, WIDEN, PARTS)
        visible = (start_n + offs_n)[None, :] <= offs_m[:, None]
        p = _probabilities(s, visible, qk_scale, lse[:, None], inv_l[:, None], MASKED, EXACT)
        dp = _dot_rows(do, v, PRECISION, WIDEN, PARTS)
        if DROPOUT:
            keep = keep_tile(seed, step, plane, site, offs_m, start_n, threshold, BLOCK_N, QUADS)
            dp = tl.where(keep, dp, 0.0)
        if ONLY_DELTA:
            acc += tl.sum(p * dp, 1)
        else:
            ds = p * (dp - delta[:, None])
            acc = _dot(ds.to(k.dtype), k, acc, PRECISION, WIDEN)
    return acc


@jit(do_not_specialize=_UNSPECIALISED)
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr,  # (B, H, Tq or Tk, D), any strides
    lse_ptr,  # (1 or 2, B, H, Tq) float32
    delta_ptr,  # (B, H, Tq) float32, written for the other kernel
    key_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_dob, stride_doh, stride_dot, stride_dod,
    stride_dqb, stride_dqh, stride_dqt, stride_dqd,
    H, Tq, Tk, qk_scale, dq_scale, keep_scale, site, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, QUADS: tl.constexpr, HAS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, EXACT: tl.constexpr, EIGHTS: tl.constexpr, ONE_LOOP: tl.constexpr,
):  # fmt: skip
    """Program bh * tiles + i owns query tile tiles - 1 - i: its delta and dq."""
    if EIGHTS:
        stride_qb, stride_qh, stride_qt = _eights(stride_qb, stride_qh, stride_qt)
        stride_kb, stride_kh, stride_kt = _eights(stride_kb, stride_kh, stride_kt)
        stride_vb, stride_vh, stride_vt = _eights(stride_vb, stride_vh, stride_vt)
        stride_ob, stride_oh, stride_ot = _eights(stride_ob, stride_oh, stride_ot)
        stride_dob, stride_doh, stride_dot = _eights(stride_dob, stride_doh, stride_dot)
        stride_dqb, stride_dqh, stride_dqt = _eights(stride_dqb, stride_dqh, stride_dqt)
    tiles = tl.cdiv(Tq, BLOCK_M)
    bh = tl.program_id(0) // tiles
    start_m = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    rows = start_m + tl.arange(0, BLOCK_M)
    mask = rows[:, None] < Tq
    offs_m = rows + (Tk - Tq)

    q_base, o_base = q_ptr + b * stride_qb + h * stride_qh, o_ptr + b * stride_ob + h * stride_oh
    k_base, v_base = k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh
    do_base, dq_base = do_ptr + b * stride_dob + h * stride_doh, dq_ptr + b * stride_dqb
    dq_base += h * stride_dqh
    tile = _tile(q_base, rows, stride_qt, stride_qd, HEAD_DIM, BLOCK_D, EIGHTS)
    q = _load(tile, mask, stride_qd, HEAD_DIM, BLOCK_D)
    tile = _tile(o_base, rows, stride_ot, stride_od, HEAD_DIM, BLOCK_D, EIGHTS)
    o = _load(tile, mask, stride_od, HEAD_DIM, BLOCK_D)
    tile = _tile(do_base, rows, stride_dot, stride_dod, HEAD_DIM, BLOCK_D, EIGHTS)
    do = _load(tile, mask, stride_dod, HEAD_DIM, BLOCK_D)
    lse_ptr += bh.to(tl.int64) * Tq
    lse = tl.load(lse_ptr + rows, rows < Tq, other=float("inf"))
    inv_l = lse
    if EXACT:
        planes = tl.num_programs(0) // tiles
        inv_l = tl.load(lse_ptr + planes.to(tl.int64) * Tq + rows, rows < Tq, other=0.0)
    offs_n = lane_order(BLOCK_N, QUADS)
    k_ptrs = _tile(k_base, offs_n, stride_kt, stride_kd, HEAD_DIM, BLOCK_D, EIGHTS)
    v_ptrs = _tile(v_base, offs_n, stride_vt, stride_vd, HEAD_DIM, BLOCK_D, EIGHTS)
    if DROPOUT:
        seed, step, first = load_key(key_ptr, HAS_FIRST)
        plane = first * H.to(tl.uint32) + bh.to(tl.uint32)
    else:
        seed, step, plane = 0, 0, 0

    full = (start_m + Tk - Tq + 1) // BLOCK_N * BLOCK_N
    high = tl.minimum(start_m + BLOCK_M, Tq) + Tk - Tq
    if EXACT:
        # rowsum(P * dP) rounds with dP, which rowsum(do * o) does not: it halves the error of ds.
        delta = tl.zeros((BLOCK_M,), tl.float32)
        delta = _dq_tiles(
            delta, q, do, lse, inv_l, delta, k_ptrs, v_ptrs, stride_kt, stride_kd, stride_vt,
            stride_vd, 0, full, offs_m, Tk, qk_scale, seed, step, plane, site, threshold, HEAD_DIM,
            BLOCK_D, BLOCK_N, DROPOUT, QUADS, PRECISION, WIDEN, EXACT, MASKED=False,
            ONLY_DELTA=True,
        )  # fmt: skip
        delta = _dq_tiles(
            delta, q, do, lse, inv_l, delta, k_ptrs, v_ptrs, stride_kt, stride_kd, stride_vt,
            stride_vd, full, high, offs_m, Tk, qk_scale, seed, step, plane, site, threshold,
            HEAD_DIM, BLOCK_D, BLOCK_N, DROPOUT, QUADS, PRECISION, WIDEN, EXACT, MASKED=True,
            ONLY_DELTA=True,
        )  # fmt: skip
    else:
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) / keep_scale
    tl.store(delta_ptr + bh.to(tl.int64) * Tq + rows, delta, rows < Tq)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if ONE_LOOP:
        full = 0
    else:
        dq = _dq_tiles(
            dq, q, do, lse, inv_l, delta, k_ptrs, v_ptrs, stride_kt, stride_kd, stride_vt,
            stride_vd, 0, full, offs_m, Tk, qk_scale, seed, step, plane, site, threshold, HEAD_DIM,
            BLOCK_D, BLOCK_N, DROPOUT, QUADS, PRECISION, WIDEN, EXACT, MASKED=False,
            ONLY_DELTA=False,
        )  # fmt: skip
    dq = _dq_tiles(
        dq, q, do, lse, inv_l, delta, k_ptrs, v_ptrs, stride_kt, stride_kd, stride_vt, stride_vd,
        full, high, offs_m, Tk, qk_scale, seed, step, plane, site, threshold, HEAD_DIM, BLOCK_D,
        BLOCK_N, DROPOUT, QUADS, PRECISION, WIDEN, EXACT, MASKED=True, ONLY_DELTA=False,
    )  # fmt: skip
    dq_ptrs = _tile(dq_base, rows, stride_dqt, stride_dqd, HEAD_DIM, BLOCK_D, EIGHTS)
    _store(dq_ptrs, dq * dq_scale, mask, stride_dqd, HEAD_DIM, BLOCK_D)


@jit
def _dkdv_tiles(
    dk, dv, k, v, q_ptrs, do_ptrs, lse_ptr, inv_l_ptr, delta_ptr, stride_qt, stride_qd,
    stride_dot, stride_dod, low, high, start_n, Tq, Tk, qk_scale,
    seed, step, plane, site, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, QUADS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to dk, dv (BLOCK_N, BLOCK_D) what the queries low ... high contribute."""
    PARTS: tl.constexpr = 4 if EXACT and PRECISION == "ieee" else 1
    # The mask is drawn in the registers that dp would take. Without one, and in float32, it spills.
    DV_FIRST: tl.constexpr = DROPOUT and not EXACT
    offs_n = start_n + lane_order(BLOCK_N, QUADS)
    for start_m in range(low, high, BLOCK_M):
        rows = start_m + tl.arange(0, BLOCK_M)
        step_m = tl.cast(start_m, tl.int64)
        mask = rows[:, None] < Tq
        q = _load(q_ptrs + step_m * stride_qt, mask, stride_qd, HEAD_DIM, BLOCK_D)
        do = _load(do_ptrs + step_m * stride_dot, mask, stride_dod, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + rows, rows < Tq, other=float("inf"))
        delta = tl.load(delta_ptr + rows, rows < Tq, other=0.0)
        inv_l = tl.load(inv_l_ptr + rows, rows < Tq, other=0.0) if EXACT else lse
        offs_m = rows + (Tk - Tq)
        s = _dot_rows(q, k, PRECISION, WIDEN, PARTS)
        visible = offs_n[None, :] <= offs_m[:, None]
        p = _probabilities(s, visible, qk_scale, lse[:, None], inv_l[:, None], MASKED, EXACT)
        if not DV_FIRST:
            dp = _dot_rows(do, v, PRECISION, WIDEN, PARTS)
        if DROPOUT:
            keep = keep_tile(seed, step, plane, site, offs_m, start_n, threshold, BLOCK_N, QUADS)
            p_delta = p * delta[:, None]
            p = tl.where(keep, p, qk_scale * 0.0)
        if DV_FIRST:
            dv = _dot(p.to(do.dtype).T, do, dv, PRECISION, WIDEN)
            dp = _dot_rows(do, v, PRECISION, WIDEN, PARTS)
        ds = p * dp - p_delta if DROPOUT else p * (dp - delta[:, None])
        if not DV_FIRST:
            dv = _dot(p.to(do.dtype).T, do, dv, PRECISION, WIDEN)
        dk = _dot(ds.to(q.dtype).T, q, dk, PRECISION, WIDEN)
    return dk, dv


@jit(do_not_specialize=_UNSPECIALISED)
def _attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr,  # (B, H, Tq or Tk, D), any strides
    lse_ptr,  # (1 or 2, B, H, Tq) float32
    delta_ptr,  # (B, H, Tq) float32
    key_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_dob, stride_doh, stride_dot, stride_dod,
    stride_dkb, stride_dkh, stride_dkt, stride_dkd,
    stride_dvb, stride_dvh, stride_dvt, stride_dvd,
    H, Tq, Tk, qk_scale, dk_scale, keep_scale, site, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, QUADS: tl.constexpr, HAS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, EXACT: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """Program bh * tiles + i owns key tile i, the longest first: its dk and dv."""
    if EIGHTS:
        stride_qb, stride_qh, stride_qt = _eights(stride_qb, stride_qh, stride_qt)
        stride_kb, stride_kh, stride_kt = _eights(stride_kb, stride_kh, stride_kt)
        stride_vb, stride_vh, stride_vt = _eights(stride_vb, stride_vh, stride_vt)
        stride_dob, stride_doh, stride_dot = _eights(stride_dob, stride_doh, stride_dot)
        stride_dkb, stride_dkh, stride_dkt = _eights(stride_dkb, stride_dkh, stride_dkt)
        stride_dvb, stride_dvh, stride_dvt = _eights(stride_dvb, stride_dvh, stride_dvt)
    tiles = tl.cdiv(Tk, BLOCK_N)
    bh = tl.program_id(0) // tiles
    start_n = tl.program_id(0) % tiles * BLOCK_N
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    cols = start_n + lane_order(BLOCK_N, QUADS)
    mask = cols[:, None] < Tk

    k_base, v_base = k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh
    q_base, do_base = q_ptr + b * stride_qb + h * stride_qh, do_ptr + b * stride_dob
    do_base += h * stride_doh
    tile = _tile(k_base, cols, stride_kt, stride_kd, HEAD_DIM, BLOCK_D, EIGHTS)
    k = _load(tile, mask, stride_kd, HEAD_DIM, BLOCK_D)
    tile = _tile(v_base, cols, stride_vt, stride_vd, HEAD_DIM, BLOCK_D, EIGHTS)
    v = _load(tile, mask, stride_vd, HEAD_DIM, BLOCK_D)
    offs_m = tl.arange(0, BLOCK_M)
    q_ptrs = _tile(q_base, offs_m, stride_qt, stride_qd, HEAD_DIM, BLOCK_D, EIGHTS)
    do_ptrs = _tile(do_base, offs_m, stride_dot, stride_dod, HEAD_DIM, BLOCK_D, EIGHTS)
    lse_ptr += bh.to(tl.int64) * Tq
    inv_l_ptr = lse_ptr + (tl.num_programs(0) // tiles).to(tl.int64) * Tq
    delta_ptr += bh.to(tl.int64) * Tq
    if DROPOUT:
        seed, step, first = load_key(key_ptr, HAS_FIRST)
        plane = first * H.to(tl.uint32) + bh.to(tl.uint32)
    else:
        seed, step, plane = 0, 0, 0

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # Queries before `low` see no key of the tile, those from `full` on all of them.
    low = tl.maximum(start_n - (Tk - Tq), 0) // BLOCK_M * BLOCK_M
    full = tl.maximum(start_n + BLOCK_N - 1 - (Tk - Tq), 0)
    full = tl.minimum(tl.cdiv(full, BLOCK_M) * BLOCK_M, Tq)
    dk, dv = _dkdv_tiles(
        dk, dv, k, v, q_ptrs, do_ptrs, lse_ptr, inv_l_ptr, delta_ptr, stride_qt, stride_qd,
        stride_dot, stride_dod, low, full, start_n, Tq, Tk, qk_scale, seed, step, plane, site,
        threshold, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, QUADS, PRECISION, WIDEN, EXACT,
        MASKED=True,
    )  # fmt: skip
    dk, dv = _dkdv_tiles(
        dk, dv, k, v, q_ptrs, do_ptrs, lse_ptr, inv_l_ptr, delta_ptr, stride_qt, stride_qd,
        stride_dot, stride_dod, full, Tq, start_n, Tq, Tk, qk_scale, seed, step, plane, site,
        threshold, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, QUADS, PRECISION, WIDEN, EXACT,
        MASKED=False,
    )  # fmt: skip
    dk_base, dv_base = dk_ptr + b * stride_dkb, dv_ptr + b * stride_dvb
    dk_base, dv_base = dk_base + h * stride_dkh, dv_base + h * stride_dvh
    dk_ptrs = _tile(dk_base, cols, stride_dkt, stride_dkd, HEAD_DIM, BLOCK_D, EIGHTS)
    dv_ptrs = _tile(dv_base, cols, stride_dvt, stride_dvd, HEAD_DIM, BLOCK_D, EIGHTS)
    _store(dk_ptrs, dk * dk_scale, mask, stride_dkd, HEAD_DIM, BLOCK_D)
    _store(dv_ptrs, dv * keep_scale, mask, stride_dvd, HEAD_DIM, BLOCK_D)


@dataclass(frozen=True)
class Plan:
    """Block sizes and compiler options of one kernel."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int
    registers: int | None = None  # a thread at most, on NVIDIA's; None: as the compiler likes
    one_loop: bool = False  # not of dkdv: all tiles as if they were on the diagonal


def _plans(*blocks: tuple) -> dict[str, Plan]:
    """The fields of the forward's, dq's and dkdv's plans as a row of `_PLANS`."""
    names = ("forward", "dq", "dkdv")
    return {name: Plan(*fields) for name, fields in zip(names, blocks, strict=True)}


# By architecture, for up to D and T (keys; None: any number), with dropout or without (None:
# either); of the rows that fit, the one of the least D, then T, is used. Chosen by `python -m
# kernels.codegen`: no spills, on sm_90 wgmma for every product where a plan has it, then two
# programs a multiprocessor; `python -m kernels.tune` prints measured ones. Those of sm_80, which
# serve where another architecture has none, fit the 99 KB of sm_86 and sm_89.
_PLANS = {
    "sm_80": {
        (64, None, None): _plans((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
        (128, None, None): _plans((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1)),
        (256, None, None): _plans((64, 64, 8, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    },
    "sm_90": {
        # What a program does around its loops counts as much as they do, so that more programs take
        # turns: 4 for 3 (forward; under Triton 3.6 for 2) and 3 for 2 (dq). A second copy of the
        # loop, without the diagonal's comparisons, would cost the registers of the fourth, keys
        # loaded ahead those of the third.
        (64, 512, True): _plans((64, 64, 4, 2, 128, True), (64, 64, 4, 1, 168), (64, 64, 4, 1)),
        # Of two loops that load ahead ptxas waits for every wgmma before the next; of one it does
        # not, and has fewer instructions an element. With dropout dkdv spills where it loads ahead.
        (64, None, False): _plans(
            (64, 64, 4, 2, None, True), (64, 64, 4, 2, None, True), (64, 64, 4, 2)
        ),
        (64, None, None): _plans(
            (64, 64, 4, 2, None, True), (64, 64, 4, 2, None, True), (64, 64, 4, 1)
        ),
        (128, None, None): _plans(
            (64, 64, 4, 2, None, True), (128, 64, 8, 2, None, True), (128, 64, 8, 1)
        ),
        (256, None, None): _plans(
            (128, 64, 8, 2, None, True), (128, 32, 8, 2, None, True), (32, 64, 8, 1)
        ),
    },
    "gfx942": {
        (64, None, None): _plans((128, 32, 4, 1), (128, 32, 4, 1), (64, 16, 4, 1)),
        (128, None, None): _plans((128, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
        (256, None, None): _plans((64, 32, 4, 2), (64, 16, 4, 1), (64, 16, 4, 1)),
    },
    "sm_100": {
        (64, None, None): _plans((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 1)),
        (128, None, None): _plans((64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
        (256, None, None): _plans((128, 32, 8, 1), (128, 64, 8, 1), (64, 64, 8, 1)),
    },
}
# float32, whose products are of scalars: what a thread multiplies it holds in registers. Below 64
# rows sm_100 takes no tensor core, which would round to TF32 whatever is asked.
_FLOAT32 = (Plan(32, 32, 4, 1), Plan(32, 16, 4, 1), Plan(16, 16, 8, 1))
# float32 in TF32, D <= 64 and D <= 128, but for AMD: tensor cores take the products, wgmma those
# with 64 rows. On sm_90 with dropout instructions an element fall from 61 to 30 (forward), 81 to
# 30 (dq) and 62 to 47 (dkdv).
_TF32 = (
    dict.fromkeys(("forward", "dq", "dkdv"), Plan(64, 32, 4, 1)),
    {"forward": Plan(64, 16, 4, 1), "dq": Plan(32, 16, 4, 1), "dkdv": Plan(16, 64, 4, 1)},
)
# sm_90, D = 85: of the plans tried those of the least static bound: 19.4, 23.4 and 34.3 us on an
# H200 at the notebook's size with Triton 3.7.1, 31.9, 48.7 and 53.3 with 3.6, under which all three
# spill; under 3.7.1 dkdv does, mostly what it needs after its loops.
_ODD_ROWS = {
    "forward": Plan(128, 32, 8, 1), "dq": Plan(128, 32, 8, 1), "dkdv": Plan(16, 128, 8, 1)
}  # fmt: skip


def plan(
    kernel: str,
    architecture: str,
    D: int,
    T: int,
    dtype: torch.dtype,
    dropout: bool,
    tf32: bool = False,
) -> Plan:
    """The launch plan of `kernel`, "forward", "dq" or "dkdv".

    Args:
        T: number of keys.
        tf32: float32 is multiplied so.
    """
    if architecture == "interpreter":
        # Small and not square, so that small tests cross every kind of block edge; the same for
        # all kernels, because numpy's products round differently in each shape.
        return Plan(16, 32, 4, 1, one_loop=dropout) if D <= 32 else Plan(32, 16, 4, 1)
    size = (D > 64) + (D > 128)
    if tf32 and size < 2 and not architecture.startswith("gfx"):
        return _TF32[size][kernel]
    if dtype == torch.float32:
        return _FLOAT32[1 if kernel == "dq" and size == 0 else size]
    if D > 32 and D % 8:  # elements of odd rows are loaded one by one
        if architecture == "sm_90":
            return _ODD_ROWS[kernel]
        if kernel == "forward" and size:
            return Plan(64, 32, 4, 1)  # 64 keys spill
    return _row(architecture, D, T, dropout)[kernel]


def _row(architecture: str, D: int, T: int, dropout: bool) -> dict[str, Plan]:
    """The plans of the three kernels in the row that counts."""
    rows = _PLANS["sm_80"] | _PLANS.get(architecture, {})
    *_, plans = min(
        (most_D, most_T or math.inf, drops is None, plans)
        for (most_D, most_T, drops), plans in rows.items()
        if D <= most_D and T <= (most_T or math.inf) and drops in (None, dropout)
    )
    if D & (D - 1):  # columns to be masked take registers of their own
        plans = {name: replace(blocks, registers=None) for name, blocks in plans.items()}
    return plans


def _quads(architecture: str, block_n: int) -> bool:
    """Whether keys are dealt out in `lane_order`: where mma.sync or wgmma spreads columns in pairs.

    Tensor memory and AMD's matrix cores give a thread more columns in a row.
    """
    return block_n >= 32 and not architecture.startswith(("sm_10", "gfx"))


def _qk_scale(q, scale: float) -> float:
    """What the kernels multiply q.k by: float32 is taken to the power of e, the rest of 2."""
    return scale if q.dtype == torch.float32 else scale * LOG2E


def _options(kernel: str, tensors, dropout_p: float, key, blocks: Plan | None) -> tuple[Plan, dict]:
    """The plan of a launch and the constexpr arguments it shares with the others.

    tensors: all that the kernel takes by strides, q and k first.
    """
    q, k = tensors[:2]
    D, architecture = q.shape[-1], backend.architecture(q.device)
    precision = backend.product_precision(q)
    tf32 = precision == "tf32"
    blocks = blocks or plan(kernel, architecture, D, k.shape[2], q.dtype, dropout_p > 0, tf32)
    options = {"maxnreg": blocks.registers} if blocks.registers else {}
    if kernel != "dkdv":
        options["ONE_LOOP"] = blocks.one_loop
    return blocks, options | {
        "HEAD_DIM": D,
        "BLOCK_D": max(16, backend.next_power_of_2(D)),
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
        "DROPOUT": dropout_threshold(dropout_p) > 0,
        "QUADS": dropout_threshold(dropout_p) > 0 and _quads(architecture, blocks.block_n),
        "HAS_FIRST": key is not None and key.numel() == 3,
        "PRECISION": precision,
        "EXACT": q.dtype == torch.float32,
        "WIDEN": architecture == "interpreter" and q.dtype == torch.bfloat16,
        "EIGHTS": D % 16 == 8
        and all(stride % 8 == 0 for x in tensors for stride in x.stride()[:-1])
        and all(x.stride(-1) == 1 for x in tensors),
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }


def _strides(tensors) -> list[int]:
    return [stride for x in tensors for stride in x.stride()]


def forward(q, k, v, o, key, scale, dropout_p, site, blocks: Plan | None = None):
    """Write o (B, H, Tq, D) and return lse (1 or 2, B, H, Tq), float32.

    For float32 inputs lse[0] is the maximum of a row's scores instead, lse[1] 1 / sum e^(s - m).
    """
    B, H, Tq, _ = q.shape
    tensors = q, k, v, o
    blocks, options = _options("forward", tensors, dropout_p, key, blocks)
    lse = saved_like(q, k, dropout_p)
    backend.launch(
        _attention_forward_kernel,
        (B * H * -(-Tq // blocks.block_m),),
        *(*tensors, lse, lse if key is None else key),
        *_strides(tensors),
        *(H, Tq, k.shape[2], _qk_scale(q, scale), dropout_scale(dropout_p)),
        *(site, dropout_threshold(dropout_p)),
        **options,
    )
    return lse


def backward(
    do, q, k, v, o, lse, dq, dk, dv, key, scale, dropout_p, site,
    dq_blocks: Plan | None = None, dkdv_blocks: Plan | None = None,
):  # fmt: skip
    """Write dq, dk, dv, tensors like q, k, v."""
    B, H, Tq, _ = q.shape
    Tk = k.shape[2]
    keep_scale = dropout_scale(dropout_p)
    scales = _qk_scale(q, scale), scale * keep_scale, keep_scale
    key = lse if key is None else key
    delta = torch.empty_like(lse[0])
    tensors = q, k, v, o, do, dq
    blocks, options = _options("dq", tensors, dropout_p, key, dq_blocks)
    backend.launch(
        _attention_dq_kernel,
        (B * H * -(-Tq // blocks.block_m),),
        *(*tensors, lse, delta, key),
        *_strides(tensors),
        *(H, Tq, Tk, *scales, site, dropout_threshold(dropout_p)),
        **options,
    )
    tensors = q, k, v, do, dk, dv
    blocks, options = _options("dkdv", tensors, dropout_p, key, dkdv_blocks)
    backend.launch(
        _attention_dkdv_kernel,
        (B * H * -(-Tk // blocks.block_n),),
        *(*tensors, lse, delta, key),
        *_strides(tensors),
        *(H, Tq, Tk, *scales, site, dropout_threshold(dropout_p)),
        **options,
    )


def saved_like(q, k, dropout_p):
    """An empty tensor like what `forward` returns."""
    parts = 2 if q.dtype == torch.float32 else 1
    return q.new_empty(parts, *q.shape[:3], dtype=torch.float32)
