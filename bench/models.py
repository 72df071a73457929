"""Whole models that compete: how each is built, fed, and brought to the same weights.

Peers train as their authors write it: F.dropout, their own optimizer settings, autocast on a GPU
where they use it. They get one batch for free; gptcore draws its own.
"""

import contextlib
import functools
import io
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from bench import peers
from bench.harness import Options
from gptcore.config import GPTConfig, TrainConfig
from gptcore.model import GPT
from gptcore.naive import NaiveGPT


def autocast(model: nn.Module, dtype: torch.dtype):
    """Mixed precision as training scripts use it; nothing where weights have `dtype` already."""
    weight = next(model.parameters())
    if dtype == weight.dtype:
        return contextlib.nullcontext()
    return torch.autocast(weight.device.type, dtype)


NANOGPT_WIRING = {
    "attention_scale": "head_size",
    "activation": "gelu",
    "bias": False,
    "qkv_bias": False,
    "head_bias": False,
    "tied_head": True,
    "embedding_dropout": True,
}
GPT2_WIRING = NANOGPT_WIRING | {"bias": True, "qkv_bias": True}


class BatchedGPT(GPT):
    """The textbook batched GPT on gptcore's parameters: SDPA, F.dropout, F.layer_norm."""

    def forward(self, idx, targets=None, key=None):
        """idx, targets (B, T) -> logits (B, T, V), loss."""
        config, T = self.config, idx.shape[1]
        p = config.dropout if self.training else 0.0
        x = self.token_embedding(idx) + self.position_embedding.weight[:T]
        x = F.dropout(x, p if config.embedding_dropout else 0.0)
        for block in self.blocks:
            qkv = block.qkv(block.ln_1(x)).unflatten(-1, (3, config.n_head, config.D))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D)
            o = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=config.scale, dropout_p=p
            )
            x = x + F.dropout(block.proj(o.transpose(1, 2).flatten(-2)), p)
            h = _ACTIVATIONS[config.activation](block.mlp_in(block.ln_2(x)))
            x = x + F.dropout(block.mlp_out(h), p)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())


