"""Linear, bias and activation."""

import torch.nn.functional as F


def linear_act(x, weight, bias=None, *, activation="relu", backend="auto"):
    """activation(x @ weight.T + bias)."""
    y = F.linear(x, weight, bias)
    if activation == "relu":
        return F.relu(y)
    if activation == "gelu":
        return F.gelu(y, approximate="tanh")
    return F.relu(y).square()
