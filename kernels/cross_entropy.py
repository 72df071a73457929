"""Cross-entropy, alone and fused with the output projection."""

import torch.nn.functional as F


def cross_entropy(logits, targets, *, ignore_index=-100, reduction="mean", backend="auto"):
    """logits (..., V), targets (...)."""
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float()
        if logits.dtype.itemsize < 4
        else logits.reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
    )


def linear_cross_entropy(
    x, weight, bias, targets, *, ignore_index=-100, reduction="mean", backend="auto"
):
    """cross_entropy(x @ weight.T + bias, targets)."""
    logits = F.linear(x, weight, bias)
    return cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
