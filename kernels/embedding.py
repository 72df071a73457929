"""Token plus position embedding, with dropout."""

import torch.nn.functional as F

from kernels.layer_norm import dropout_rows
from kernels.rng import check_key


def embed(idx, token_weight, position_weight, *, dropout_p=0.0, key=None, site=0, backend="auto"):
    """dropout(token_weight[idx] + position_weight[:T]) for idx (B, T)."""
    x = F.embedding(idx, token_weight) + position_weight[: idx.shape[1]]
    return dropout_rows(x, dropout_p, check_key("embed", key, x.device), site) if dropout_p else x
