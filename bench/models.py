"""Whole models that compete: how each is built, fed, and brought to the same weights.

Peers train as their authors write it: F.dropout, their own optimizer settings, autocast on a GPU
where they use it. They get one batch for free; gptcore draws its own.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bench import peers
from bench.harness import Options, Tensors
from gptcore.config import GPTConfig, TrainConfig
from gptcore.model import GPT
from gptcore.naive import ACTIVATION_MODULES, NaiveGPT


def autocast(model: nn.Module, dtype: torch.dtype):
    """Mixed precision as training scripts use it; nothing where weights have `dtype` already."""
    weight = next(model.parameters())
    if dtype == weight.dtype:
        return contextlib.nullcontext()
    return torch.autocast(weight.device.type, dtype)


ROWS = 4  # of a batch at once where the naive model judges: it holds all probabilities
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

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.activation = ACTIVATION_MODULES[config.activation]()

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
            h = self.activation(block.mlp_in(block.ln_2(x)))
            x = x + F.dropout(block.mlp_out(h), p)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())


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


def plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    *,
    grad_clip: float = 0.0,
    forward: Callable | None = None,
) -> Callable[[], None]:
    """One update as nanoGPT's train.py writes it; `forward` stands in for a compiled model.

    Between updates nobody holds gradients.
    """
    idx, targets = batch
    forward = forward or (lambda idx, targets: loss_of(model, idx, targets))

    def step():
        with autocast(model, dtype):
            loss = forward(idx, targets)
        loss.backward()
        if grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

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


def reference_gradients(
    source: GPT, batch: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, *, ours: bool
) -> tuple[GPT, GPT]:
    """Gradients of the training loss by the textbook model, and by the naive one in float64.

    They come as the weights of a GPT: what brings the weights of `source` to a peer brings
    gradients to the peer's names. The textbook model computes in `dtype` as its contestant does,
    by autocast or, like ours, from weights of that dtype.
    """
    plain, naive = batched(source), source.to_naive().train().double()
    plain = plain.to(dtype) if ours else plain
    with autocast(plain, dtype):
        logits = plain(batch[0])[0].float()
    F.cross_entropy(logits.flatten(0, 1), batch[1].flatten()).backward()
    for idx, targets in zip(*(tensor.split(ROWS) for tensor in batch), strict=True):
        (naive(idx, targets)[1] * (len(idx) / len(batch[0]))).backward()
    with torch.no_grad():
        for parameter in (*plain.parameters(), *naive.parameters()):
            parameter.copy_(parameter.grad)
    return plain.float(), GPT.from_naive(naive)


@contextlib.contextmanager
def handed_over(model: nn.Module) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Gradients and weights of `model` as its optimizer last found them, by name.

    Copies into one place: an update that is captured then makes them as well.
    """
    found = {}

    def note(*_):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                pair = parameter.grad, parameter.detach()
                kept = found.setdefault(name, tuple(map(torch.empty_like, pair)))
                for to, tensor in zip(kept, pair, strict=True):
                    to.copy_(tensor)

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def clipped(gradients: Tensors, most: float) -> Tensors:
    """`gradients`, scaled to a norm of at most `most`; 0: no limit. Rounded as they are."""
    norm = nn.utils.get_total_norm(gradients.values())
    scale = (most / (norm + 1e-6)).clamp(max=1.0).item() if most else 1.0
    return {name: gradient * scale for name, gradient in gradients.items()}


def reference_logits(source: GPT, idx: torch.Tensor, dtype: torch.dtype):
    """What the naive model says in the run's precision, and in float64."""
    naive = source.to_naive().eval()
    with torch.no_grad():
        with autocast(naive, dtype):
            plain = naive(idx)[0]
        return plain, naive.double()(idx)[0]
