"""LayerNorm, alone and after dropout and the residual add.

    r = residual + dropout(x + x_bias)          (r = x for layer_norm)
    y = (r - mean) * rstd * weight + bias       mean, rstd = (var + eps)**-0.5 over the channels

    dr = rstd * (g - mean_C(g) - xhat * mean_C(g * xhat)) + d(new residual)
    dx = dropout'(dr), dweight = sum_M dy * xhat, dbias = sum_M dy, dx_bias = sum_M dx
    with xhat = (r - mean) * rstd, g = dy * weight

M rows, C channels. Statistics and sums are float32 whatever the tensors are. The backward draws
the mask again instead of storing it. Ba, Kiros, Hinton 2016, "Layer Normalization",
arXiv:1607.06450.
"""

import torch
import torch.nn.functional as F

from kernels import backend, layer_norm_kernels, rng
from kernels.backend import autocast_dtype
from kernels.rng import as_bytes, dropout_keep_mask, dropout_scale

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# ---------------------------------------------------------------------------------------- eager


def keep_rows(key, site: int, shape, dropout_p: float) -> torch.Tensor:
    """The mask, bool of `shape` (..., C), of activations that start at sequence key[2].

    Plane 0, row = flattened leading index, column = channel.
    """
    if torch.compiler.is_compiling():
        return _keep_rows_op(key, site, shape, dropout_p)
    rows = torch.arange(shape[:-1].numel(), device=key.device)
    if key.numel() == 3:
        rows = rows + key[2] * shape[1:-1].numel()
    return dropout_keep_mask(key, site, 1, rows, shape[-1], dropout_p).view(shape)


@torch.library.custom_op("kernels::keep_rows", mutates_args=())
def _keep_rows_op(key: torch.Tensor, site: int, shape: list[int], dropout_p: float) -> torch.Tensor:
    return keep_rows(key, site, torch.Size(shape), dropout_p).contiguous()


@_keep_rows_op.register_fake
def _(key, site, shape, dropout_p):
    return key.new_empty(shape, dtype=torch.bool)


class _DropoutAdd(torch.autograd.Function):
    """residual + x * keep * scale, in row blocks that stay in the cache; stores one byte each."""

    BLOCK_ELEMENTS = 2**18

    @staticmethod
    def forward(ctx, x, residual, keep, scale):
        ctx.save_for_backward(keep)
        ctx.scale, ctx.dtype = scale, x.dtype
        if x.numel() <= _DropoutAdd.BLOCK_ELEMENTS:
            return torch.addcmul(residual, x, keep.to(x.dtype), value=scale)
        new_residual = torch.empty_like(residual, memory_format=torch.contiguous_format)
        for out, x_block, residual_block, kept in _row_blocks(new_residual, x, residual, keep):
            torch.addcmul(residual_block, x_block, kept.to(x.dtype), value=scale, out=out)
        return new_residual

    @staticmethod
    def backward(ctx, gradient):
        (keep,), scale = ctx.saved_tensors, ctx.scale
        if keep.numel() <= _DropoutAdd.BLOCK_ELEMENTS or torch.is_grad_enabled():
            dx = (gradient * keep).mul_(scale)
        else:
            dx = torch.empty(keep.shape, dtype=gradient.dtype, device=gradient.device)
            for out, block, kept in _row_blocks(dx, gradient, keep):
                torch.mul(block, kept, out=out).mul_(scale)
        return dx.to(ctx.dtype), gradient, None, None


def _row_blocks(*tensors):
    C = tensors[0].shape[-1]
    rows = max(1, _DropoutAdd.BLOCK_ELEMENTS // C)
    return zip(*(tensor.reshape(-1, C).split(rows) for tensor in tensors), strict=True)


def _eager_layer_norm(x, weight, bias, eps, y_dtype):
    # A CPU keeps mean and rstd in the dtype of the parameters, whose only mix is of low-precision x
    # and float32. Of a single channel, whose gradients are 0, that leaves a rounding.
    mixed = x.is_cpu and x.dtype.itemsize == 2 and x.shape[-1] > 1
    dtype = torch.float32 if mixed else x.dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return y if y_dtype == y.dtype else y.to(y_dtype)


def _eager_dropout_add(x, residual, dropout_p, key, site):
    if not dropout_p:
        return residual + x
    keep, scale = keep_rows(key, site, x.shape, dropout_p), dropout_scale(dropout_p)
    if backend.traced():  # the compiler fuses the plain form
        return torch.add(residual, torch.where(keep, x, 0.0), alpha=scale)
    return _DropoutAdd.apply(x, residual, as_bytes(keep), scale)


# ------------------------------------------------------------------------------------- autograd

_forward_op = backend.operator("layer_norm_forward", layer_norm_kernels.forward)
_backward_op = backend.operator("layer_norm_backward", layer_norm_kernels.backward)


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, x_bias, key, _, ctx.dropout_p, ctx.site, _ = inputs
    _, new_residual, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
    ctx.x_bias_dtype = None if x_bias is None else x_bias.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(new_residual if ctx.has_residual else x, weight, mean, rstd, key)


def _autograd_backward(ctx, dy, dnew, _dmean, _drstd):
    r, weight, mean, rstd, key = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros((), dtype=r.dtype, device=r.device).expand(r.shape)
    dr, dx, dweight, dbias, dx_bias = _backward_op(
        dy,
        dnew if ctx.has_residual else None,
        r,
        weight,
        mean,
        rstd,
        key,
        ctx.dropout_p,
        ctx.site,
        ctx.x_dtype,
        ctx.bias_dtype,
        ctx.x_bias_dtype,
    )
    distinct = ctx.dropout_p > 0 or ctx.x_dtype != r.dtype
    return (
        dx if distinct else dr,
        dr if ctx.has_residual else None,
        dweight,
        dbias if ctx.bias_dtype is not None else None,
        dx_bias if ctx.x_bias_dtype is not None else None,
        *(None,) * 5,
    )


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)

