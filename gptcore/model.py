"""GPT: heads batched in one tensor, every step between two matrix products one fused op.

embed -> LN -> [ GEMM -> attention -> GEMM -> dropout+add+LN
                 -> GEMM+activation -> GEMM -> dropout+add+LN of what follows ] x n_layer -> head
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.module import _has_any_global_hook

from gptcore import naive
from gptcore.config import GPTConfig
from kernels import (
    causal_attention,
    causal_attention_qkv,
    cross_entropy,
    dropout_add_layer_norm,
    embed,
    layer_norm,
    linear_act,
    linear_cross_entropy,
    rotary_qkv,
    rotary_table,
)
from kernels.backend import resolve
from kernels.rng import SITE_EMBEDDING, draw_key, layer_site


class KVCache:
    """Keys and values of the tokens seen so far, for decoding one token at a time.

    Attributes:
        pair: (2, n_layer, B, H, block_size, D), of which keys and values are the halves.
        last: (B, 1, C), the last token's embedding, for token_shift; 0 before the first.
        length: tokens held, at most block_size.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device=None, dtype=None):
        shape = (2, config.n_layer, batch_size, config.n_head, config.block_size, config.D)
        self.pair = torch.empty(shape, device=device, dtype=dtype)
        self.keys, self.values = self.pair[0], self.pair[1]
        self.last = torch.zeros(batch_size, 1, config.n_embd, device=device, dtype=dtype)
        self.length = 0

    def shifted(self, x: torch.Tensor) -> torch.Tensor:
        """For embeddings x (B, T, C) of the next tokens, those of the tokens before each."""
        before = torch.cat((self.last, x[:, :-1]), dim=1)
        self.last.copy_(x[:, -1:])
        return before

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Store k, v (B, H, T, D) of one layer; returns all its keys and values so far.

        `length` moves on once, after the last layer, by `advance`.
        """
        start, stop = self.length, self.length + k.shape[2]
        self.keys[layer, :, :, start:stop] = k
        self.values[layer, :, :, start:stop] = v
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, T: int):
        """Count T tokens whose keys and values every layer has appended."""
        self.length += T

    def rows(self, table: torch.Tensor, T: int) -> torch.Tensor:
        """Of a table (block_size, ...) with a row a position, the rows of the next T tokens."""
        return table[self.length : self.length + T]

    def attend(self, layer: int, q, k, v, **options) -> torch.Tensor:
        """Attention of the next tokens, q, k, v (B, H, T, D), over all tokens so far."""
        return causal_attention(q, *self.append(layer, k, v), **options)


class RotaryTable(nn.Module):
    """Rotary angles of every position: float32 whatever the model is cast to, and never saved.

    Attributes:
        table: (block_size, D // 2, 2), `kernels.rotary_table`.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.size = config.block_size, config.D
        self.register_buffer("table", rotary_table(*self.size), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.table = rotary_table(*self.size, device=self.table.device)
        return self


class ActivatedLinear(nn.Linear):
    """A linear map and its activation in one op; a module, so that FSDP's hooks see the call."""

    def forward(self, x, activation=None, backend="auto"):
        """(..., in) -> (..., out); without an activation as nn.Linear."""
        if activation is None:
            return super().forward(x)
        return linear_act(x, self.weight, self.bias, activation=activation, backend=backend)


class Block(nn.Module):
    """The parameters of one pre-norm transformer block; `GPT` runs it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, width = config.n_embd, config.n_head * config.D
        self.ln_1 = nn.LayerNorm(C, bias=config.bias)
        self.qkv = nn.Linear(C, 3 * width, bias=config.qkv_bias)  # rows ordered (3, H, D)
        self.proj = nn.Linear(width, C, bias=config.bias)
        self.ln_2 = nn.LayerNorm(C, bias=config.bias)
        self.mlp_in = ActivatedLinear(C, 4 * C, bias=config.bias)
        self.mlp_out = nn.Linear(4 * C, C, bias=config.bias)


class GPT(nn.Module):
    """The batched, fused GPT; computes what `NaiveGPT` computes, masks and gradients included.

    Attributes:
        fuses_biases: whether a kernel may add the bias of the linear map before it; not where FSDP
            takes a map's parameters away when it returns.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.fuses_biases = config, True
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        rotary = config.position == "rotary"
        self.position_embedding = None if rotary else nn.Embedding(config.block_size, config.n_embd)
        self.angles = RotaryTable(config) if rotary else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        if config.tied_head:
            self.lm_head.weight = self.token_embedding.weight
        self.shift = nn.Parameter(torch.zeros(config.n_embd)) if config.token_shift else None
        if config.init != "notebook":
            self._init_normal()

    @torch.no_grad()
    def _init_normal(self):
        std = self.config.init_std
        residual_std = 0.0
        if self.config.init == "gpt2":
            residual_std = std / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("proj.weight", "mlp_out.weight"))
                parameter.normal_(0.0, residual_std if residual else std)
            elif name.endswith("bias"):
                parameter.zero_()

    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, idx, targets=None, key=None, *, return_logits=True):
        """Logits and, with targets, the mean loss.

        Args:
            idx: (B, T) integers, T <= block_size.
            targets: (B, T) integers; -100 is ignored.
            key: (2,) or (3,) int64 of `kernels.rng`; drawn from torch's generator if None.
            return_logits: False, with targets, never holds the logits; they come back as None.
        Returns: logits (B, T, V) or None, scalar loss or None.
        Raises: ValueError unless idx is (B, T) with T in 1..block_size.
        """
        y = self.hidden(idx, key)
        head, backend = self.lm_head, self.config.backend
        loss_alone = targets is not None and not return_logits
        if loss_alone and type(head) is nn.Linear:  # what wraps it may compute something else
            return None, linear_cross_entropy(y, head.weight, head.bias, targets, backend=backend)
        logits = head(y)
        if targets is None:
            return logits, None
        loss = cross_entropy(logits, targets, backend=backend)
        return None if loss_alone else logits, loss

    def next_logits(self, idx, cache: KVCache | None = None):
        """Logits (B, V) of the token after idx (B, T); `hidden` explains the cache."""
        return self.lm_head(self.hidden(idx, cache=cache, last_only=True)[:, 0])

    def hidden(self, idx, key=None, cache: KVCache | None = None, *, last_only=False):
        """The final LayerNorm's output (B, T, C) for idx (B, T).

        With a cache, idx continues the tokens in it, and their keys and values are added.
        With last_only, dropout being off, it is (B, 1, C), that of the last token; the last
        block computes nothing else but its keys and values.
        """
        config = self.config
        if idx.ndim != 2 or not idx.shape[1]:
            raise ValueError(f"GPT: idx must be (B, T), T at least 1; got {tuple(idx.shape)}")
        B, T = idx.shape
        position = cache.length if cache is not None else 0
        if position + T > config.block_size:
            raise ValueError(
                f"GPT: at most block_size tokens; got {position + T}, "
                f"block_size {config.block_size}"
            )
        p = config.dropout if self.training else 0.0
        if p and last_only:
            raise ValueError(f"GPT: last_only needs dropout off; got dropout {p} in training mode")
        if p and key is None:
            key = draw_key(idx.device)
        table = self.angles.table if self.angles else self.position_embedding.weight
        rows = table[:T] if cache is None else cache.rows(table, T)
        angles = rows if self.angles else None
        x = embed(
            idx,
            self.token_embedding.weight,
            None if self.angles else rows,
            dropout_p=p if config.embedding_dropout else 0.0,
            key=key,
            site=SITE_EMBEDDING,
            backend=config.backend,
        )
        if self.shift is not None:  # once a model, so not worth a kernel
            before = F.pad(x, (0, 0, 1, -1)) if cache is None else cache.shifted(x)
            x = torch.addcmul(x, before, self.shift)
        ln = self.blocks[0].ln_1
        y = layer_norm(x, ln.weight, ln.bias, eps=ln.eps, backend=config.backend)
        for layer, block in enumerate(self.blocks):
            is_last = layer + 1 == config.n_layer
            following = self.ln_f if is_last else self.blocks[layer + 1].ln_1
            if is_last and last_only and T > 1:
                o, x = self._last_attention(layer, block, y, cache, angles), x[:, -1:]
            else:
                o = self._attention(layer, block, y, p, key, cache, angles)
            y, x = self._residual(block.proj, o, x, block.ln_2, p, key, layer, "projection")
            h = self._activated(block.mlp_in, y)
            y, x = self._residual(block.mlp_out, h, x, following, p, key, layer, "feedforward")
        if cache is not None:
            cache.advance(T)
        return y

    def _qkv(self, block, y, angles):
        """(B, T, C) -> (B, T, 3, H, D), queries and keys turned if positions are."""
        config = self.config
        qkv = block.qkv(y).unflatten(-1, (3, config.n_head, config.D))
        if angles is None:
            return qkv
        return rotary_qkv(qkv, angles, normalize=config.qk_norm, backend=config.backend)

    def _attention(self, layer, block, y, p, key, cache, angles):
        """(B, T, C) -> (B, T, H * D)."""
        config = self.config
        options = {
            "scale": config.scale,
            "dropout_p": p,
            "key": key,
            "site": layer_site(layer, "attention"),
            "backend": config.backend,
        }
        if cache is None:
            qkv = block.qkv(y).unflatten(-1, (3, config.n_head, config.D))
            options |= {"angles": angles, "normalize": config.qk_norm}
            return causal_attention_qkv(qkv, **options).flatten(-2)
        q, k, v = self._qkv(block, y, angles).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        return cache.attend(layer, q, k, v, **options).transpose(1, 2).flatten(-2)

    def _last_attention(self, layer, block, y, cache, angles):
        """The last row of `_attention`: (B, T, C) -> (B, 1, H * D); dropout is off."""
        config = self.config
        attend = causal_attention if cache is None else functools.partial(cache.attend, layer)
        options = {"scale": config.scale, "backend": config.backend}
        if angles is not None or not is_plain(block.qkv):
            q, k, v = self._qkv(block, y, angles).permute(2, 0, 3, 1, 4)
            return attend(q[:, :, -1:], k, v, **options).transpose(1, 2).flatten(-2)
        heads = (config.n_head, config.D)
        rows = (config.n_head * config.D, 2 * config.n_head * config.D)  # of queries; of the rest
        weight, bias = block.qkv.weight.split(rows), (None, None)
        if block.qkv.bias is not None:
            bias = block.qkv.bias.split(rows)
        q = F.linear(y[:, -1:], weight[0], bias[0]).unflatten(-1, heads).transpose(1, 2)
        k, v = F.linear(y, weight[1], bias[1]).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        return attend(q, k, v, **options).transpose(1, 2).flatten(-2)

    def _activated(self, linear, y):
        """(B, T, C) -> (B, T, 4 C)."""
        config = self.config
        if config.activation == "gelu_erf":  # of imported checkpoints; no fused op computes erf
            return F.gelu(linear(y))
        return linear(y, config.activation, config.backend)

    def _residual(self, linear, h, x, ln, p, key, layer, place):
        """LayerNorm(x + dropout(linear(h))) and the new residual stream, both (B, T, C)."""
        # Kernels return the gradient of a bias that they add themselves: one kernel less a GEMM.
        fused = self.fuses_biases and type(linear) is nn.Linear
        fused = fused and resolve("GPT", self.config.backend, h) == "triton"
        return dropout_add_layer_norm(
            F.linear(h, linear.weight) if fused else linear(h),
            x,
            ln.weight,
            ln.bias,
            x_bias=linear.bias if fused else None,
            eps=ln.eps,
            dropout_p=p,
            key=key,
            site=layer_site(layer, place),
            backend=self.config.backend,
        )

    @classmethod
    def from_naive(cls, model: naive.NaiveGPT) -> "GPT":
        """The same model, batched: weights, dtype, device and mode are copied."""
        weight = model.lm_head.weight
        with torch.device(weight.device):
            gpt = cls(model.config).to(weight.dtype)
        _copy_weights(model, gpt, to_naive=False)
        return gpt.train(model.training)

    def to_naive(self) -> naive.NaiveGPT:
        """The same model, head by head: weights, dtype, device and mode are copied."""
        weight = self.lm_head.weight
        with torch.device(weight.device):
            model = naive.NaiveGPT(self.config).to(weight.dtype)
        _copy_weights(model, self, to_naive=True)
        return model.train(self.training)


