"""Causal softmax attention with dropout.

    o[i] = c * sum_j R[i,j] P[i,j] v[j],   P[i,:] = softmax_j(scale * q[i].k[j]),   j <= i + Tk - Tq

    q, k, v, o   queries, keys, values, output: (B, H, T, D); Tq queries follow Tk - Tq older keys
    R            dropout_keep_mask(key, site): plane b * H + h, row i + Tk - Tq, column j
    c            1 / (1 - p) of dropout, exactly dropout_scale(p)

FlashAttention-2, arXiv:2307.08691. The Triton kernels are in `attention_kernels`, the CPU path in
`attention_eager`; this file binds both to autograd and holds the public functions.
"""

import math

import torch
import torch.nn.functional as F

from kernels import attention_eager, attention_kernels
from kernels.backend import autocast_dtype, once_differentiable, resolve, traced, transforming
from kernels.rng import (
    as_bytes,
    check_dropout,
    check_key,
    check_number,
    dropout_scale,
    dropout_threshold,
)
from kernels.rotary import check_table, rotary_qkv

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# Up to one block the plain form needs no blocks, and its few ops are faster, for 8 bytes a
# probability until the backward.
_SMALL = attention_eager.BLOCK_ELEMENTS  # probabilities
# Where a CPU multiplies bfloat16, so many times more, of 4 bytes each: up to so many keys one large
# product beats those of blocks although it computes the masked half (two cores with AVX512-BF16).
_HALF_FACTOR, _HALF_KEYS = 8, 512


def _is_small(q, k):
    """Whether an eager call needs no blocks."""
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    return not traced() and B * H * Tq * Tk <= _SMALL


def _is_small_half(q, k):
    """The same where products will be in bfloat16."""
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    if traced() or Tk > _HALF_KEYS or B * H * Tq * Tk > _HALF_FACTOR * _SMALL:
        return False
    return attention_eager.product_dtype(q.dtype, q.is_cpu) == torch.bfloat16


def _whole_keep(key, site, dropout_p, q, k):
    """(B * H, Tq, Tk) uint8 of a small call, 0 or 1."""
    whole = slice(0, q.shape[0]), slice(0, q.shape[1])
    rows = slice(0, q.shape[2])
    options = q.shape[1], whole, rows, k.shape[2]
    return as_bytes(attention_eager.keep_block(key, site, dropout_p, *options))


def _small(q, k, v, key, scale, dropout_p, site):
    """The equation, written plainly."""
    Tq, Tk = q.shape[2], k.shape[2]
    p = (q * scale) @ k.mT
    if Tq > 1:
        p = p + attention_eager.above_diagonal(Tq, Tk, p.dtype, p.device)
    p = p.softmax(-1)
    if dropout_p:
        p = p * _whole_keep(key, site, dropout_p, q, k).view(p.shape)
        v = v * dropout_scale(dropout_p)
    return p @ v


def _small_qkv(qkv, angles, normalize, key, scale, dropout_p, site):
    """`_small` of a packed projection, rotated first if there are angles: (B, T, H, D)."""
    keep = _whole_keep(key, site, dropout_p, *_heads(qkv)[:2]) if dropout_p else None
    options = normalize, scale, keep, dropout_scale(dropout_p)
    return attention_eager.SmallAttention.apply(qkv, angles, *options)


def _trains(*tensors):
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _sdpa_serves(q, k, v, dropout_p):
    """Whether SDPA may compute it, which draws no dropout in blocks."""
    # Its backward adds in any order on a GPU, and in half precision on a CPU. Of few queries most
    # gradients would be made twice, and traced ones, which are not, break the 2x rule.
    exact = q.is_cpu and q.element_size() >= 4 and q.shape[2] > 2 * attention_eager.EARLY_KEYS
    return not dropout_p and (exact or not _trains(q, k, v))


def _sdpa(q, k, v, scale):
    """PyTorch's kernel: SDPA's own, or on a CPU, in training, `FlashAttention` around it."""
    Tq, Tk = q.shape[2], k.shape[2]
    if _trains(q, k, v):
        # SDPA's forward and backward round scale * q.k differently, unless scale is a power of two:
        # probabilities then miss the sum they are divided by, and gradients break the 2x rule.
        # Multiplied into q, the scale is rounded once.
        q, scale = q * scale, 1.0
        if not traced():
            return attention_eager.FlashAttention.apply(q, k, v)
    mask = None
    if 1 < Tq < Tk:  # SDPA's is_causal aligns top-left
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    causal = 1 < Tq == Tk
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


# The two forms of the op. What a forward saves, lse or the packed mask, only its backend reads.
_ENGINES = {"triton": attention_kernels, "eager": attention_eager}


def _heads(qkv):
    """(B, T, 3, H, D) -> q, k, v (B, H, T, D), views."""
    return qkv.permute(2, 0, 3, 1, 4)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key: torch.Tensor | None,
    scale: float, dropout_p: float, site: int, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """o and what the backward needs besides."""
    o = torch.empty_like(q)
    return o, _ENGINES[backend].forward(q, k, v, o, key, scale, dropout_p, site)


