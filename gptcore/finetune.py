"""Fine-tuning: start from the weights of another run, on another text.

Tokens are matched by what they stand for, so that a vocabulary may lose some and gain others.
"""

import dataclasses
import re
from typing import Any

import torch
from torch import nn

from gptcore.checkpoint import Checkpoint, check_names, named_weights
from gptcore.config import ConfigError, TrainConfig, check_model
from gptcore.naive import BigramLM
from gptcore.tokenizer import Tokenizer

TOKENS = ("token_embedding", "token_embedding_table", "lm_head")  # rows: the vocabulary
POSITIONS = ("position_embedding", "position_embedding_table")
FREE_FIELDS = ("block_size", "dropout", "embedding_dropout", "backend")
# The preset's learning rate is divided by this: the whole of it learns a foreign text faster, but
# on a text nearer to the first, less changes and a lower rate forgets less.
GENTLER = 3.0


def adopt(
    origin: Checkpoint, config: TrainConfig, given: dict[str, Any]
) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings of a run that starts from `origin`: its model, its kind of tokenizer.

    Args:
        given: what the user asked for by flags or file; its learning rate is taken as it is.
            Without one, the preset's or that of `origin`, the lower, is divided by GENTLER.
    Returns: TrainConfig and the fields of GPTConfig.
    Raises: ConfigError where the user asked for another model.
    """
    model = dataclasses.asdict(origin.model)
    fixed = {**model, "model": origin.train.model}
    for name, value in given.items():
        if name in fixed and name not in FREE_FIELDS and value != fixed[name]:
            raise ConfigError(
                f"--init_from: {name} is {fixed[name]!r} in {origin.folder} and cannot become "
                f"{value!r}; leave --{name} out"
            )
    check_model(origin.train.model, origin.model, given)
    changes: dict[str, Any] = {"model": origin.train.model}
    if "tokenizer" not in given:
        changes["tokenizer"] = origin.tokenizer.kind
    if "learning_rate" not in given:
        before = min(config.learning_rate, origin.train.learning_rate)
        rate = changes["learning_rate"] = before / GENTLER
        whose = "the preset's" if before == config.learning_rate else f"that of {origin.folder}"
        print(f"--init_from: learning rate {rate:.3g}, {whose} divided by {GENTLER:g}")
        if "min_lr" not in given:
            changes["min_lr"] = config.min_lr * rate / config.learning_rate
    model.update({name: given[name] for name in FREE_FIELDS if name in given})
    return config.replace(**changes), model


@torch.no_grad()
def initialise(model: nn.Module, tokenizer: Tokenizer, origin: Checkpoint) -> str:
    """Copy the weights of `origin` into `model`, token by token and position by position.

    What `origin` does not have stays as it was initialised. Returns: what was kept, new and
    dropped, in words.
    Raises: ConfigError if the weights do not belong to the model or no token is shared.
    """
    found, expected = origin.read_weights(), named_weights(model)
    check_names(origin.folder, found, expected)
    old = [origin.tokenizer.token_bytes(i) for i in range(origin.tokenizer.vocab_size)]
    new = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    old_id = {token: i for i, token in enumerate(old)}
    pairs = [(i, old_id[token]) for i, token in enumerate(new) if token in old_id]
    if not pairs:
        raise ConfigError(
            f"--init_from: {origin.folder} and the new text share no token; "
            f"give --tokenizer {origin.tokenizer.kind}, or leave --init_from out"
        )
    rows, sources = (torch.tensor(ids) for ids in zip(*pairs, strict=True))
    for name, weight in expected.items():
        source, kind = found[name].to(weight), name.split(".")[0]
        if kind in TOKENS and isinstance(model, BigramLM):
            weight[rows[:, None], rows] = source[sources[:, None], sources]
        elif kind in TOKENS:
            weight[rows] = source[sources]
        elif kind in POSITIONS:
            weight[: len(source)] = source[: len(weight)]
        else:
            weight.copy_(source)
    return _report(origin, model, old, new)


def _report(origin: Checkpoint, model: nn.Module, old: list[bytes], new: list[bytes]) -> str:
    """Which tokens and positions were kept, which are new, which are gone."""
    gained, lost = (sorted(set(a) - set(b)) for a, b in ((new, old), (old, new)))
    words = f"{len(new) - len(gained)} of {len(new)} tokens known"
    for tokens, what in ((gained, "new, to be learned"), (lost, "dropped")):
        if tokens:
            shown = b"".join(tokens[:40]).decode("utf-8", "replace")
            words += f"; {len(tokens)} {what}: {shown!r}" + ("..." if len(tokens) > 40 else "")
    before, now = origin.model.block_size, model.config.block_size
    if now != before:
        words += f"; positions {before} -> {now}"
    return words


def freeze(model: nn.Module, spec: str) -> None:
    """Take parameters out of training.

    Args:
        spec: "", or of "embeddings", "blocks:N" (the first N) and "head" some, with commas. A head
            that is tied to the token embedding is frozen with the embeddings.
    Raises: ConfigError if it is none of these, what the model does not have, or leaves nothing to
        train.
    """
    frozen: tuple[str, ...] = ()
    names = [name for name, _ in model.named_parameters()]
    for part in filter(None, spec.split(",")):
        blocks = re.fullmatch(r"blocks:(\d+)", part)
        if part == "embeddings":
            here = (*(f"{name}." for name in TOKENS[:2]), *(f"{name}." for name in POSITIONS))
        elif part == "head":
            here = ("lm_head.",)
        elif blocks and 1 <= int(blocks[1]) <= model.config.n_layer:
            here = tuple(f"blocks.{i}." for i in range(int(blocks[1])))
        else:
            raise ConfigError(
                "freeze must be of embeddings, head and blocks:N some, with commas, N from 1 to "
                f"{model.config.n_layer}; got {part!r}"
            )
        tied = part == "head" and hasattr(model, "lm_head") and "lm_head.weight" not in names
        if tied or not any(name.startswith(here) for name in names):
            fix = "; its head is the token embedding: freeze embeddings" if tied else ""
            raise ConfigError(f"freeze: this model has no {part} of its own to freeze{fix}")
        frozen += here
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    if frozen and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"freeze leaves nothing to train; got {spec!r}; leave something out")