_ACTIVATIONS = {
    "relu": F.relu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def meta(config: GPTConfig) -> GPT:
    """The model, without memory."""
    with torch.device("meta"):
        return GPT(config)


def batched(source: GPT) -> BatchedGPT:
    """A BatchedGPT with the weights of `source`."""
    with torch.device(source.lm_head.weight.device):
        model = BatchedGPT(source.config)
    model.load_state_dict(source.state_dict())
    return model


def to_naive(source: GPT, options: Options | None = None) -> NaiveGPT:
    """The seeds' model with the weights of `source`, in training mode."""
    return source.to_naive().train()


@torch.no_grad()
def to_nanogpt(source: GPT, options: Options) -> nn.Module:
    """nanoGPT's GPT with the weights of `source`, whose wiring must be NANOGPT_WIRING."""
    module, config = peers.nanogpt(options), source.config
    _require_even_heads("nanoGPT", config)
    with silenced():
        model = module.GPT(
            module.GPTConfig(
                block_size=config.block_size,
                vocab_size=config.vocab_size,
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_embd=config.n_embd,
                dropout=config.dropout,
                bias=config.bias,
            )
        ).to(source.lm_head.weight.device)
    _copy_gpt2(source, model.transformer, transpose=False)
    return model


@torch.no_grad()
def to_transformers(source: GPT, options: Options) -> nn.Module:
    """transformers' GPT2LMHeadModel with the weights of `source`, wired as GPT2_WIRING."""
    package, config = peers.transformers(options), source.config
    _require_even_heads("transformers' GPT-2", config)
    p = config.dropout
    model = package.GPT2LMHeadModel(
        package.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu_new",
            resid_pdrop=p,
            embd_pdrop=p,
            attn_pdrop=p,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).to(source.lm_head.weight.device)
    _copy_gpt2(source, model.transformer, transpose=True)
    return model


def silenced():
    """nanoGPT prints its sizes; within this it does not."""
    return contextlib.redirect_stdout(io.StringIO())


def _require_even_heads(peer: str, config: GPTConfig) -> None:
    if config.n_head * config.D != config.n_embd:
        raise peers.Skip(f"{peer} needs n_head * head_size = n_embd")


def _copy_gpt2(source: GPT, target: nn.Module, *, transpose: bool) -> None:
    """Weights of `source` into modules named as GPT-2's."""

    def copy(to, module, turn=False):
        to.weight.copy_(module.weight.T if turn else module.weight)
        if module.bias is not None:
            to.bias.copy_(module.bias)

    target.wte.weight.copy_(source.token_embedding.weight)
    target.wpe.weight.copy_(source.position_embedding.weight)
    copy(target.ln_f, source.ln_f)
    for to, block in zip(target.h, source.blocks, strict=True):
        copy(to.ln_1, block.ln_1)
        copy(to.ln_2, block.ln_2)
        copy(to.attn.c_attn, block.qkv, transpose)
        copy(to.attn.c_proj, block.proj, transpose)
        copy(to.mlp.c_fc, block.mlp_in, transpose)
        copy(to.mlp.c_proj, block.mlp_out, transpose)


def loss_of(model: nn.Module, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The training loss of any of the models."""
    if type(model).__module__.startswith("transformers."):
        logits = model(input_ids=idx).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    return model(idx, targets)[1]


def logits_of(model: nn.Module, idx: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of any of the models, in evaluation mode.

    GELU by the error function (nanoGPT) is evaluated by tanh, as gptcore and GPT-2 do.
    """
    training = model.training
    gelus = [m for m in model.modules() if isinstance(m, nn.GELU) and m.approximate == "none"]
    model.eval()
    for gelu in gelus:
        gelu.approximate = "tanh"
    with torch.no_grad():
        if type(model).__module__.startswith("transformers."):
            logits = model(input_ids=idx).logits
        else:  # nanoGPT gives all positions only where there are targets
            logits = model(idx, idx)[0]
    for gelu in gelus:
        gelu.approximate = "none"
    model.train(training)
    return logits


def plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    *,
    grad_clip: float = 0.0,
    forward: Callable | None = None,
) -> Callable[[], None]:
    """One update as every training script writes it; `forward` stands in for a compiled model."""
    idx, targets = batch
    forward = forward or (lambda idx, targets: loss_of(model, idx, targets))

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(model, dtype):
            loss = forward(idx, targets)
        loss.backward()
        if grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()

    return step


def naive_step(model, train: TrainConfig, batch, options: Options) -> Callable[[], None]:
    """The naive model's update, as the notebook writes it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate)
    return plain_step(model, optimizer, batch, torch.float32)


def nanogpt_step(
    model, train: TrainConfig, batch, options: Options, compiled: nn.Module | None = None
) -> Callable[[], None]:
    """nanoGPT's, as its train.py does it: its own optimizer groups, fused on CUDA only.

    compiled: `model` through torch.compile, to compute in its place.
    """
    with silenced():
        optimizer = model.configure_optimizers(
            train.weight_decay,
            train.learning_rate,
            (train.beta1, train.beta2),
            options.device.type,
        )
    forward = functools.partial(loss_of, model if compiled is None else compiled)
    return plain_step(
        model, optimizer, batch, options.dtype, grad_clip=train.grad_clip, forward=forward
    )


# Peers that a process of their own can time: how one is built from a GPT, and its step.
BUILD = {"naive": to_naive, "nanogpt": to_nanogpt}
STEPS = {"naive": naive_step, "nanogpt": nanogpt_step}


def reference_logits(source: GPT, idx: torch.Tensor, dtype: torch.dtype):
    """What the naive model says in the run's precision, and in float64."""
    naive = source.to_naive().eval()
    with torch.no_grad():
        with autocast(naive, dtype):
            plain = naive(idx)[0]
        return plain, naive.double()(idx)[0]
