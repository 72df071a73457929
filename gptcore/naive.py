"""The seeds' ladder, from a table of bigrams to a GPT: slow, obvious, the reference.

Every rung is a module `model(idx, targets=None, key=None) -> (logits, loss)` made from a
GPTConfig; idx and targets are (B, T) integers, logits (B, T, V). Targets of -100 are ignored.
Parameter names are those of the notebook's state dict.

Without a key, dropout is F.dropout, as the notebook has it; with one, it is the mask of
`kernels.rng`, the same that the fused ops draw.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from gptcore.config import GPTConfig
from kernels.rng import SITE_EMBEDDING, dropout_keep_mask, dropout_scale, layer_site

ACTIVATION_MODULES = {
    "relu": nn.ReLU,
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "relu2": lambda: ReLUSquared(),
    "gelu_erf": nn.GELU,
}


class ReLUSquared(nn.Module):
    """max(x, 0)**2 (So et al. 2021, Primer)."""

    def forward(self, x):
        """x: any shape and dtype."""
        return F.relu(x).square()


def next_token_loss(logits, targets):
    """Mean cross-entropy of logits (B, T, V) against targets (B, T); None without targets."""
    if targets is None:
        return None
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())


def dropout_activations(x, p, training, key, site):
    """Dropout of x (B, T, C): plane 0, row b * T + t, column channel."""
    if not training or p == 0:
        return x
    if key is None:
        return F.dropout(x, p)
    B, T, C = x.shape
    first = int(key[2]) if len(key) == 3 else 0
    keep = dropout_keep_mask(key, site, 1, range(first * T, (first + B) * T), C, p)
    return x * keep.view(B, T, C) * dropout_scale(p)


def dropout_probabilities(weights, p, training, key, site, head, n_head):
    """Dropout of one head's probabilities (B, T, T): plane b * n_head + head."""
    if not training or p == 0:
        return weights
    if key is None:
        return F.dropout(weights, p)
    B, T, _ = weights.shape
    first = int(key[2]) if len(key) == 3 else 0
    planes = range(first * n_head + head, (first + B) * n_head, n_head)
    return weights * dropout_keep_mask(key, site, planes, T, T, p) * dropout_scale(p)


class BigramLM(nn.Module):
    """The next token's logits are read off a (V, V) table by the current token."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets=None, key=None):
        """idx, targets (B, T) -> logits (B, T, V), loss."""
        logits = self.token_embedding_table(idx)
        return logits, next_token_loss(logits, targets)


def rotate(x):
    """x (B, T, D) at positions 0 .. T - 1, every pair of channels turned by its angle."""
    T, D = x.shape[1:]
    even, odd = x[..., 0::2], x[..., 1::2]
    frequencies = 10_000 ** -(torch.arange(0, D, 2, dtype=torch.float64, device=x.device) / D)
    angles = torch.arange(T, dtype=torch.float64, device=x.device)[:, None] * frequencies
    cos, sin = angles.cos().float().to(x.dtype), angles.sin().float().to(x.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def rms_norm(x):
    """x (..., D) over its root mean square."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Head(nn.Module):
    """One head of causal self-attention: softmax(scale * q k^T) v over the past."""

    def __init__(self, config: GPTConfig, layer: int = 0, head: int = 0):
        super().__init__()
        self.config, self.head, self.site = config, head, layer_site(layer, "attention")
        self.key = nn.Linear(config.n_embd, config.D, bias=config.qkv_bias)
        self.query = nn.Linear(config.n_embd, config.D, bias=config.qkv_bias)
        self.value = nn.Linear(config.n_embd, config.D, bias=config.qkv_bias)
        self.register_buffer("tril", torch.tril(torch.ones(config.block_size, config.block_size)))

    def forward(self, x, key=None):
        """x (B, T, C) -> (B, T, D)."""
        T = x.shape[1]
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, D)
        if self.config.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if self.config.position == "rotary":
            q, k = rotate(q), rotate(k)
        weights = q @ k.mT * self.config.scale  # (B, T, T)
        weights = weights.masked_fill(self.tril[:T, :T] == 0, float("-inf")).softmax(-1)
        weights = dropout_probabilities(
            weights,
            self.config.dropout,
            self.training,
            key,
            self.site,
            self.head,
            self.config.n_head,
        )
        return weights @ v