def _backward(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
    saved: torch.Tensor, key: torch.Tensor | None,
    scale: float, dropout_p: float, site: int, backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv."""
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _ENGINES[backend].backward(do, q, k, v, o, saved, *gradients, key, scale, dropout_p, site)
    return gradients


def _forward_qkv(
    qkv: torch.Tensor, key: torch.Tensor | None,
    scale: float, dropout_p: float, site: int, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """o (B, T, H, D) and what the backward needs besides."""
    B, T, _, H, D = qkv.shape
    o = qkv.new_empty(B, T, H, D)
    engine = _ENGINES[backend]
    return o, engine.forward(*_heads(qkv), o.transpose(1, 2), key, scale, dropout_p, site)


def _backward_qkv(
    do: torch.Tensor, qkv: torch.Tensor, o: torch.Tensor, saved: torch.Tensor,
    key: torch.Tensor | None, scale: float, dropout_p: float, site: int, backend: str,
) -> torch.Tensor:  # fmt: skip
    """dqkv (B, T, 3, H, D)."""
    dqkv = qkv.new_empty(qkv.shape)
    do, o = do.transpose(1, 2), o.transpose(1, 2)
    tensors = do, *_heads(qkv), o, saved, *_heads(dqkv)
    _ENGINES[backend].backward(*tensors, key, scale, dropout_p, site)
    return dqkv


def _setup_context(ctx, inputs, output):
    *tensors, key, scale, dropout_p, site, backend = inputs
    ctx.save_for_backward(*tensors, *output, key)
    ctx.options = scale, dropout_p, site, backend
    ctx.set_materialize_grads(False)


class _Attention(torch.autograd.Function):
    """The eager binding of `_forward` and `_backward`."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    @once_differentiable("causal_attention")
    def backward(ctx, do, _):
        if do is None:
            return (None,) * 8
        run = _backward_op if transforming() else _backward
        return *run(do, *ctx.saved_tensors, *ctx.options), *(None,) * 5


class _AttentionQKV(torch.autograd.Function):
    """The eager binding of `_forward_qkv` and `_backward_qkv`."""

    forward = staticmethod(_forward_qkv)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    @once_differentiable("causal_attention_qkv")
    def backward(ctx, do, _):
        if do is None:
            return (None,) * 6
        run = _backward_qkv_op if transforming() else _backward_qkv
        return run(do, *ctx.saved_tensors, *ctx.options), *(None,) * 5


# The same four functions as torch.library ops, for torch.compile, torch.export and torch.func;
# calling them costs more than calling the Functions above.
def _op(function):
    name = f"kernels::causal_attention{function.__name__}"
    return torch.library.custom_op(name, function, mutates_args=())


_forward_op, _backward_op = _op(_forward), _op(_backward)
_forward_qkv_op, _backward_qkv_op = _op(_forward_qkv), _op(_backward_qkv)


@_forward_op.register_fake
def _(q, k, v, key, scale, dropout_p, site, backend):
    return torch.empty_like(q), _ENGINES[backend].saved_like(q, k, dropout_p)


@_forward_qkv_op.register_fake
def _(qkv, key, scale, dropout_p, site, backend):
    q, k, _ = _heads(qkv)
    return qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:]), _ENGINES[backend].saved_like(
        q, k, dropout_p
    )


@_backward_op.register_fake
def _(do, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@_backward_qkv_op.register_fake
def _(do, qkv, *_):
    return qkv.new_empty(qkv.shape)


def _op_backward(ctx, do, _):
    return *_backward_op(do, *ctx.saved_tensors, *ctx.options), *(None,) * 5


def _op_backward_qkv(ctx, do, _):
    return _backward_qkv_op(do, *ctx.saved_tensors, *ctx.options), *(None,) * 5


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)
_forward_qkv_op.register_autograd(_op_backward_qkv, setup_context=_setup_context)