_PLAIN = (
    *(GPT, Block, RotaryTable, ActivatedLinear),
    *(nn.ModuleList, nn.Linear, nn.LayerNorm, nn.Embedding),
)


def is_plain(module: nn.Module) -> bool:
    """Whether the parameters of `module` alone say what it and the modules in it compute.

    Not those of a LoRA wrapper, of another class in the place of ours, or under forward hooks.
    """
    return not _has_any_global_hook() and all(
        type(part) in _PLAIN
        and not part._forward_hooks
        and not part._forward_pre_hooks
        and "forward" not in vars(part)
        for part in module.modules()
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _copy_weights(model: naive.NaiveGPT, gpt: GPT, *, to_naive: bool):
    """Copy every parameter from one form to the other."""

    def copy(naive_parameter, gpt_parameter):
        if naive_parameter is None:
            return
        pair = (naive_parameter, gpt_parameter)
        target, source = pair if to_naive else pair[::-1]
        target.copy_(source)

    def copy_module(naive_module, gpt_module):
        copy(naive_module.weight, gpt_module.weight)
        copy(getattr(naive_module, "bias", None), getattr(gpt_module, "bias", None))

    copy_module(model.token_embedding_table, gpt.token_embedding)
    if gpt.position_embedding is not None:
        copy_module(model.position_embedding_table, gpt.position_embedding)
    copy(model.shift, gpt.shift)
    copy_module(model.ln_f, gpt.ln_f)
    copy_module(model.lm_head, gpt.lm_head)
    for naive_block, block in zip(model.blocks, gpt.blocks, strict=True):
        copy_module(naive_block.ln1, block.ln_1)
        copy_module(naive_block.ln2, block.ln_2)
        copy_module(naive_block.sa.proj, block.proj)
        copy_module(naive_block.ffwd.net[0], block.mlp_in)
        copy_module(naive_block.ffwd.net[2], block.mlp_out)
        heads = (3, gpt.config.n_head, gpt.config.D)
        weight = block.qkv.weight.unflatten(0, heads)  # (3, H, D, C)
        bias = block.qkv.bias.unflatten(0, heads) if block.qkv.bias is not None else None
        for h, head in enumerate(naive_block.sa.heads):
            for which, linear in enumerate((head.query, head.key, head.value)):
                copy(linear.weight, weight[which, h])
                if bias is not None:
                    copy(linear.bias, bias[which, h])


MODELS: dict[str, Callable[[GPTConfig], nn.Module]] = {
    "gpt": GPT,
    "naive": naive.NaiveGPT,
    "multihead": naive.MultiHeadLM,
    "head": naive.SingleHeadLM,
    "bigram-embedding": naive.EmbeddedBigramLM,
    "bigram": naive.BigramLM,
}


def build_model(name: str, config: GPTConfig) -> nn.Module:
    """The rung of the ladder called `name`; naive begins with the weights that gpt begins with.

    Raises: ValueError for an unknown name, with the known ones.
    """
    if name not in MODELS:
        raise ValueError(f"build_model: model must be one of {', '.join(MODELS)}; got {name!r}")
    return GPT(config).to_naive() if name == "naive" else MODELS[name](config)
