"""`kernels.attention` in plain PyTorch: the CPU path.

SDPA refuses its flash kernel where there is dropout, and holds every probability several times
over. Here blocks of planes and queries stay in the cache, stop at the diagonal, and leave one bit
per probability for the backward, which recomputes the rest:

    dp = R * (c do v^T)      ds = P * (dp - rowsum(P * dp))
    dv = c (R * P)^T do      dk = scale ds^T q              dq = scale ds k
"""

import functools
import math

import numpy as np
import torch

from kernels import rotary
from kernels.backend import faking, multiplies_bfloat16, once_differentiable
from kernels.rng import as_bytes, dropout_keep_mask, dropout_scale
from kernels.threads import for_each

_BLOCK_QUERIES = 64
# Probabilities in one block, at most: two threads, whose ops begin and end in Python, hold each
# other up at every op, so that ops should be longer than what would best fit the L2.
BLOCK_ELEMENTS = 1 << 20


def _chunks(q, k):
    """Slices of batch and heads, as many for each thread, of up to BLOCK_ELEMENTS a block."""
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    threads = torch.get_num_threads() if q.is_cpu else 1
    rounds = math.ceil(B * H * min(_BLOCK_QUERIES, Tq) * Tk / (threads * BLOCK_ELEMENTS))
    planes = math.ceil(B * H / max(1, rounds * threads))
    heads, batches = max(1, min(H, planes)), max(1, math.ceil(planes / max(1, H)))
    for b in range(0, B, batches):
        for h in range(0, H, heads):
            yield slice(b, min(b + batches, B)), slice(h, min(h + heads, H))


def _query_blocks(Tq, Tk):
    """(queries, number of keys visible to the last of them) of every block, the largest first."""
    for start in reversed(range(0, Tq, _BLOCK_QUERIES)):
        stop = min(start + _BLOCK_QUERIES, Tq)
        yield slice(start, stop), stop + Tk - Tq


class _Scratch:
    """Memory that every block of a call uses again: fresh pages would cost more than the sums.

    Attributes:
        dtype: of the products and all between them; sums over blocks are `wide`. bfloat16 only
            where the CPU multiplies it, and then as plain PyTorch rounds.
    """

    def __init__(self, q):
        self.wide, self.device = torch.promote_types(q.dtype, torch.float32), q.device
        self.dtype = product_dtype(q.dtype, q.is_cpu)
        self.buffers = {}

    def __call__(self, name, *shape, dtype=None):
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            dtype = dtype or self.dtype
            self.buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self.buffers[name][:size].view(shape)

    def planes(self, name, x):
        """x (b, h, T, D) as (b * h, T, D)."""
        return self(name, *x.shape).copy_(x).flatten(0, 1)

    def product(self, name, a, b, alpha=1.0):
        """alpha * a @ b, rounded once."""
        out = self(name, *a.shape[:2], b.shape[2])
        return torch.baddbmm(out, a, b, beta=0, alpha=alpha, out=out)

    def add_product(self, total, a, b, alpha=1.0):
        """total += alpha * a @ b."""
        if total.dtype == a.dtype:
            total.baddbmm_(a, b, alpha=alpha)
        else:
            total.add_(self.product("part", a, b, alpha))

    def numbers(self, keep):
        """0 and 1 of booleans."""
        return self("keep", *keep.shape).copy_(as_bytes(keep))

    def probabilities(self, q, k, scale):
        """softmax of q (planes, R, D) and the keys k (planes, N, D) it sees, the last R in part."""
        R = q.shape[1]
        s = self.product("scores", q, k.mT, scale)
        if R > 1:
            s[:, :, -R:].add_(above_diagonal(R, R, self.dtype, self.device))
        return torch.softmax(s, -1, out=self("probabilities", *s.shape))


