"""What a model and a run are: frozen dataclasses and their validation.

Every field is a flag and a TOML key (gptcore.flags). Nothing here imports torch.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("relu", "gelu", "relu2", "gelu_erf")
SCALE_RULES = ("n_embd", "head_size")
POSITIONS = ("learned", "rotary")
SCHEDULES = ("constant", "cosine", "wsd", "cyclic", "onecycle", "exponential")
CYCLES = ("triangular", "triangular2", "exp_range")
SETTINGS_OF = {  # model -> the fields of GPTConfig that say nothing to the models below it
    "gpt": ("backend",),
    "naive": (
        *("n_layer", "embedding_dropout", "tied_head", "activation"),
        *("token_shift", "init", "init_std"),
    ),
    "multihead": ("bias",),
    "head": ("n_head", "head_size", "dropout", "qkv_bias", "attention_scale", "qk_norm"),
    "bigram-embedding": ("n_embd", "position", "head_bias"),
    "bigram": ("vocab_size", "block_size"),
}
MODEL_NAMES = tuple(SETTINGS_OF)
LARGEST_HEAD = 256  # of the fused attention


class _OneLine(Exception):
    """Its message is one line of bearable length, whatever it quotes; the end, the fix, stays."""

    def __str__(self):
        text = " ".join(super().__str__().splitlines())
        return text if len(text) <= 2000 else f"{text[:1000]} [...] {text[-500:]}"


class ConfigError(_OneLine, ValueError):
    """Input a user can mend; the command lines print it as one line and exit with 2."""


class RunError(_OneLine, RuntimeError):
    """A run that broke; the command lines print it as one line and exit with 1."""


def _option(default, help, *, choices=None, least=None, above=None, below=None):
    """A field with the help text of its flag and the rule its values obey."""
    rule = {"choices": choices, "least": least, "above": above, "below": below}
    metadata = {"help": help, **{name: value for name, value in rule.items() if value is not None}}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class GPTConfig:
    """Shape and wiring of a GPT; the defaults are the notebook's model.

    Fields are named as nanoGPT names them where it has them.

    Raises: ConfigError, naming the field, the rule and the value.
    """

    vocab_size: int = _option(65, "tokens", least=1)
    block_size: int = _option(256, "longest context, tokens", least=1)
    n_layer: int = _option(6, "blocks", least=1)
    n_head: int = _option(6, "heads of a block", least=1)
    n_embd: int = _option(384, "channels", least=1)
    head_size: int | None = _option(
        None, "channels of a head; default n_embd // n_head, which need not divide", least=1
    )
    dropout: float = _option(0.2, "probability, everywhere", least=0, below=0.99999)
    embedding_dropout: bool = _option(False, "drop the embedding too, as nanoGPT and GPT-2 do")
    qkv_bias: bool = _option(False, "biases of queries, keys and values")
    bias: bool = _option(True, "biases of projection, feed-forward and LayerNorm")
    head_bias: bool = _option(True, "bias of the output head")
    tied_head: bool = _option(False, "the output head shares the token embedding")
    activation: str = _option(
        "relu",
        "relu, gelu (tanh), relu2 or gelu_erf (exact; nanoGPT's, not fused)",
        choices=ACTIVATIONS,
    )
    attention_scale: str = _option(
        "n_embd", "scores times n_embd**-0.5 (the seeds) or head_size**-0.5", choices=SCALE_RULES
    )
    position: str = _option(
        "learned", "learned, or rotary: queries and keys turned by position", choices=POSITIONS
    )
    qk_norm: bool = _option(False, "normalise queries and keys; needs position rotary")
    token_shift: bool = _option(
        False, "add to each embedding a learnt share, by channel, of the one before it"
    )
    init: str = _option(
        "notebook",
        "notebook: N(0,1) embeddings, default Linear; gpt2: N(0, init_std), projections onto the "
        "residual over sqrt(2 n_layer); zero: N(0, init_std), projections onto the residual 0",
        choices=("notebook", "gpt2", "zero"),
    )
    init_std: float = _option(0.02, "standard deviation of init gpt2 and zero", above=0)
    backend: str = _option(
        "auto", "of the fused ops: auto, triton or eager", choices=("auto", "triton", "eager")
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))
        if self.head_size is None and self.n_embd < self.n_head:
            raise ConfigError(
                f"n_embd // n_head must be at least 1; got n_embd {self.n_embd}, "
                f"n_head {self.n_head}"
            )
        if self.position == "rotary" and self.D % 2:
            raise ConfigError(f"position rotary needs an even head size; got {self.D}")
        if self.qk_norm and self.position != "rotary":
            raise ConfigError(f"qk_norm needs position rotary; got position {self.position}")

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


@dataclass(frozen=True)
class TrainConfig:
    """Everything about a run but the shape of its model; names as nanoGPT has them.

    Raises: ConfigError, naming the field, the rule and the value.
    """

    out_dir: str | None = _option(None, "run folder; default runs/PRESET-N")
    resume: bool = _option(False, "go on from the last checkpoint of --out_dir, or start")
    data: str = _option(
        "auto",
        "a text file, a prepared folder, tinyshakespeare, pydoc (text inside every Python), or "
        "problems: add (a+b=c), arithmetic; auto: tinyshakespeare where it can be had, else pydoc",
    )
    digits: int = _option(2, "of each number in arithmetic problems", least=1)
    operations: str = _option("+-*/", "of --data arithmetic, some of +-*/")
    worked_steps: bool = _option(False, "problems show how products and quotients come about")
    init_from: str | None = _option(
        None, "fine-tune: start from the weights of this run folder or checkpoint"
    )
    freeze: str = _option("", "not trained: some of embeddings, blocks:N (the first N), head")
    tokenizer: str = _option("char", "char, bytes or gpt2", choices=("char", "bytes", "gpt2"))
    val_fraction: float = _option(
        0.1, "fraction of the text, at its end, held out for validation", above=0, below=1
    )
    vocab_multiple: int = _option(1, "vocabulary rounded up to a multiple of this", least=1)
    model: str = _option(
        "gpt", f"gpt, or of the naive ladder: {', '.join(MODEL_NAMES[1:])}", choices=MODEL_NAMES
    )
    batch_size: int = _option(64, "sequences of one forward and backward", least=1)
    gradient_accumulation_steps: int = _option(1, "batches of one step", least=1)
    max_iters: int = _option(5000, "training steps", least=0)
    optimizer: str = _option(
        "adamw",
        "adamw, sgd, or muon: muon for the matrices of blocks, adamw for the rest",
        choices=("adamw", "sgd", "muon"),
    )
    learning_rate: float = _option(3e-4, "peak learning rate", above=0)
    schedule: str = _option("constant", ", ".join(SCHEDULES), choices=SCHEDULES)
    warmup_iters: int = _option(
        0, "steps of linear warm-up (cyclic and onecycle have their own)", least=0
    )
    lr_decay_iters: int | None = _option(
        None, "step where the schedule ends; default max_iters", least=1
    )
    min_lr: float = _option(
        0.0, "last rate of cosine and wsd, base of cyclic, first of exponential", least=0
    )
    decay_fraction: float = _option(0.2, "wsd: the part of the schedule that falls", above=0)
    cycle_mode: str = _option("triangular", f"cyclic: {', '.join(CYCLES)}", choices=CYCLES)
    step_size_up: int | None = _option(
        None, "cyclic: steps up to the peak; default an eighth of the schedule", least=1
    )
    step_size_down: int | None = _option(
        None, "cyclic: steps down again; default step_size_up", least=1
    )
    cycle_gamma: float = _option(0.9995, "cyclic exp_range: peaks shrink by this a step", above=0)
    pct_start: float = _option(0.3, "onecycle: the part that rises", above=0, below=1)
    div_factor: float = _option(25.0, "onecycle: starts at learning_rate / this", above=0)
    final_div_factor: float = _option(1e4, "onecycle: ends at its start / this", above=0)
    cycle_momentum: bool = _option(
        True, "cyclic, onecycle: sgd's momentum, else beta1, falls as the rate rises"
    )
    base_momentum: float | None = _option(
        None, "lowest cycled momentum; default 0.8, onecycle 0.85", least=0, below=1
    )
    max_momentum: float | None = _option(
        None, "highest cycled momentum; default 0.9, onecycle 0.95", least=0, below=1
    )
    momentum: float = _option(0.9, "sgd's, where it is not cycled", least=0, below=1)
    weight_decay: float = _option(0.01, "weight decay: decoupled, with sgd L2", least=0)
    decay_params: str = _option(
        "matrices", "which parameters decay: matrices or all", choices=("matrices", "all")
    )
    beta1: float = _option(0.9, "AdamW's first moment, Muon's momentum", least=0, below=1)
    beta2: float = _option(0.999, "AdamW's second moment", least=0, below=1)
    grad_clip: float = _option(0.0, "largest norm of the gradient; 0: no limit", least=0)
    on_nonfinite: str = _option(
        "stop",
        "a loss or gradient that is not finite never reaches the weights; then: stop, skip (go "
        "on), or rollback (to the last checkpoint, with half the learning rate)",
        choices=("stop", "skip", "rollback"),
    )
    eval_interval: int = _option(500, "steps between evaluations", least=1)
    eval_mode: str = _option(
        "exact",
        "exact: the whole validation split; sampled: the notebook's estimate",
        choices=("exact", "sampled"),
    )
    eval_tokens: int = _option(
        2**20,
        "exact mode evaluates at most so many validation tokens; of more, windows spread evenly",
        least=1,
    )
    eval_iters: int = _option(
        200, "batches of each sampled loss; in exact mode, of the training loss", least=1
    )
    checkpoint_interval: int | None = _option(
        None, "steps between saves of last/; default eval_interval", least=1
    )
    log_interval: int = _option(10, "steps between train lines of metrics.jsonl", least=1)
    sample_tokens: int = _option(200, "length of the sample shown at evaluations", least=0)
    seed: int = _option(1337, "of initialisation, batches, dropout, samples", least=0, below=2**32)
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = _option(
        "auto",
        "auto (bfloat16 on a GPU, or where a CPU is found faster with it), float32 or bfloat16",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: bool = _option(False, "run the model through torch.compile")
    cuda_graph: bool = _option(
        True, "replay updates: on a GPU from one CUDA graph, on a CPU, if small, as a list of ops"
    )
    parallel: str = _option(
        "auto",
        "between the processes of torchrun: ddp or fsdp; auto: ddp",
        choices=("auto", "ddp", "fsdp"),
    )
    profile: bool = _option(
        False,
        "after some steps print where a step's time goes and the least it could take, draw "
        "roofline.png into the run folder, and train on",
    )
    log: str = _option(
        "none", "metrics also to tensorboard or wandb", choices=("none", "tensorboard", "wandb")
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))
        if self.schedule not in ("constant", "onecycle") and self.min_lr > self.learning_rate:
            raise ConfigError(
                f"min_lr must be at most learning_rate, {self.learning_rate}; got {self.min_lr}"
            )
        if self.cycle_gamma > 1:
            raise ConfigError(
                f"cycle_gamma must be at most 1: peaks shrink; got {self.cycle_gamma}"
            )
        if self.schedule == "exponential" and self.min_lr == 0:
            raise ConfigError("min_lr must be above 0 with --schedule exponential; got 0.0")
        if self.decay_fraction > 1:
            raise ConfigError(f"decay_fraction must be at most 1; got {self.decay_fraction}")

    @property
    def schedule_iters(self) -> int:
        """Steps that the schedule spans."""
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def sequences(self) -> int:
        """Sequences of one step: the global batch."""
        return self.batch_size * self.gradient_accumulation_steps

    def replace(self, **changes) -> "TrainConfig":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


def ignored_by(model: str) -> list[str]:
    """The fields of GPTConfig that say nothing to `model`."""
    above = MODEL_NAMES[: MODEL_NAMES.index(model)]
    return [name for other in above for name in SETTINGS_OF[other]]


def check_model(model: str, config: GPTConfig, given: Container[str] = ()) -> None:
    """Raises: ConfigError if `model` ignores a setting given, or cannot be of that shape."""
    for name in ignored_by(model):
        if name in given:
            raise ConfigError(f"--{name} says nothing to --model {model}; leave --{name} out")
    if model == "gpt" and config.D > LARGEST_HEAD:
        raise ConfigError(
            f"head size must be at most {LARGEST_HEAD} in --model gpt; got {config.D}; give more "
            "--n_head or a smaller --head_size"
        )


def check_field(field: dataclasses.Field, value) -> None:
    """Hold `value` against the type and the rule of `field`."""
    kinds = kinds_of(field)
    if value is None and types.NoneType in kinds:
        return
    numeric = float in kinds and type(value) is int
    if type(value) not in kinds and not numeric:
        raise ConfigError(f"{field.name} must be {kind_name(kinds)}; got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{field.name} must be finite; got {value!r}")
    if value == "" and field.default != "":
        raise ConfigError(f"{field.name} must not be empty; got ''")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{field.name} must not have a null character; got {value!r}")
    rule = field.metadata
    if "choices" in rule and value not in rule["choices"]:
        raise ConfigError(
            f"{field.name} must be one of {', '.join(rule['choices'])}; got {value!r}"
            + suggestion(str(value), rule["choices"])
        )
    for name, holds, words in (
        ("least", lambda a, b: a >= b, "at least"),
        ("above", lambda a, b: a > b, "above"),
        ("below", lambda a, b: a < b, "below"),
    ):
        if name in rule and not holds(value, rule[name]):
            raise ConfigError(f"{field.name} must be {words} {rule[name]}; got {value!r}")


def kinds_of(field: dataclasses.Field) -> tuple[type, ...]:
    """The types that a field's annotation allows, e.g. (int, NoneType)."""
    return typing.get_args(field.type) or (field.type,)


def kind_name(kinds: tuple[type, ...]) -> str:
    """What to call a value of these types in a message to the user."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return next(names[kind] for kind in kinds if kind in names)


def suggestion(word: str, known: Sequence[str]) -> str:
    """ "; did you mean X?" if some known word is near, else nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def to_json(train: TrainConfig, model: GPTConfig, **more) -> str:
    """config.json of a run or checkpoint."""
    content = {"train": dataclasses.asdict(train), "model": dataclasses.asdict(model), **more}
    return json.dumps(content, indent=2) + "\n"


def read_saved(content: Any, where: str) -> tuple[TrainConfig, GPTConfig]:
    """The configurations in a config.json that `to_json` wrote.

    Raises: ConfigError if keys or values are not theirs.
    """
    try:
        parts = content["train"], content["model"]
        train, model = (dict(part) for part in parts)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: config.json must hold train and model") from error
    try:
        return TrainConfig(**train), GPTConfig(**model)
    except TypeError as error:
        raise ConfigError(f"{where}: config.json: {error}") from error
