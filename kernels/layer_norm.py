"""LayerNorm, alone and after dropout + residual add."""

import torch.nn.functional as F

from kernels.rng import check_key, dropout_keep_mask, dropout_scale


def layer_norm(x, weight, bias=None, *, eps=1e-5, backend="auto"):
    """LayerNorm over the last dimension."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def dropout_rows(x, dropout_p, key, site):
    """x (..., C) with the mask of DESIGN: plane 0, row = flattened leading index, col = channel."""
    first = int(key[2]) if key.numel() == 3 else 0
    rows = x.numel() // max(1, x.shape[-1])
    start = first * (rows // max(1, x.shape[0]))
    keep = dropout_keep_mask(key, site, 1, range(start, start + rows), x.shape[-1], dropout_p)
    return x * keep.view(x.shape) * dropout_scale(dropout_p)


def dropout_add_layer_norm(
    x, residual, weight, bias=None, *, eps=1e-5, dropout_p=0.0, key=None, site=0, backend="auto"
):
    """new_residual = residual + dropout(x); y = LayerNorm(new_residual)."""
    if dropout_p:
        x = dropout_rows(x, dropout_p, check_key("dropout_add_layer_norm", key, x.device), site)
    residual = residual + x
    return layer_norm(residual, weight, bias, eps=eps), residual