def _check(op, q, k, v, scale, dropout_p, site, backend):
    """Raise unless tensors and numbers fit each other; returns backend, scale, dropout_p."""
    D = q.shape[-1]
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head size must be in 1..{MAX_HEAD_DIM}; got {D}")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ValueError(
            f"{op}: queries must number at least 1 and at most as many as keys; "
            f"got {q.shape[2]} queries, {k.shape[2]} keys"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        raise TypeError(f"{op}: q, k, v must agree in dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    scale = D**-0.5 if scale is None else scale
    check_number(op, "scale", scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite; got {scale}")
    check_dropout(op, dropout_p, site)
    if dropout_threshold(dropout_p) == 0:
        dropout_p = 0.0
    backend = resolve(op, backend, q, k, v)
    allowed = DTYPES if backend == "triton" else (*DTYPES, torch.float64)
    if q.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{op}: dtype must be one of {names} with backend {backend}; got {q.dtype}")
    return backend, float(scale), float(dropout_p)


def causal_attention(q, k, v, *, scale=None, dropout_p=0.0, key=None, site=0, backend="auto"):
    """Causal softmax attention, all heads in one call.

    o[i] = sum_{j <= i + Tk - Tq} softmax_j(scale * q[i].k[j]) v[j], with dropout on the softmax.

    Args:
        q: (B, H, Tq, D); float32, float16 or bfloat16, on the eager backend also float64; any
            strides. Under autocast q, k, v are cast as for a matrix product.
        k, v: (B, H, Tk, D), 1 <= Tq <= Tk, 1 <= D <= 256. The mask is aligned bottom-right, so
            that new queries may follow cached keys.
        scale: multiplies q.k; default D**-0.5.
        dropout_p: probability, in [0, 1), of dropping a softmax weight; survivors are scaled up.
        key: (2,) or (3,) int64 of `kernels.rng`; None draws one from torch's generator.
        site: number of this dropout in the model (`kernels.rng.layer_site`).
        backend: "auto", "triton" or "eager".
    Returns: o (B, H, Tq, D), dtype of q.
    Raises: ValueError on shapes, ranges or devices; TypeError on dtypes; RuntimeError if the
        backend cannot run, and from backward with create_graph=True: there are no second
        derivatives. float32 products are IEEE or TF32 as torch.backends.cuda.matmul says.
    Source: FlashAttention-2, arXiv:2307.08691.
    """
    op = "causal_attention"
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    if any(len(shape) != 4 for shape in shapes):
        raise ValueError(f"{op}: q, k, v must be (B, H, T, D); got {', '.join(map(str, shapes))}")
    if shapes[1] != shapes[2]:
        raise ValueError(f"{op}: k and v must have one shape; got k {shapes[1]}, v {shapes[2]}")
    if shapes[0][:2] != shapes[1][:2] or shapes[0][3] != shapes[1][3]:
        raise ValueError(f"{op}: q and k must agree in B, H, D; got q {shapes[0]}, k {shapes[1]}")
    q, k, v = (x.to(autocast_dtype(x)) for x in (q, k, v))
    backend, scale, dropout_p = _check(op, q, k, v, scale, dropout_p, site, backend)
    key = check_key(op, key, q.device) if dropout_p else None
    if scale <= 0:  # the kernels' running maximum, and SDPA, take a positive one
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    if backend == "eager":
        if _is_small_half(q, k) or (_is_small(q, k) and q.dtype.itemsize >= 4):
            return _small(q, k, v, key, scale, dropout_p, site)
        if _sdpa_serves(q, k, v, dropout_p):
            return _sdpa(q, k, v, scale)
    run = _forward_op if torch.compiler.is_compiling() else _Attention.apply
    return run(q, k, v, key, scale, dropout_p, site, backend)[0]


def causal_attention_qkv(
    qkv,
    *,
    angles=None,
    normalize=False,
    scale=None,
    dropout_p=0.0,
    key=None,
    site=0,
    backend="auto",
):
    """`causal_attention` of a packed projection; nothing is copied, forward or backward.

    Args:
        qkv: (B, T, 3, H, D), any strides; the rest as in `causal_attention`.
        angles, normalize: with angles, `rotary_qkv(qkv, angles, normalize=normalize)` comes first.
    Returns: o (B, T, H, D), dtype of qkv. The gradient of qkv is one tensor.
    Raises: as `causal_attention`.
    """
    op = "causal_attention_qkv"
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv must be (B, T, 3, H, D); got {tuple(qkv.shape)}")
    qkv = qkv.to(autocast_dtype(qkv))
    q, k, v = _heads(qkv)
    backend, scale, dropout_p = _check(op, q, k, v, scale, dropout_p, site, backend)
    if angles is not None:
        check_table(op, "angles", qkv, angles, backend)
    elif normalize:
        raise ValueError(f"{op}: normalize=True needs angles; got angles=None")
    key = check_key(op, key, qkv.device) if dropout_p else None
    if backend == "eager" and _is_small(q, k):
        return _small_qkv(qkv, angles, normalize, key, scale, dropout_p, site)
    if angles is not None:
        qkv = rotary_qkv(qkv, angles, normalize=normalize, backend=backend)
        q, k, v = _heads(qkv)
    if backend == "eager" and _is_small_half(q, k):
        return _small_qkv(qkv, None, False, key, scale, dropout_p, site)
    if scale <= 0:
        options = {"scale": scale, "dropout_p": dropout_p, "key": key, "site": site}
        return causal_attention(q, k, v, backend=backend, **options).transpose(1, 2)
    if backend == "eager" and _sdpa_serves(q, k, v, dropout_p):
        return _sdpa(q, k, v, scale).transpose(1, 2)
    run = _forward_qkv_op if torch.compiler.is_compiling() else _AttentionQKV.apply
    return run(qkv, key, scale, dropout_p, site, backend)[0]