def above_diagonal(Tq, Tk, dtype, device):
    """(Tq, Tk), to be added to scores: -inf where a key comes after the query, else 0."""
    cached = Tq * Tk <= BLOCK_ELEMENTS and not faking()  # a large one would be held for good
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        cached = False  # the graph would read it when the cache has long let it go
    make = _above_diagonal if cached else _above_diagonal.__wrapped__
    return make(Tq, Tk, dtype, device)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _above_diagonal(Tq, Tk, dtype, device):
    mask = torch.full((Tq, Tk), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(1 + Tk - Tq)


def keep_block(key, site, dropout_p, H, chunk, rows, visible):
    """(planes, R, visible) bool of one block."""
    batch, heads = chunk
    b = torch.arange(batch.start, batch.stop, device=key.device)
    h = torch.arange(heads.start, heads.stop, device=key.device)
    if key.numel() == 3:
        b = b + key[2]
    planes = (b[:, None] * H + h).flatten()
    positions = range(visible - (rows.stop - rows.start), visible)
    return dropout_keep_mask(key, site, planes, positions, visible, dropout_p)


def _without_autocast(function):
    """`function` with autocast off: it has chosen its dtypes itself."""

    @functools.wraps(function)
    def call(*args):
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args)  # at once: this is for models of which dispatch takes the time
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args)

    return call


def product_dtype(dtype, is_cpu):
    """What products of inputs in `dtype` are computed in: bfloat16 only where a CPU has it."""
    half = dtype == torch.bfloat16 and is_cpu and multiplies_bfloat16()
    return dtype if half else torch.promote_types(dtype, torch.float32)


class SmallAttention(torch.autograd.Function):
    """Packed attention whose probabilities all fit the cache, in the fewest ops.

    One copy gathers the heads and one scatters their gradients; rotation happens in between, where
    it costs no copy of its own, and so does float32 for it, or for lower precision that the CPU
    does not multiply. Up to here dispatch, not arithmetic, is what takes the time.
    """

    @staticmethod
    @_without_autocast
    def forward(ctx, qkv, table, normalize, scale, keep, factor):
        """qkv (B, T, 3, H, D); keep (B * H, T, T) uint8, or None; factor, dropout's: o like v."""
        B, T, _, H, D = qkv.shape
        dtype = product_dtype(qkv.dtype, qkv.is_cpu)
        if table is not None:
            dtype = torch.promote_types(dtype, torch.float32)
        # A copy, never qkv itself, which a single token's heads would be: they turn in place.
        heads = qkv.new_empty(3, B, H, T, D, dtype=dtype).copy_(qkv.permute(2, 0, 3, 1, 4))
        rstd = None
        if table is not None:
            rstd = rotary.turn_(heads[:2], table, normalize)
        q, k, v = heads.view(3, B * H, T, D)
        p = q.new_empty(B * H, T, T).copy_(above_diagonal(T, T, q.dtype, q.device))
        p = p.baddbmm_(q, k.mT, alpha=scale).softmax(-1)
        keep = keep if keep is None else keep.to(dtype)  # once, not in each of three products
        dropped = p if keep is None else p * keep
        o = qkv.new_empty(B, T, H, D)
        o.transpose(1, 2).copy_(_scaled_product(dropped, v, factor).view(B, H, T, D))
        ctx.save_for_backward(heads, p, keep, table, rstd)
        ctx.scale, ctx.factor, ctx.dtype = scale, factor, qkv.dtype
        return o

    @staticmethod
    @once_differentiable("causal_attention_qkv")
    @_without_autocast
    def backward(ctx, do):
        heads, p, keep, table, rstd = ctx.saved_tensors
        _, B, H, T, D = heads.shape
        q, k, v = heads.view(3, B * H, T, D)
        do = do.transpose(1, 2).to(heads.dtype).reshape(B * H, T, D)
        gradients = torch.empty_like(heads)
        dq, dk, dv = gradients.view(3, B * H, T, D)
        dp = _scaled_product(do, v.mT, ctx.factor)
        dropped = p
        if keep is not None:
            dropped, dp = p * keep, dp.mul_(keep)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        torch.baddbmm(dv, dropped.mT, do, beta=0, alpha=ctx.factor, out=dv)
        torch.baddbmm(dq, ds, k, beta=0, alpha=ctx.scale, out=dq)
        torch.baddbmm(dk, ds.mT, q, beta=0, alpha=ctx.scale, out=dk)
        if table is not None:
            rotary.turn_back_(gradients[:2], heads[:2], table, rstd)
        dqkv = gradients.new_empty(B, T, 3, H, D, dtype=ctx.dtype)
        dqkv.copy_(gradients.permute(1, 3, 0, 2, 4))
        return dqkv, None, None, None, None, None


