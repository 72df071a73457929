"""Cross-entropy of logits, alone and fused with the linear layer that makes them.

    loss[i] = lse[i] - z[i, t[i]],   lse[i] = log sum_v exp(z[i, v])
    dz[i, v] = exp(z[i, v] - lse[i]) - (v == t[i])

z logits (M, V), t targets (M,); rows with t = ignore_index count for nothing. "sum" adds the rows,
"mean" divides the sum by N, the number of rows that count; N never leaves the device.

The gradient of the sum follows from z alone, so the forward pass writes it while z is at hand, and
the backward pass only multiplies it by the incoming gradient over N. For z = x W^T + b the forward
pass goes further and reduces dz to dx, dW and db: z is then needed for a chunk of rows at a time
(Wijmans et al., arXiv:2411.09009, and Hsu et al., arXiv:2410.10989, make the same observation).

1/N is applied to the results, not to dz: float16 would lose most of dz / N below its smallest
number, before any loss scale could save it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kernels.backend import autocast_dtype, has_storage, once_differentiable, operator, resolve
from kernels.cross_entropy_kernels import launch_cross_entropy, launch_reduce, launch_scale

REDUCTIONS = ("mean", "sum", "none")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# A chunk of logits: rows enough (768 at V = 50257 in 16 bits) to feed the three products, and few
# enough chunks that adding up dweight, 8 bytes a weight and chunk, stays small beside them; yet
# near the L2 of an H200 (50 MB), where softmax finds what the product wrote last.
CHUNK_BYTES = 80_000_000
_CHUNK_ROWS = 128  # chunks hold a multiple of it, the tallest tile of a matrix product
_ROW_ALIGNMENT = 64  # elements; cuBLAS and wide loads want aligned rows, whatever V is


# --- Eager ----------------------------------------------------------------------------------------


def _eager_cross_entropy(op, logits, targets, ignore_index, reduction):
    """torch's own pair of fused ops; 16-bit logits in float32."""
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    if torch.compiler.is_compiling():
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
    try:
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
    except IndexError:
        _check_range(op, targets, logits.shape[-1], ignore_index)
        raise


def _check_range(op, targets, V, ignore_index):
    """Raises: ValueError if a target is no class; on a CPU only, because it looks at the values."""
    if torch.compiler.is_compiling() or not (targets.is_cpu and has_storage(targets)):
        return
    wrong = targets[((targets < 0) | (targets >= V)) & (targets != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"{op}: targets must be in [0, {V}) or ignore_index {ignore_index}; "
            f"got {wrong[0].item()}"
        )


# --- Binding of cross_entropy ---------------------------------------------------------------------


def _cross_entropy_forward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    reduction: str,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, factor, gradient of the sum) of logits (M, V); the mean's factor is 1 / N."""
    M, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    losses = logits.new_empty(M, dtype=torch.float32)
    dlogits = logits.new_empty((M, V) if needs_gradient else (0, V))
    launch_cross_entropy(
        logits, targets, None, losses, dlogits if needs_gradient else None, ignore_index
    )
    if reduction == "none":
        return losses, losses.new_ones(()), dlogits
    return *launch_reduce(losses, targets, ignore_index, reduction), dlogits


