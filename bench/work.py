"""FLOPs and bytes of a whole training step: model FLOPs, nothing recomputed."""

from gptcore.config import GPTConfig

ADAMW_BYTES = 28  # a parameter: read it, its gradient and both moments, write all but the gradient


def matrix_weights(config: GPTConfig) -> int:
    """Weights that every token is multiplied with: blocks and output head."""
    C, width = config.n_embd, config.n_head * config.D
    return config.n_layer * (4 * C * width + 8 * C * C) + C * config.vocab_size


def attention_products(config: GPTConfig, B: int, T: int) -> float:
    """FLOPs of scores and weighted values of all layers, forward, causal half only."""
    return config.n_layer * 4 * B * config.n_head * config.D * T * (T + 1) / 2


def step_flops(config: GPTConfig, B: int, T: int) -> float:
    """Forward, and twice that backward."""
    return 3 * (2 * matrix_weights(config) * B * T + attention_products(config, B, T))


def parameters(config: GPTConfig) -> int:
    """All parameters; a tied head counts once."""
    C, width, V = config.n_embd, config.n_head * config.D, config.vocab_size
    norm = C * (2 if config.bias else 1)
    block = 4 * C * width + 8 * C * C + 2 * norm
    block += 3 * width * config.qkv_bias + (C + 4 * C + C) * config.bias
    head = (0 if config.tied_head else C * V) + V * config.head_bias
    return V * C + config.block_size * C + config.n_layer * block + norm + head