def _scaled_product(a, b, factor):
    """factor * a @ b, rounded once."""
    if factor == 1:
        return torch.bmm(a, b)
    out = a.new_empty(*a.shape[:2], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)


# Queries that see at most so many keys get their gradients from the equation. SDPA's had up to 3.6
# times plain PyTorch's error (D 24 to 128), and 2.2 times with a single key, where dq is 0. With 16
# or 32 the worst is 1.8.
EARLY_KEYS = 16


class FlashAttention(torch.autograd.Function):
    """SDPA's flash kernel of the CPU, whose gradients of early queries are made anew.

    Its backward subtracts rowsum(do * o) where the equation has rowsum(P * dp). The two round
    alike, and over a few keys little but that rounding is left.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        """q (B, H, Tq, D), scaled; k, v (B, H, Tk, D); float32 or float64: o like q."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        Tq, Tk = q.shape[2], k.shape[2]
        mask = None if Tq == Tk else above_diagonal(Tq, Tk, q.dtype, q.device)
        ctx.options = 0.0, Tq == Tk  # dropout, causal from the top left
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, *ctx.options, attn_mask=mask, scale=1.0
        )
        ctx.save_for_backward(q, k, v, o, lse, mask)
        return o

    @staticmethod
    @once_differentiable("causal_attention")
    def backward(ctx, do):
        *tensors, mask = ctx.saved_tensors
        q, k, v = tensors[:3]
        keys = max(EARLY_KEYS, k.shape[2] - q.shape[2])
        early = keys - (k.shape[2] - q.shape[2])
        later = do.clone(memory_format=torch.contiguous_format)
        later[:, :, :early] = 0
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            later, *tensors, *ctx.options, attn_mask=mask, scale=1.0
        )
        if early:
            q, do = q[:, :, :early], do[:, :, :early]
            k, v = k[:, :, :keys], v[:, :, :keys]
            with torch.autocast("cpu", enabled=False):
                p = (q @ k.mT).add_(above_diagonal(early, keys, q.dtype, q.device)).softmax(-1)
                ds = torch._softmax_backward_data(do @ v.mT, p, -1, p.dtype)
                dq[:, :, :early] = ds @ k
                dk[:, :, :keys] += ds.mT @ q
                dv[:, :, :keys] += p.mT @ do
        return dq, dk, dv


def _pack(keep):
    """(planes, R, N) booleans as (planes, bytes), eight a byte; torch has no such op."""
    keep = keep.flatten(1)
    return torch.from_numpy(np.packbits(keep.numpy(), axis=1)) if keep.is_cpu else keep


def _unpack(packed, R, N):
    """The (planes, R, N) booleans that `_pack` was given."""
    if packed.is_cpu:
        packed = torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=R * N))
    return packed.view(torch.bool).unflatten(1, (R, N))