def _scale(
    x: torch.Tensor, gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """x * gradient * factor in `dtype`; gradient () or one element for each row of x."""
    y = torch.empty_like(x, dtype=dtype)
    launch_scale(x, gradient, factor, y)
    return y


_cross_entropy_op = operator("cross_entropy", _cross_entropy_forward)
_scale_op = operator("scale", _scale)


def _save_cross_entropy(ctx, inputs, output):
    loss, factor, dlogits = output
    ctx.mark_non_differentiable(factor, dlogits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(factor, dlogits)


@once_differentiable("cross_entropy")
def _cross_entropy_backward(ctx, gradient, *_):
    if gradient is None:
        return (None,) * 5
    factor, dlogits = ctx.saved_tensors
    dlogits = _scale_op(dlogits, gradient, factor, dlogits.dtype)
    return (dlogits, *[None] * 4)


_cross_entropy_op.register_autograd(_cross_entropy_backward, setup_context=_save_cross_entropy)


# --- The fused linear layer: rows in chunks -------------------------------------------------------


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _rows_per_chunk(M: int, V: int, itemsize: int) -> int:
    """All rows if their logits are small, else a multiple of _CHUNK_ROWS near CHUNK_BYTES."""
    rows = CHUNK_BYTES // (V * itemsize)
    return M if rows >= M else max(_CHUNK_ROWS, rows - rows % _CHUNK_ROWS)


def _eager_chunk(logits, targets, scales, losses, needs_gradient, ignore_index):
    """What `launch_cross_entropy` does, in torch ops; returns the gradients."""
    counts = targets != ignore_index
    column = torch.where(counts, targets, 0)[:, None]
    accumulation = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.log_softmax(logits, -1, dtype=accumulation)
    torch.mul(log_p.gather(1, column)[:, 0], counts, out=losses).neg_()
    if not needs_gradient:
        return None
    scale = counts.to(accumulation) if scales is None else scales * counts
    dlogits = log_p.exp_()
    dlogits.scatter_add_(1, column, dlogits.new_full((1, 1), -1.0).expand_as(column))
    return dlogits.mul_(scale[:, None])


def _accumulate_product(total, a, b, first):
    """total (+)= a @ b in the dtype of `total`, however short that of a and b."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0.0 if first else 1.0, out=total)
    elif not has_storage(total):
        return  # torch 2.11 cannot run the product below on fake tensors
    elif total.device.type == "cpu":  # has no product of 16-bit matrices with a float32 result
        torch.addmm(total, a.float(), b.float(), beta=0.0 if first else 1.0, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0.0 if first else 1.0, out=total)


def _linear_cross_entropy_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scales: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
    needs_gradients: Sequence[bool],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, factor, dx, dweight, dbias): gradients of the sum of the rows times `scales`.

    x (M, C), weight (V, C); products in `dtype`; dweight, dbias and eager's dx are accumulators.
    """
    (M, C), V = x.shape, weight.shape[0]
    if reduction == "none":  # the gradient of each row has a scale that the backward will know
        needs_gradients = (False,) * 3
    needs_dx, needs_dweight, needs_dbias = needs_gradients
    needs_dlogits = any(needs_gradients)
    triton = backend == "triton"
    accumulation = torch.promote_types(dtype, torch.float32)
    losses = x.new_empty(M, dtype=accumulation)
    dx = x.new_empty((M if needs_dx else 0, C), dtype=x.dtype if triton else accumulation)
    dweight = losses.new_empty(V if needs_dweight else 0, C)
    dbias = losses.new_empty(V if needs_dbias else 0)

    R = _rows_per_chunk(M, V, dtype.itemsize)
    buffer = x.new_empty((R, _round_up(V, _ROW_ALIGNMENT)), dtype=dtype)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        for start in range(0, max(1, M), max(1, R)):
            chunk = slice(start, min(start + R, M))
            x_c, targets_c, losses_c = x[chunk].to(dtype), targets[chunk], losses[chunk]
            scales_c = None if scales is None else scales[chunk]
            logits = buffer[: x_c.shape[0], :V]
            if bias is None:
                torch.mm(x_c, weight.mT, out=logits)
            else:
                torch.addmm(bias, x_c, weight.mT, out=logits)
            if triton:
                dlogits = logits if needs_dlogits else None
                launch_cross_entropy(logits, targets_c, scales_c, losses_c, dlogits, ignore_index)
            else:
                dlogits = _eager_chunk(
                    logits, targets_c, scales_c, losses_c, needs_dlogits, ignore_index
                )
            if needs_dbias and start == 0:
                torch.sum(dlogits, 0, dtype=accumulation, out=dbias)
            elif needs_dbias:
                dbias += dlogits.sum(0, dtype=accumulation)
            if needs_dx or needs_dweight:
                dlogits = dlogits.to(dtype)
            if needs_dx and dx.dtype == dtype:
                torch.mm(dlogits, weight, out=dx[chunk])
            elif needs_dx:
                dx[chunk] = dlogits @ weight
            if needs_dweight:
                _accumulate_product(dweight, dlogits.mT, x_c, first=start == 0)
    loss, factor = _reduce(losses, targets, ignore_index, reduction, triton)
    return loss, factor, dx, dweight, dbias


def _reduce(losses, targets, ignore_index, reduction, triton):
    """(loss, factor) of `launch_reduce`, for every reduction and backend."""
    if reduction == "none":
        return losses, losses.new_ones(())
    if triton:
        return launch_reduce(losses, targets, ignore_index, reduction)
    loss, factor = losses.sum(), losses.new_ones(())
    if reduction == "mean":
        N = (targets != ignore_index).sum()
        loss, factor = loss / N, factor / N.clamp(min=1)
    return loss, factor


_linear_cross_entropy_op = operator("linear_cross_entropy", _linear_cross_entropy_forward)


def _save_linear_cross_entropy(ctx, inputs, output):
    x, weight, bias, targets, _, *ctx.settings = inputs
    _, factor, *gradients = output
    ctx.mark_non_differentiable(factor, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, targets, factor)
    # Not saved but owned, so that the backward frees each as soon as it is scaled.
    ctx.gradients = gradients


@once_differentiable("linear_cross_entropy")
def _linear_cross_entropy_backward(ctx, gradient, *_):
    if gradient is None:
        return (None,) * 10
    x, weight, bias, targets, factor = ctx.saved_tensors
    ignore_index, reduction, dtype, needs_gradients, backend = ctx.settings
    gradients, ctx.gradients = ctx.gradients, None
    scales = None
    if reduction == "none":
        scales, gradient, gradients = gradient.contiguous(), torch.ones_like(factor), None
    if gradients is None:  # every row has its own scale; or this is a second backward
        _, _, *gradients = _linear_cross_entropy_op(
            x, weight, bias, targets, scales, ignore_index, "sum", dtype, needs_gradients, backend
        )
    results = [None] * 10
    for i, tensor in reversed(list(enumerate((x, weight, bias)))):
        total = gradients.pop()
        if needs_gradients[i]:
            results[i] = _scaled(total, gradient, factor, tensor.dtype, backend)
    return tuple(results)


def _scaled(x, gradient, factor, dtype, backend):
    """x * gradient * factor in `dtype`."""
    if backend == "triton":
        return _scale_op(x, gradient, factor, dtype)
    return (x * (gradient * factor)).to(dtype)


_linear_cross_entropy_op.register_autograd(
    _linear_cross_entropy_backward, setup_context=_save_linear_cross_entropy
)


# --- Public functions -----------------------------------------------------------------------------


def _check_dtype(op, name, tensor):
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor; got {tensor.dtype}")


def _check_triton_dtype(op, name, dtype):
    if dtype not in _DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, float16 or bfloat16 on the triton backend; got {dtype}"
        )


def _check_targets(op, targets, name, tensor, reduction):
    if targets.dtype != torch.int64:
        raise TypeError(f"{op}: targets must be int64; got {targets.dtype}")
    if targets.shape != tensor.shape[:-1]:
        raise ValueError(
            f"{op}: targets must have the leading shape of {name}; "
            f"got targets {tuple(targets.shape)}, {name} {tuple(tensor.shape)}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}"
        )


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """Cross-entropy of logits; loss and gradient in one pass.

    loss[i] = log sum_v exp(logits[i, v]) - logits[i, targets[i]]

    Args:
        logits: (..., V); float32, float16 or bfloat16 (eager: float64 too); any strides.
        targets: (...) int64, each in [0, V) or ignore_index.
        ignore_index: rows with this target have loss and gradient 0 and do not count in the mean.
        reduction: "mean" over the rows that count (NaN if none does), "sum", or "none".
    Returns: loss, () or, for "none", (...); float32 (float64 for float64), whatever the inputs are.
    Raises: ValueError on shapes, ranges or devices; TypeError on dtypes; RuntimeError if the
        backend cannot run, and from the kernels' backward with create_graph=True. Targets out of
        range: ValueError from eager, NaN in loss and gradient from Triton, where looking at them
        would make the host wait for the device.
    """
    op = "cross_entropy"
    _check_dtype(op, "logits", logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{op}: logits must be (..., V), V >= 1; got {tuple(logits.shape)}")
    _check_targets(op, targets, "logits", logits, reduction)
    backend = resolve(op, backend, logits, targets)
    V = logits.shape[-1]
    logits_2d, targets_1d = logits.reshape(-1, V), targets.reshape(-1)
    if backend == "eager":
        loss = _eager_cross_entropy(op, logits_2d, targets_1d, ignore_index, reduction)
    else:
        _check_triton_dtype(op, "logits", logits.dtype)
        needs_gradient = logits.requires_grad and torch.is_grad_enabled()
        loss, _, _ = _cross_entropy_op(
            logits_2d, targets_1d, ignore_index, reduction, needs_gradient
        )
    return loss.reshape(targets.shape) if reduction == "none" else loss


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """cross_entropy(x @ weight.T + bias, targets) that holds no more than 80 MB of logits.

    More than that are made, used and overwritten a chunk of rows at a time, at least 128; gradients
    are computed beside the loss, dweight and dbias summed in float32. Under autocast the products
    run in its dtype, and dweight is rounded only if `weight` itself is short.

    Args:
        x: (..., C); float32, float16 or bfloat16 (eager: float64 too).
        weight: (V, C), and bias, (V,) or None: dtype of x, or any under autocast.
        targets: (...) int64, each in [0, V) or ignore_index.
        ignore_index, reduction: as in `cross_entropy`.
    Returns: loss, () or, for "none", (...); float32 (float64 for float64).
    Raises: as `cross_entropy`.
    Source: Liger-Kernel, arXiv:2410.10989, for the chunks.
    """
    op = "linear_cross_entropy"
    named = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in named.items():
        _check_dtype(op, name, tensor)
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"{op}: weight must be (V, C), V, C >= 1; got {tuple(weight.shape)}")
    V, C = weight.shape
    if x.ndim < 1 or x.shape[-1] != C:
        raise ValueError(f"{op}: x must be (..., {C}) as weight is; got {tuple(x.shape)}")
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"{op}: bias must be ({V},) as weight is; got {tuple(bias.shape)}")
    _check_targets(op, targets, "x", x, reduction)
    dtypes = {autocast_dtype(tensor) for tensor in named.values()}
    if len(dtypes) > 1:
        got = ", ".join(f"{name} {tensor.dtype}" for name, tensor in named.items())
        raise TypeError(f"{op}: dtypes must agree outside autocast; got {got}")
    dtype = dtypes.pop()
    backend = resolve(op, backend, *named.values(), targets)
    x_2d, targets_1d = x.reshape(-1, C), targets.reshape(-1)
    M = x_2d.shape[0]
    if backend == "triton":
        _check_triton_dtype(op, "x", x.dtype)
    elif _rows_per_chunk(M, V, dtype.itemsize) == M:
        logits = F.linear(x_2d, weight, bias)
        loss = _eager_cross_entropy(op, logits, targets_1d, ignore_index, reduction)
        return loss.reshape(targets.shape) if reduction == "none" else loss
    else:
        _check_range(op, targets_1d, V, ignore_index)
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in (x, weight, bias)]
    loss, *_ = _linear_cross_entropy_op(
        x_2d, weight, bias, targets_1d, None, ignore_index, reduction, dtype, needs, backend
    )
    return loss.reshape(targets.shape) if reduction == "none" else loss