# --------------------------------------------------------------------------------------- public


def layer_norm(x, weight, bias=None, *, eps=1e-5, backend="auto"):
    """LayerNorm over the last dimension.

    y = (x - mean) / sqrt(var + eps) * weight + bias, statistics in float32

    Args:
        x: (..., C); float32, float16, bfloat16, or float64 (eager only); any strides.
        weight, bias: (C,), floating point, in x's dtype or another.
        eps: added to the variance.
        backend: "auto", "triton" or "eager".
    Returns: y, shape of x, in x's dtype, or under autocast in autocast's.
    Raises: ValueError on shapes or ranges; TypeError on dtypes; RuntimeError if the backend
        cannot run.
    Source: arXiv:1607.06450.
    """
    where = _check("layer_norm", x, None, weight, bias, None, eps, 0.0, 0, backend)
    y_dtype = autocast_dtype(x)
    if where == "eager":
        return _eager_layer_norm(x, weight, bias, eps, y_dtype)
    return _forward_op(x, None, weight, bias, None, None, eps, 0.0, 0, y_dtype)[0]


def dropout_add_layer_norm(
    x, residual, weight, bias=None, *, x_bias=None, eps=1e-5, dropout_p=0.0, key=None, site=0,
    backend="auto",
):  # fmt: skip
    """The residual add, dropout before it and LayerNorm after it, in one pass.

    new_residual = residual + dropout(x + x_bias);  y = LayerNorm(new_residual)

    Args:
        x: (..., C); float32, float16, bfloat16, or float64 (eager only); any strides.
        residual: shape of x; x's dtype or float32.
        weight, bias, eps: as in `layer_norm`.
        x_bias: (C,), of the linear layer that made x without it: its gradient then costs no
            further pass over dx.
        dropout_p: in [0, 1).
        key: (2,) int64 [seed, step] or (3,) [seed, step, first]; drawn if None. Dimension 0 of x
            is the sequence; the mask's row is first * (rows a sequence) + row, its plane 0.
        site: which dropout of the model, `kernels.rng.layer_site`.
        backend: "auto", "triton" or "eager".
    Returns: y, in x's dtype, or under autocast in autocast's; new_residual, in residual's.
    Raises: ValueError on shapes or ranges; TypeError on dtypes; RuntimeError if the backend
        cannot run.
    Source: arXiv:1607.06450; mask of `kernels.rng`.
    """
    op = "dropout_add_layer_norm"
    where = _check(op, x, residual, weight, bias, x_bias, eps, dropout_p, site, backend)
    if dropout_p:
        key = rng.check_key(op, key, x.device)
    y_dtype = autocast_dtype(x)
    if where == "eager":
        x = x if x_bias is None else x + x_bias.to(x.dtype)
        new_residual = _eager_dropout_add(x, residual, dropout_p, key, site)
        return _eager_layer_norm(new_residual, weight, bias, eps, y_dtype), new_residual
    return _forward_op(x, residual, weight, bias, x_bias, key, eps, dropout_p, site, y_dtype)[:2]


def _check(op, x, residual, weight, bias, x_bias, eps, dropout_p, site, choice) -> str:
    """The backend, once the arguments obey the rules."""
    vectors = {"weight": weight, "bias": bias, "x_bias": x_bias}
    for name, tensor in {"x": x, "residual": residual, **vectors}.items():
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{op}: {name} must be float32, float16, bfloat16 or float64; got {tensor.dtype}"
            )
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must be (..., C) with C at least 1; got {tuple(x.shape)}")
    C = x.shape[-1]
    for name, tensor in vectors.items():
        if tensor is not None and tensor.shape != (C,):
            raise ValueError(
                f"{op}: {name} must be (C,) with C {C}, the last dimension of x; "
                f"got {tuple(tensor.shape)}"
            )
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"{op}: x and residual must have one shape; "
                f"got x {tuple(x.shape)}, residual {tuple(residual.shape)}"
            )
        if residual.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"{op}: residual must be float32 or of x's dtype; "
                f"got x {x.dtype}, residual {residual.dtype}"
            )
    rng.check_number(op, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{op}: eps must not be negative; got {eps}")
    rng.check_dropout(op, dropout_p, site)
    where = backend.resolve(op, choice, x, residual, weight, bias, x_bias)
    if where == "triton" and x.dtype == torch.float64:
        raise TypeError(f"{op}: float64 needs backend='eager'; got x {x.dtype}, backend 'triton'")
    return where
