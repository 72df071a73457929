"""Text from a model, one token after the other."""

from collections.abc import Iterator

import torch
from torch import nn

from kernels.rng import SITE_SAMPLE, draw_key, make_key, random_integers


def next_token(
    logits: torch.Tensor,
    key: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """Draw one token a row; a pure function of its arguments.

    Args:
        logits: (B, V), any float dtype.
        key: (3,) int64 of `kernels.rng`; step counts the tokens.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens.
        top_p: only the likeliest tokens that together reach this probability.
    Returns: (B, 1) int64.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.double() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None and top_p < 1:
        probability, order = logits.softmax(-1).sort(descending=True)
        beyond = probability.cumsum(-1) - probability >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    cumulative = logits.softmax(-1).cumsum(-1)
    uniform = random_integers(key, SITE_SAMPLE, range(len(logits)), 2**32).double() / 2**32
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)


@torch.no_grad()
def stream(
    model: nn.Module,
    idx: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yield (B, 1) int64 tokens that continue idx; arguments as `generate`."""
    _check(model, idx, max_new_tokens, temperature, top_k, top_p)
    if seed is None:
        seed = int(draw_key()[0])
    block_size = model.config.block_size
    for position in range(max_new_tokens):
        logits = model(idx[:, -block_size:])[0][:, -1, :vocab_size]
        key = make_key(seed, position, 0, idx.device)
        token = next_token(logits, key, temperature=temperature, top_k=top_k, top_p=top_p)
        idx = torch.cat((idx[:, -block_size:], token), dim=1)
        yield token


def generate(model: nn.Module, idx: torch.Tensor, *, max_new_tokens: int, **options):
    """Continue `idx`, in evaluation mode, cropping the context to the block size.

    Args:
        model: anything with `config.block_size` and `model(idx) -> (logits, loss)`.
        idx: (B, T) int64, T >= 1.
        max_new_tokens: tokens to add.
        temperature, top_k, top_p: see `next_token`.
        seed: the same seed gives the same tokens; None draws one from torch's generator.
        vocab_size: ids from here on are never drawn (a padded vocabulary's rest).
    Returns: (B, T + max_new_tokens) int64.
    Raises: ValueError on impossible options.
    """
    training = model.training
    model.eval()
    try:
        tokens = list(stream(model, idx, max_new_tokens=max_new_tokens, **options))
    finally:
        model.train(training)
    return torch.cat((idx, *tokens), dim=1)


def _check(model, idx, max_new_tokens, temperature, top_k, top_p) -> None:
    if idx.ndim != 2 or idx.shape[1] < 1:
        raise ValueError(f"generate: idx must be (B, T) with T >= 1; got {tuple(idx.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0; got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature must be finite and >= 0; got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1; got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1]; got {top_p}")
