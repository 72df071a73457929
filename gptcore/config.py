"""What a model and a run are: frozen dataclasses, their validation and the presets."""

import dataclasses
from dataclasses import dataclass

ACTIVATIONS = ("relu", "gelu", "relu2")
SCALE_RULES = ("n_embd", "head_size")


class ConfigError(ValueError):
    """Input a user can mend; the command lines print it as one line and exit with 2."""


@dataclass(frozen=True)
class GPTConfig:
    """Shape and wiring of a GPT; the defaults are the notebook's model.

    Fields are named as nanoGPT names them where it has them.

    Raises: ConfigError, naming the field, the rule and the value.
    """

    vocab_size: int = 65
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    head_size: int | None = None  # None: n_embd // n_head, which need not divide
    dropout: float = 0.2
    embedding_dropout: bool = False  # nanoGPT and GPT-2 drop the embedding too
    qkv_bias: bool = False
    bias: bool = True  # of projection, feed-forward and LayerNorm
    head_bias: bool = True
    tied_head: bool = False  # the output head shares the token embedding
    activation: str = "relu"
    attention_scale: str = "n_embd"  # scores times n_embd**-0.5 (the seeds) or head_size**-0.5
    init: str = "notebook"  # N(0,1) embeddings, default Linear; "gpt2": N(0, 0.02), scaled residual
    backend: str = "auto"  # of the fused ops: "auto", "triton" or "eager"

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}")
        if self.head_size is None and self.n_embd < self.n_head:
            raise ConfigError(
                f"n_embd // n_head must be at least 1; got n_embd {self.n_embd}, "
                f"n_head {self.n_head}"
            )
        if self.head_size is not None and self.head_size < 1:
            raise ConfigError(f"head_size must be at least 1; got {self.head_size!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1); got {self.dropout!r}")
        choices = {
            "activation": ACTIVATIONS,
            "attention_scale": SCALE_RULES,
            "init": ("notebook", "gpt2"),
            "backend": ("auto", "triton", "eager"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")

    @property
    def D(self) -> int:
        """Head size."""
        return self.head_size or self.n_embd // self.n_head

    @property
    def scale(self) -> float:
        """What q.k is multiplied by."""
        return (self.n_embd if self.attention_scale == "n_embd" else self.D) ** -0.5

    def replace(self, **changes) -> "GPTConfig":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)
