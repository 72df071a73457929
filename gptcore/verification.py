"""The whole model's rows of `python -m kernels.verify`: GPT against NaiveGPT.

`kernels` does not know `gptcore`; importing this module registers its check and the damages that
prove it, and the certificate imports it where it is installed.
"""

from collections.abc import Iterator

import torch

from gptcore.config import GPTConfig
from gptcore.model import GPT
from gptcore.naive import NaiveGPT
from kernels.checks import (
    DTYPES,
    Measured,
    Result,
    Settings,
    Tensors,
    hold_rule,
    register_check,
)
from kernels.damages import Damage, register_damages
from kernels.rng import make_key
from kernels.verify import Comparison

DRAWS = 16  # of weights and batches, where the first breaks the rule
# GELU: in a model so small, one ReLU that rounds to the other side is a tenth of a gradient.
SMALL = GPTConfig(
    vocab_size=13, block_size=9, n_layer=1, n_head=2, n_embd=16, dropout=0.2, activation="gelu"
)
# name: configuration, batch size
MODELS = {
    "B2-T9-C16-H2-p0.2": (SMALL, 2),
    "B4-T17-C16-H3-L2-p0.1-tied": (
        SMALL.replace(
            block_size=17,
            n_head=3,
            n_layer=2,
            dropout=0.1,
            tied_head=True,
            head_bias=False,
            qkv_bias=True,
            embedding_dropout=True,
        ),
        4,
    ),
    "B2-T32-C32-H2-nobias-relu2": (
        SMALL.replace(block_size=32, n_embd=32, bias=False, activation="relu2", dropout=0.0),
        2,
    ),
    "B3-T12-C16-H2-p0.2-rotary": (
        SMALL.replace(block_size=12, position="rotary", qk_norm=True, token_shift=True),
        3,
    ),
}


def outputs_and_gradients(model, idx, targets, key) -> Tensors:
    """Logits, loss and gradients of one training step, by GPT's parameter names."""
    model.zero_grad()
    logits, loss = model(idx, targets, key)
    loss.backward()
    if isinstance(model, NaiveGPT):
        carrier = NaiveGPT(model.config).to(logits.device, model.lm_head.weight.dtype)
        with torch.no_grad():
            for target, source in zip(carrier.parameters(), model.parameters(), strict=True):
                target.copy_(source.grad)
        gradients = dict(GPT.from_naive(carrier).named_parameters())
    else:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    results = {"logits": logits, "loss": loss}
    results |= {f"d{name}": gradient for name, gradient in gradients.items()}
    return {name: tensor.detach() for name, tensor in results.items()}


def measure(config: GPTConfig, B: int, T: int, dtype, device, seed: int) -> Measured:
    """One step of GPT, of NaiveGPT and of it in float64: the same weights, batch and masks."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    naive = NaiveGPT(config).to(device, dtype)
    if naive.shift is not None:
        torch.nn.init.normal_(naive.shift)  # 0 at first, which would hide it
    idx, targets = torch.randint(config.vocab_size, (2, B, T), generator=generator)
    if B * T > 1:
        targets[0, 0] = -100
    batch = idx.to(device), targets.to(device), make_key(seed, 1, 3, device=device)
    actual = outputs_and_gradients(GPT.from_naive(naive), *batch)
    plain = outputs_and_gradients(naive, *batch)
    return actual, plain, outputs_and_gradients(naive.double(), *batch)


def compare_models(*args, seed: int) -> tuple[Comparison, ...]:
    """Logits, loss and every gradient of `measure(*args, seed)` by the 2x rule."""
    others = (measure(*args, seed + i) for i in range(1, DRAWS))
    return hold_rule(measure(*args, seed), others)


def check_model(settings: Settings, backend: str, dtype: str) -> Iterator[Result]:
    """GPT by the 2x rule, NaiveGPT being plain PyTorch."""
    for name, (config, B) in MODELS.items():
        config = config.replace(backend=backend)
        options = B, config.block_size, DTYPES[dtype], settings.device
        comparisons = compare_models(config, *options, seed=settings.seed)
        passed = all(comparison.passed for comparison in comparisons)
        yield Result("GPT", name, dtype, backend, "accuracy", passed, "", comparisons)


def _damage(what: str, old: str, new: str) -> Damage:
    return Damage("GPT", "eager", what, old, new, package="gptcore")


DAMAGES = (
    _damage(
        "the site of attention's dropout off by one",
        '"site": layer_site(layer, "attention")',
        '"site": 1 + layer_site(layer, "attention")',
    ),
    _damage(
        "a residual connection missing",
        "self._residual(block.mlp_out, h, x, ",
        "self._residual(block.mlp_out, h, 0 * x, ",
    ),
    _damage(
        "heads in the wrong order",
        "copy(linear.weight, weight[which, h])",
        "copy(linear.weight, weight[which, h - 1])",
    ),
    _damage("the scale of another rule", '"scale": config.scale,\n', '"scale": config.D**-0.5,\n'),
)

register_check("GPT", check_model)
register_damages(*DAMAGES)
