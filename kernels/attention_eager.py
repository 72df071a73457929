"""`kernels.attention` with dropout in plain PyTorch: the CPU path.

SDPA refuses its flash kernel where there is dropout, and holds every probability several times
over. Here blocks of planes and queries stay in the cache, stop at the diagonal, and leave one bit
per probability for the backward, which recomputes the rest:

    dp = R * (c do v^T)      ds = P * (dp - rowsum(P * dp))
    dv = (R * P)^T (c do)    dk = ds^T (scale q)            dq = scale ds k
"""

import functools
import math

import numpy as np
import torch

from kernels.rng import dropout_keep_mask, dropout_scale

_BLOCK_QUERIES = 64
_BLOCK_ELEMENTS = 1 << 18  # probabilities in one block, 1 MB of float32


def _chunks(B, H, Tq, Tk):
    """Slices of batch and heads whose blocks have about _BLOCK_ELEMENTS probabilities."""
    planes = max(1, _BLOCK_ELEMENTS // (min(_BLOCK_QUERIES, Tq) * Tk))
    heads, batches = max(1, min(H, planes)), max(1, planes // max(1, H))
    for b in range(0, B, batches):
        for h in range(0, H, heads):
            yield slice(b, min(b + batches, B)), slice(h, min(h + heads, H))


def _query_blocks(Tq, Tk):
    """(queries, number of keys visible to the last of them) of every block."""
    for start in range(0, Tq, _BLOCK_QUERIES):
        stop = min(start + _BLOCK_QUERIES, Tq)
        yield slice(start, stop), stop + Tk - Tq


def _planes(x, chunk, dtype):
    """x[chunk] as (planes, T, D) of `dtype`."""
    return x[chunk].reshape(-1, *x.shape[2:]).to(dtype)


def _probabilities(q, k, above):
    """softmax of q (planes, R, D) and the keys k (planes, N, D) it sees, the last R in part."""
    s = torch.bmm(q, k.mT)
    R = q.shape[1]
    s[:, :, -R:] += above[:R, :R]
    return torch.softmax(s, -1)


def _above_diagonal(Tq, dtype, device):
    """What is added to the scores of a block's own positions: -inf above the diagonal."""
    R = min(Tq, _BLOCK_QUERIES)
    return torch.full((R, R), float("-inf"), dtype=dtype, device=device).triu_(1)


def _keep_block(key, site, dropout_p, H, chunk, rows, visible):
    """(planes, R, visible) bool of one block."""
    batch, heads = chunk
    b = torch.arange(batch.start, batch.stop, device=key.device)
    h = torch.arange(heads.start, heads.stop, device=key.device)
    if key.numel() == 3:
        b = b + key[2]
    planes = (b[:, None] * H + h).flatten()
    positions = range(visible - (rows.stop - rows.start), visible)
    return dropout_keep_mask(key, site, planes, positions, visible, dropout_p)


def _pack(keep):
    """Eight booleans a byte, on the CPU; numpy does it at memory speed and torch has no such op."""
    if keep.device.type != "cpu":
        return keep.flatten()
    return torch.from_numpy(np.packbits(keep.numpy()))


def _unpack(packed, shape):
    """The booleans of `shape` at the front of `packed`, and what follows them."""
    count = math.prod(shape)
    if packed.device.type != "cpu":
        return packed[:count].view(shape), packed[count:]
    size = -(-count // 8)
    bits = np.unpackbits(packed[:size].numpy(), count=count)
    return torch.from_numpy(bits).view(torch.bool).view(shape), packed[size:]


def _without_autocast(function):
    """`function(tensor, ...)` with autocast off: it has chosen its dtypes itself."""

    @functools.wraps(function)
    def call(tensor, *args):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args)

    return call


@_without_autocast
def forward(q, k, v, o, key, scale, dropout_p, site):
    """Write o (B, H, Tq, D) and return the packed mask."""
    B, H, Tq, _ = q.shape
    Tk = k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    above = _above_diagonal(Tq, dtype, q.device)
    packed = []
    for chunk in _chunks(B, H, Tq, Tk):
        q_planes = _planes(q, chunk, dtype) * scale
        k_planes, v_planes = _planes(k, chunk, dtype), _planes(v, chunk, dtype)
        o_planes = torch.empty_like(q_planes)
        for rows, visible in _query_blocks(Tq, Tk):
            p = _probabilities(q_planes[:, rows], k_planes[:, :visible], above)
            keep = _keep_block(key, site, dropout_p, H, chunk, rows, visible)
            packed.append(_pack(keep))
            p *= keep
            o_planes[:, rows] = torch.bmm(p, v_planes[:, :visible])
        o[chunk] = o_planes.mul_(dropout_scale(dropout_p)).view(o[chunk].shape)
    return torch.cat(packed) if packed else torch.empty(0, dtype=torch.uint8, device=q.device)


@_without_autocast
def backward(do, q, k, v, o, packed, dq, dk, dv, key, scale, dropout_p, site):
    """Write dq, dk, dv, tensors like q, k, v."""
    B, H, Tq, _ = q.shape
    Tk = k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    above = _above_diagonal(Tq, dtype, q.device)
    for chunk in _chunks(B, H, Tq, Tk):
        q_planes = _planes(q, chunk, dtype) * scale
        k_planes, v_planes = _planes(k, chunk, dtype), _planes(v, chunk, dtype)
        do_planes = _planes(do, chunk, dtype) * dropout_scale(dropout_p)
        dq_planes = torch.empty_like(q_planes)
        dk_planes, dv_planes = torch.zeros_like(k_planes), torch.zeros_like(v_planes)
        for rows, visible in _query_blocks(Tq, Tk):
            q_rows, do_rows = q_planes[:, rows], do_planes[:, rows]
            p = _probabilities(q_rows, k_planes[:, :visible], above)
            keep, packed = _unpack(packed, p.shape)
            keep = keep.to(dtype)
            dp = torch.bmm(do_rows, v_planes[:, :visible].mT).mul_(keep)
            ds = torch._softmax_backward_data(dp, p, -1, dtype)
            dv_planes[:, :visible].baddbmm_(p.mul_(keep).mT, do_rows)
            dk_planes[:, :visible].baddbmm_(ds.mT, q_rows)
            dq_planes[:, rows] = torch.bmm(ds, k_planes[:, :visible])
        dq[chunk] = dq_planes.mul_(scale).view(dq[chunk].shape)
        dk[chunk] = dk_planes.view(dk[chunk].shape)
        dv[chunk] = dv_planes.view(dv[chunk].shape)


def saved_like(q, k):
    """An empty tensor like what `forward` returns."""
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    on_cpu = q.device.type == "cpu"
    size = 0
    for batch, heads in _chunks(B, H, Tq, Tk):
        planes = (batch.stop - batch.start) * (heads.stop - heads.start)
        for rows, visible in _query_blocks(Tq, Tk):
            count = planes * (rows.stop - rows.start) * visible
            size += -(-count // 8) if on_cpu else count
    return q.new_empty(size, dtype=torch.uint8 if on_cpu else torch.bool)