def _packed_sizes(q, k, dropout_p):
    """What `_pack` makes of one plane, for every block of queries."""
    group = 8 if q.is_cpu else 1
    blocks = _query_blocks(q.shape[2], k.shape[2]) if dropout_p else ()
    return [-(-(rows.stop - rows.start) * visible // group) for rows, visible in blocks]


def saved_like(q, k, dropout_p):
    """An empty tensor like what `forward` returns, (B, H, elements)."""
    dtype = torch.uint8 if q.is_cpu else torch.bool
    return q.new_empty(*q.shape[:2], sum(_packed_sizes(q, k, dropout_p)), dtype=dtype)


def _blocks(q, k, saved, chunk, dropout_p):
    """(queries, number of keys visible, packed mask) of every block of a chunk."""
    sizes = _packed_sizes(q, k, dropout_p)
    blocks = list(_query_blocks(q.shape[2], k.shape[2]))
    packed = saved[chunk].split(sizes, 2) if sizes else [None] * len(blocks)
    return [(*block, bits) for block, bits in zip(blocks, packed, strict=True)]


def _run(q, k, work):
    """work(scratch, chunk) for every chunk; on the CPU each thread takes whole ones."""
    chunks = _chunks(q, k)
    if q.is_cpu:
        for_each(chunks, work, lambda: _Scratch(q))
    else:
        scratch = _Scratch(q)
        for chunk in chunks:
            work(scratch, chunk)


def forward(q, k, v, o, key, scale, dropout_p, site):
    """Write o (B, H, Tq, D) and return the packed mask."""
    H, factor = q.shape[1], dropout_scale(dropout_p)
    saved = saved_like(q, k, dropout_p)

    @_without_autocast
    def work(scratch, chunk):
        tensors = {"q": q, "k": k, "v": v}
        q_planes, k_planes, v_planes = (scratch.planes(n, x[chunk]) for n, x in tensors.items())
        for rows, visible, packed in _blocks(q, k, saved, chunk, dropout_p):
            p = scratch.probabilities(q_planes[:, rows], k_planes[:, :visible], scale)
            if dropout_p:
                keep = keep_block(key, site, dropout_p, H, chunk, rows, visible)
                packed.copy_(_pack(keep).view(packed.shape))
                p.mul_(scratch.numbers(keep))
            o_rows = o[chunk][:, :, rows]
            o_rows.copy_(scratch.product("o", p, v_planes[:, :visible], factor).view(o_rows.shape))

    _run(q, k, work)
    return saved


def backward(do, q, k, v, o, saved, dq, dk, dv, key, scale, dropout_p, site):
    """Write dq, dk, dv, tensors like q, k, v."""
    factor = dropout_scale(dropout_p)

    @_without_autocast
    def work(scratch, chunk):
        tensors = {"q": q, "k": k, "v": v, "do": do}
        q_planes, k_planes, v_planes, do_planes = (
            scratch.planes(name, x[chunk]) for name, x in tensors.items()
        )
        dk_planes = scratch("dk", *k_planes.shape, dtype=scratch.wide).zero_()
        dv_planes = scratch("dv", *v_planes.shape, dtype=scratch.wide).zero_()
        for rows, visible, packed in _blocks(q, k, saved, chunk, dropout_p):
            q_rows, do_rows, seen = q_planes[:, rows], do_planes[:, rows], slice(visible)
            p = scratch.probabilities(q_rows, k_planes[:, seen], scale)
            dp = scratch.product("scores", do_rows, v_planes[:, seen].mT, factor)
            if dropout_p:
                keep = scratch.numbers(_unpack(packed.flatten(0, 1), *p.shape[1:]))
                dp.mul_(keep)
            ds = scratch("ds", *p.shape)
            torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=ds)
            if dropout_p:
                p.mul_(keep)
            scratch.add_product(dv_planes[:, seen], p.mT, do_rows, factor)
            scratch.add_product(dk_planes[:, seen], ds.mT, q_rows, scale)
            dq_rows = dq[chunk][:, :, rows]
            dq_rows.copy_(scratch.product("dq", ds, k_planes[:, seen], scale).view(dq_rows.shape))
        dk[chunk] = dk_planes.view(dk[chunk].shape)
        dv[chunk] = dv_planes.view(dv[chunk].shape)

    _run(q, k, work)
