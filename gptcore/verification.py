"""The whole model's rows of `python -m kernels.verify`: GPT against NaiveGPT.

`kernels` does not know `gptcore`; importing this module registers its check and the damages that
prove it, and the certificate imports it where it is installed.
"""

from collections.abc import Iterator

import torch

from gptcore.config import GPTConfig
from gptcore.model import GPT
from gptcore.naive import NaiveGPT
from kernels.checks import DTYPES, Result, Settings, Tensors, compare_all, register_check
from kernels.damages import Damage, register_damages
from kernels.rng import make_key

# GELU: in a model so small, one ReLU that rounds to the other side is a tenth of a gradient.
SMALL = GPTConfig(
    vocab_size=13, block_size=9, n_layer=1, n_head=2, n_embd=16, dropout=0.2, activation="gelu"
)
# name: configuration, batch size; the ones after the first only with --full
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


def joined(results: Tensors, reference: Tensors) -> Tensors:
    """Logits, loss and all gradients as one vector, each in units of its largest reference value.

    A single parameter of this size has too few numbers for its error to be a statistic.
    """
    names = [name for name in results if name not in ("logits", "loss")]
    scaled = [(results[n] / (reference[n].abs().max().item() or 1.0)).flatten() for n in names]
    logits, gradient = results["logits"], torch.cat(scaled).to(results[names[0]].dtype)
    return {"logits": logits, "loss": results["loss"].to(logits), "gradient": gradient}


def check_model(settings: Settings, backend: str, dtype: str) -> Iterator[Result]:
    """Logits, loss and every gradient by the 2x rule, NaiveGPT being plain PyTorch.

    Both models have the same weights and, by the same key, the same dropout masks.
    """
    for name in list(MODELS)[: None if settings.full else 1]:
        config, B = MODELS[name]
        generator = torch.Generator().manual_seed(settings.seed)
        torch.manual_seed(settings.seed)
        naive = NaiveGPT(config.replace(backend=backend)).to(settings.device, DTYPES[dtype])
        shape = (2, B, config.block_size)
        idx, targets = torch.randint(config.vocab_size, shape, generator=generator)
        batch = idx.to(settings.device), targets.to(settings.device)
        key = make_key(settings.seed, 1, 3, device=settings.device)
        actual = outputs_and_gradients(GPT.from_naive(naive), *batch, key)
        plain = outputs_and_gradients(naive, *batch, key)
        reference = outputs_and_gradients(naive.double(), *batch, key)
        runs = (joined(results, reference) for results in (actual, plain, reference))
        comparisons = compare_all(*runs)
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
