"""Causal softmax attention."""

import torch

from kernels.rng import check_key, dropout_keep_mask, dropout_scale


def attention_reference(q, k, v, *, scale=None, dropout_p=0.0, key=None, site=0):
    """The equation, written plainly; dtype of the computation is dtype of the inputs."""
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    scale = D**-0.5 if scale is None else scale
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    p = ((q @ k.mT) * scale).masked_fill(~mask, float("-inf")).softmax(-1)
    if dropout_p:
        key = check_key("causal_attention", key, q.device)
        first = int(key[2]) if key.numel() == 3 else 0
        keep = dropout_keep_mask(
            key, site, range(first * H, (first + B) * H), range(Tk - Tq, Tk), Tk, dropout_p
        )
        p = p * keep.view(B, H, Tq, Tk) * dropout_scale(dropout_p)
    return p @ v


def causal_attention(q, k, v, *, scale=None, dropout_p=0.0, key=None, site=0, backend="auto"):
    """Causal softmax attention, all heads in one call."""
    return attention_reference(q, k, v, scale=scale, dropout_p=dropout_p, key=key, site=site)


def causal_attention_qkv(qkv, *, scale=None, dropout_p=0.0, key=None, site=0, backend="auto"):
    """qkv (B, T, 3, H, D) -> o (B, T, H, D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return causal_attention(
        q, k, v, scale=scale, dropout_p=dropout_p, key=key, site=site, backend=backend
    ).transpose(1, 2)