class MultiHead(nn.Module):
    """Heads side by side in a loop, concatenated and projected."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.config, self.site = config, layer_site(layer, "projection")
        self.heads = nn.ModuleList(Head(config, layer, head) for head in range(config.n_head))
        self.proj = nn.Linear(config.n_head * config.D, config.n_embd, bias=config.bias)

    def forward(self, x, key=None):
        """x (B, T, C) -> (B, T, C)."""
        out = self.proj(torch.cat([head(x, key) for head in self.heads], dim=-1))
        return dropout_activations(out, self.config.dropout, self.training, key, self.site)


class FeedForward(nn.Module):
    """Linear to 4 C, activation, linear back to C."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.config, self.site = config, layer_site(layer, "feedforward")
        self.net = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias),
            ACTIVATION_MODULES[config.activation](),
            nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias),
        )

    def forward(self, x, key=None):
        """x (B, T, C) -> (B, T, C)."""
        return dropout_activations(self.net(x), self.config.dropout, self.training, key, self.site)


class Block(nn.Module):
    """Pre-norm transformer block: communication, then computation, each on a residual."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.sa = MultiHead(config, layer)
        self.ffwd = FeedForward(config, layer)
        self.ln1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.ln2 = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, x, key=None):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.sa(self.ln1(x), key)
        return x + self.ffwd(self.ln2(x), key)


class _Embedded(nn.Module):
    """Token plus position embedding, some body on (B, T, C), and the output head."""

    def __init__(self, config: GPTConfig, width: int):
        super().__init__()
        self.config = config
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)
        rotary = config.position == "rotary"
        self.position_embedding_table = (
            None if rotary else nn.Embedding(config.block_size, config.n_embd)
        )
        self.lm_head = nn.Linear(width, config.vocab_size, bias=config.head_bias)

    def body(self, x, key):
        """x (B, T, C) -> (B, T, width); the identity here."""
        return x

    def forward(self, idx, targets=None, key=None):
        """idx, targets (B, T) -> logits (B, T, V), loss."""
        x = self.token_embedding_table(idx)
        if self.position_embedding_table is not None:
            x = x + self.position_embedding_table(torch.arange(idx.shape[1], device=idx.device))
        logits = self.lm_head(self.body(x, key))
        return logits, next_token_loss(logits, targets)


class EmbeddedBigramLM(_Embedded):
    """A bigram through token and position embeddings: the notebook's second rung."""

    def __init__(self, config: GPTConfig):
        super().__init__(config, config.n_embd)


class SingleHeadLM(_Embedded):
    """One head of self-attention between the embeddings and the output head."""

    def __init__(self, config: GPTConfig):
        super().__init__(config, config.D)
        self.sa_head = Head(config)

    def body(self, x, key):
        """x (B, T, C) -> (B, T, D)."""
        return self.sa_head(x, key)


class MultiHeadLM(_Embedded):
    """Several heads between the embeddings and the output head."""

    def __init__(self, config: GPTConfig):
        super().__init__(config, config.n_embd)
        self.sa_heads = MultiHead(config)

    def body(self, x, key):
        """x (B, T, C) -> (B, T, C)."""
        return self.sa_heads(x, key)


class NaiveGPT(_Embedded):
    """The notebook's GPTLanguageModel: blocks of looped heads, a final LayerNorm, the head."""

    def __init__(self, config: GPTConfig):
        super().__init__(config, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        if config.tied_head:
            self.lm_head.weight = self.token_embedding_table.weight
        self.shift = nn.Parameter(torch.zeros(config.n_embd)) if config.token_shift else None

    def body(self, x, key):
        """x (B, T, C) -> (B, T, C)."""
        if self.config.embedding_dropout:
            x = dropout_activations(x, self.config.dropout, self.training, key, SITE_EMBEDDING)
        if self.shift is not None:
            x = x + self.shift * F.pad(x, (0, 0, 1, -1))  # of the token before; 0 before the first
        for block in self.blocks:
            x = block(x, key)
        return self.ln_f(x)
