"""Models from elsewhere and for elsewhere: the notebook, nanoGPT, and GPT-2 of transformers.

    format        read                                   written
    notebook      torch.save(model.state_dict())         the same
    nanogpt       ckpt.pt: model, model_args             -
    transformers  config.json + model.safetensors or     config.json + model.safetensors
                  pytorch_model.bin

Files are read as tensors and plain values only; a pickled model, which could run code, is refused.
Names and shapes are checked before any weight is allocated. Weights arrive as float32.

A format with fewer choices than GPTConfig can still hold many models, because some choices are
others in disguise: a scale of the scores is a factor of the query weights, an absent bias is a
zero one, a narrow head is a wide one padded with zeros, and an output bias b is a bias W^+ b of
the final LayerNorm where W, the head, has full row rank. `_express` does this.
"""

import dataclasses
import json
import os
import re
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from gptcore.attention_interface import use_in_transformers  # noqa: F401
from gptcore.config import ConfigError, GPTConfig, TrainConfig, to_json
from gptcore.files import read_json, write_text
from gptcore.model import GPT
from gptcore.naive import NaiveGPT
from gptcore.tensors import read_pickle, read_tensors, write_tensors

# GPT-2's names for the parts of ours; each is one component of a parameter's name.
_GPT2_NAMES = {
    "token_embedding": "wte",
    "position_embedding": "wpe",
    "blocks": "h",
    "qkv": "attn.c_attn",
    "proj": "attn.c_proj",
    "mlp_in": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
}
_CONV1D = re.compile(r"\.c_\w+\.weight$")  # transformers stores these (in, out)
_WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")  # of torch.compile and DistributedDataParallel
_ACTIVATIONS = {  # of transformers
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_erf",
    "relu": "relu",
    "relu2": "relu2",
}

# ------------------------------------------------------------------------------------- notebook


def load_notebook(path, **overrides) -> GPT:
    """The model of a state dict that the notebook's GPTLanguageModel saved.

    Sizes and biases follow from the tensors; the rest is GPTConfig's defaults, the notebook's.

    Args:
        path: written by torch.save(model.state_dict(), path).
        overrides: fields of GPTConfig, e.g. backend="triton".
    Raises: ConfigError if it is not such a file, or names or shapes do not fit.
    """
    found = _tensors(path, _read_pickle(path))
    embedding = "token_embedding_table.weight"
    V, C = _matrix(path, found, embedding)
    block_size, _ = _matrix(path, found, "position_embedding_table.weight")
    head = "blocks.0.sa.heads.0."
    D, _ = _matrix(path, found, head + "key.weight")
    n_head = _count(found, r"blocks\.0\.sa\.heads\.(\d+)\.")
    config = _config(
        path,
        {
            "vocab_size": V,
            "block_size": block_size,
            "n_layer": _count(found, r"blocks\.(\d+)\."),
            "n_head": n_head,
            "n_embd": C,
            "head_size": None if D == C // n_head else D,
            "qkv_bias": head + "key.bias" in found,
            "bias": "ln_f.bias" in found,
            "head_bias": "lm_head.bias" in found,
        }
        | overrides,
    )
    model = _shapes_of(NaiveGPT, config)
    expected = model.state_dict()
    _check(path, found, expected, optional=[name for name in expected if name.endswith(".tril")])
    if config.tied_head and (found["lm_head.weight"] != found[embedding]).any():
        raise ConfigError(f"{path}: tied_head must be False: lm_head.weight is not {embedding}")
    model = _materialise(model)
    model.load_state_dict(found, strict=False)  # the missing ones are masks, unused below
    with torch.random.fork_rng(devices=[]):  # from_naive initialises before it copies
        return GPT.from_naive(model)


def save_notebook(gpt: GPT, path) -> None:
    """Write a state dict that the notebook's GPTLanguageModel of the same sizes loads.

    Raises: ConfigError if the notebook's model cannot compute what `gpt` does.
    """
    target = gpt.config.replace(
        activation="relu",
        attention_scale="n_embd",
        head_size=None,
        qkv_bias=False,
        bias=True,
        head_bias=True,
        tied_head=False,
    )
    gpt = _express("save_notebook: the notebook's model", gpt, target)
    with torch.random.fork_rng(devices=[]):  # to_naive initialises before it copies
        state = gpt.to_naive().state_dict()
    with open(path, "wb") as file:  # opened here, for open's errors
        torch.save(state, file)


# -------------------------------------------------------------------------------------- nanoGPT


def load_nanogpt(path, **overrides) -> GPT:
    """The model of a checkpoint that nanoGPT's train.py saved; its GELU is the exact one.

    Args:
        path: ckpt.pt, a dictionary with `model` and `model_args`; other entries are ignored.
        overrides: fields of GPTConfig.
    Raises: ConfigError if it is not such a file, or names or shapes do not fit.
    """
    content = _read_pickle(path)
    known = isinstance(content, dict) and {"model", "model_args"} <= content.keys()
    if not known or not isinstance(content["model_args"], dict):
        raise ConfigError(f"{path}: not a checkpoint of nanoGPT, which holds model and model_args")
    found = {
        name.removeprefix("transformer."): tensor
        for name, tensor in _tensors(path, content["model"]).items()
    }
    arguments = content["model_args"]
    needed = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise ConfigError(f"{path}: model_args lacks {', '.join(missing)}")
    bias = bool(arguments.get("bias", True))
    fields = {name: arguments[name] for name in needed} | {
        "dropout": arguments.get("dropout", 0.0),
        "embedding_dropout": True,
        "qkv_bias": bias,
        "bias": bias,
        "head_bias": False,
        "tied_head": _is_tied(found),
        "activation": "gelu_erf",
        "attention_scale": "head_size",
        "init": "gpt2",
    }
    return _from_gpt2(path, _config(path, fields | overrides), found, conv1d=False)


# --------------------------------------------------------------------------------- transformers


def load_transformers(folder, **overrides) -> GPT:
    """The GPT-2 that transformers saved in a folder.

    Dropout is that of the residual branches, resid_pdrop, everywhere; the embedding's is kept as
    on or off.

    Args:
        folder: config.json, and model.safetensors or pytorch_model.bin; with or without a head.
        overrides: fields of GPTConfig.
    Raises: ConfigError if it is no GPT-2, or one that a GPT cannot be.
    """
    folder = Path(folder)
    theirs = read_json(folder / "config.json")
    if not isinstance(theirs, dict) or theirs.get("model_type") != "gpt2":
        got = theirs.get("model_type") if isinstance(theirs, dict) else theirs
        raise ConfigError(f"{folder}: model_type must be gpt2; got {got!r}")
    activation = theirs.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ConfigError(
            f"{folder}: activation_function must be one of {', '.join(_ACTIVATIONS)}; "
            f"got {activation!r}"
        )
    for name, ours in (("layer_norm_epsilon", 1e-5), ("add_cross_attention", False)):
        if theirs.get(name, ours) != ours:
            raise ConfigError(f"{folder}: {name} must be {ours}; got {theirs[name]!r}")
    C = theirs.get("n_embd", 768)
    if type(C) is not int:
        raise ConfigError(f"{folder}: n_embd must be a whole number; got {C!r}")
    if theirs.get("n_inner") not in (None, 4 * C):
        raise ConfigError(f"{folder}: n_inner must be 4 n_embd; got {theirs['n_inner']!r}")
    found = {
        name.removeprefix("transformer."): tensor for name, tensor in _read_weights(folder).items()
    }
    tied = bool(theirs.get("tie_word_embeddings", True))
    if tied:
        found.pop("lm_head.weight", None)
    fields = {
        "vocab_size": theirs.get("vocab_size", 50257),
        "block_size": theirs.get("n_positions", 1024),
        "n_layer": theirs.get("n_layer", 12),
        "n_head": theirs.get("n_head", 12),
        "n_embd": C,
        "dropout": theirs.get("resid_pdrop", 0.1),
        "embedding_dropout": bool(theirs.get("embd_pdrop", 0.1)),
        "qkv_bias": True,
        "bias": True,
        "head_bias": False,
        "tied_head": tied,
        "activation": _ACTIVATIONS[activation],
        "attention_scale": "head_size",
        "init": "gpt2",
    }
    config = _config(folder, fields | overrides)
    gpt = _from_gpt2(folder, config, found, conv1d=True)
    for layer, block in enumerate(gpt.blocks):
        scale = config.D**-0.5 if theirs.get("scale_attn_weights", True) else 1.0
        if theirs.get("scale_attn_by_inverse_layer_idx", False):
            scale /= layer + 1
        _scale_queries(block.qkv, scale / config.scale)
    return gpt


def save_transformers(gpt: GPT, folder) -> None:
    """Write a folder that transformers' GPT2LMHeadModel.from_pretrained loads.

    Raises: ConfigError if GPT-2 cannot compute what `gpt` does.
    """
    where, config = "save_transformers: GPT-2", gpt.config
    if config.n_embd % config.n_head:
        raise ConfigError(
            f"{where} needs n_embd divisible by n_head; got {config.n_embd}, {config.n_head}"
        )
    target = config.replace(
        attention_scale="head_size", head_size=None, qkv_bias=True, bias=True, head_bias=False
    )
    gpt = _express(where, gpt, target)
    tensors = {}
    for name, parameter in gpt.named_parameters():
        name = _gpt2_name(name)
        tensor = parameter.detach().t() if _CONV1D.search(name) else parameter.detach()
        tensors[name if name.startswith("lm_head") else "transformer." + name] = tensor.contiguous()
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    end = 50256 if config.vocab_size > 50256 else None  # GPT-2's <|endoftext|>
    content = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": activations[config.activation],
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout if config.embedding_dropout else 0.0,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "float32",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")


# --------------------------------------------------------------------------------- command line

LOADERS = {"notebook": load_notebook, "nanogpt": load_nanogpt, "transformers": load_transformers}
SAVERS = {"notebook": save_notebook, "transformers": save_transformers}


def import_model(
    path, format: str, run_folder, tokenizer, data: str = "auto", vocab_multiple=1, **overrides
) -> GPT:
    """Read a model and make it the best checkpoint of a new run folder.

    Args:
        path: what the format's loader reads.
        format: a key of LOADERS.
        run_folder: must not exist, or be empty.
        tokenizer: a `gptcore.tokenizer.Tokenizer` for the model's tokens.
        data: recorded as the text that `eval` reads.
        vocab_multiple: what the vocabulary was rounded up to a multiple of; a char tokenizer must
            then have just as many tokens as the model, any other at most as many.
        overrides: fields of GPTConfig.
    Raises: ConfigError.
    """
    from gptcore.checkpoint import Content, Progress, named_weights, write_checkpoint
    from gptcore.data import NAMES

    run_folder = Path(run_folder)
    if run_folder.exists() and (not run_folder.is_dir() or any(run_folder.iterdir())):
        raise ConfigError(f"{run_folder}: already there; give a new folder")
    gpt = _known(LOADERS, format, "import")(path, **overrides)
    train = TrainConfig(
        out_dir=str(run_folder),
        data=data if data in NAMES else str(Path(data).resolve()),
        tokenizer=tokenizer.kind,
        vocab_multiple=vocab_multiple,
    )
    V, rounded = gpt.config.vocab_size, -(-tokenizer.vocab_size // vocab_multiple) * vocab_multiple
    if tokenizer.vocab_size > V or (tokenizer.kind == "char" and rounded != V):
        raise ConfigError(
            f"{path}: the model knows {V} tokens, the tokenizer {tokenizer.vocab_size}; give the "
            "text, or the tokenizer, that it was trained with (and its --vocab_multiple)"
        )
    for name, weight in gpt.named_parameters():
        if not weight.isfinite().all():
            raise ConfigError(f"{path}: weights must be finite; got nan or inf in {name}")
    source = {"imported": {"format": format, "path": str(path)}}
    config_json = to_json(train, gpt.config, **source)
    weights = {name: weight.detach() for name, weight in named_weights(gpt).items()}
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the run folder {run_folder}: {error.strerror}; give another"
        ) from error
    content = Content(weights, {}, Progress(), tokenizer, config_json)
    write_checkpoint(run_folder / "best", content)
    return gpt


def export_model(run, format: str, out) -> None:
    """Write the model of a run folder in another format, whole or not at all.

    Args:
        run: a run folder, or a checkpoint in one.
        format: a key of SAVERS.
        out: what the format's saver writes; must not exist.
    Raises: ConfigError.
    """
    from gptcore.checkpoint import open_checkpoint
    from gptcore.model import build_model

    save, out = _known(SAVERS, format, "export"), Path(out)
    if os.path.lexists(out):
        raise ConfigError(f"{out}: already there; give a new name")
    checkpoint = open_checkpoint(run)
    model = build_model(checkpoint.train.model, checkpoint.model)
    if not isinstance(model, (GPT, NaiveGPT)):
        raise ConfigError(
            f"{run}: only a gpt or naive model can be exported; got a {checkpoint.train.model}"
        )
    checkpoint.load_weights(model)
    gpt = model if isinstance(model, GPT) else GPT.from_naive(model)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as beside:
            save(gpt, Path(beside) / out.name)
            os.rename(Path(beside) / out.name, out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}") from error


def _known(functions, format, verb):
    if format not in functions:
        raise ConfigError(f"cannot {verb} {format!r}; formats: {', '.join(functions)}")
    return functions[format]


# -------------------------------------------------------------------------------------- reading


def _read_pickle(path):
    """What torch.save wrote, if it is tensors and plain values; tensors stay on the disk."""
    try:
        return read_pickle(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder of transformers."""
    if (folder / "model.safetensors").is_file():
        return read_tensors(folder / "model.safetensors")
    if (folder / "pytorch_model.bin").is_file():
        path = folder / "pytorch_model.bin"
        return _tensors(path, _read_pickle(path))
    sharded = " in one file (save_pretrained with max_shard_size='100GB')"
    raise ConfigError(
        f"{folder}: needs model.safetensors or pytorch_model.bin"
        + (sharded if any(folder.glob("*.index.json")) else "")
    )


def _tensors(where, content) -> dict[str, torch.Tensor]:
    """`content` as a state dict, without the prefixes that wrappers add to names."""
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items()
    ):
        raise ConfigError(f"{where}: not a state dict, a dictionary of named tensors")
    return {_WRAPPERS.sub("", name): tensor for name, tensor in content.items()}


def _matrix(where, found, name) -> tuple[int, int]:
    """The shape of the matrix `name`."""
    if name not in found:
        raise ConfigError(f"{where}: lacks {name}")
    if found[name].ndim != 2:
        raise ConfigError(f"{where}: {name} must be a matrix; got {tuple(found[name].shape)}")
    return tuple(found[name].shape)


def _count(found, pattern) -> int:
    """How many numbers `pattern` finds in the names."""
    return len({match[1] for name in found if (match := re.match(pattern, name))})


def _config(where, fields) -> GPTConfig:
    """GPTConfig of the fields; what it refuses is blamed on `where`."""
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise ConfigError(f"{where}: GPTConfig has no field {', '.join(unknown)}")
    try:
        return GPTConfig(**fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check(where, found, expected, optional=()):
    """Raises: ConfigError unless `found` has the names and shapes of `expected`."""
    problems = {
        "lacks": sorted(expected.keys() - found.keys() - set(optional)),
        "has unknown": sorted(found.keys() - expected.keys()),
        "has another shape:": [
            f"{name} {tuple(tensor.shape)}, must be {tuple(expected[name].shape)}"
            for name, tensor in found.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
    }
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(f"{where}: {problem} {', '.join(names[:3])}{more}")


class _ShapesOnly(TorchFunctionMode):
    """Within it these functions return their argument; on meta tensors they import the compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.nn.init.normal_, torch.Tensor.normal_, torch.tril):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def _shapes_of(kind, config):
    """A model on the meta device: names and shapes, no weights."""
    with torch.device("meta"), _ShapesOnly():
        return kind(config)


def _materialise(model):
    """A model made on the meta device, its weights allocated but not initialised."""
    model = model.to_empty(device="cpu")
    if model.config.tied_head:
        embedding = model.token_embedding if isinstance(model, GPT) else model.token_embedding_table
        model.lm_head.weight = embedding.weight
    return model


def _gpt2_name(name: str) -> str:
    """GPT-2's name of one of our parameters, without `transformer.`."""
    return ".".join(_GPT2_NAMES.get(part, part) for part in name.split("."))


def _is_tied(found) -> bool:
    """Whether the head is the token embedding, or absent, which means the same."""
    head = found.get("lm_head.weight")
    return head is None or ("wte.weight" in found and torch.equal(head, found["wte.weight"]))


def _from_gpt2(where, config, found, *, conv1d) -> GPT:
    """A GPT from tensors under GPT-2's names, `transformer.` removed."""
    mask = re.compile(r"h\.\d+\.attn\.(masked_)?bias$")
    found = {name: tensor for name, tensor in found.items() if not mask.match(name)}
    if config.tied_head and _is_tied(found):
        found.pop("lm_head.weight", None)
    # Before the meta model, whose size these bound.
    layers = _count(found, r"h\.(\d+)\.")
    wte, wpe = _matrix(where, found, "wte.weight"), _matrix(where, found, "wpe.weight")
    sizes = {
        "vocab_size": wte[0],
        "block_size": wpe[0],
        "n_embd": wte[1],
        "n_layer": layers,
    }
    for name, size in sizes.items():
        if getattr(config, name) != size:
            raise ConfigError(
                f"{where}: {name} must be {size}, as the tensors have it; "
                f"got {getattr(config, name)}"
            )
    gpt = _shapes_of(GPT, config)
    expected = {}
    for name, parameter in gpt.named_parameters():
        name = _gpt2_name(name)
        expected[name] = parameter.t() if conv1d and _CONV1D.search(name) else parameter
    _check(where, found, expected)
    gpt = _materialise(gpt)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            name = _gpt2_name(name)
            tensor = found[name]
            parameter.copy_(tensor.t() if conv1d and _CONV1D.search(name) else tensor)
    return gpt


# -------------------------------------------------------------------------------------- writing


@torch.no_grad()
def _scale_queries(qkv, factor: float):
    """Multiply the scores' scale by `factor`; qkv is (3 H D, C) with rows (3, H, D)."""
    for parameter in qkv.parameters():
        parameter[: len(parameter) // 3] *= factor


@torch.no_grad()
def _express(where: str, gpt: GPT, target: GPTConfig) -> GPT:
    """A model of configuration `target`, on the CPU, that computes what `gpt` does.

    It is float32, or float64 as `gpt` is.

    Raises: ConfigError, beginning with `where`, if there is none.
    """
    source = gpt.config
    if source.position != "learned":
        raise ConfigError(f"{where} has learned positions; got position {source.position}")
    if source.token_shift:
        raise ConfigError(f"{where} has no token_shift; got token_shift True")
    if target.activation != source.activation:
        raise ConfigError(f"{where} has activation {target.activation}; got {source.activation}")
    if target.D < source.D:
        raise ConfigError(f"{where} has head_size {target.D}; got {source.D}")
    dtype = torch.promote_types(gpt.lm_head.weight.dtype, torch.float32)
    weights = {
        name: parameter.detach().to("cpu", dtype, copy=True)
        for name, parameter in gpt.named_parameters(remove_duplicate=False)
    }
    result = _shapes_of(GPT, target)
    heads, wider = (3, source.n_head, source.D), target.D - source.D
    for name, weight in weights.items():
        if ".qkv." in name:  # (3 H D, ...)
            weight = weight.unflatten(0, heads)
            weight[0] *= source.scale / target.scale
            pad = (0,) * (2 * (weight.ndim - 3)) + (0, wider)
            weights[name] = F.pad(weight, pad).flatten(0, 2)
        elif name.endswith(".proj.weight"):  # (C, H D)
            weights[name] = F.pad(weight.unflatten(1, heads[1:]), (0, wider)).flatten(1)
    for name, parameter in result.named_parameters(remove_duplicate=False):
        if name not in weights:
            weights[name] = torch.zeros(parameter.shape, dtype=dtype)
    if "lm_head.bias" in weights and not target.head_bias:
        _fold_head_bias(where, weights)
    for name in weights.keys() - dict(result.named_parameters(remove_duplicate=False)).keys():
        if weights.pop(name).any():
            raise ConfigError(f"{where} has no {name}; got one that is not zero")
    result = _materialise(result).to(dtype)
    result.load_state_dict(weights)
    return result.train(gpt.training)


def _fold_head_bias(where, weights):
    """Move lm_head.bias into ln_f.bias: W (y + W^+ b) = W y + b if b is in the range of W."""
    bias, W = weights.pop("lm_head.bias").double(), weights["lm_head.weight"].double()
    before = weights["ln_f.bias"]
    shift = torch.linalg.lstsq(W, bias[:, None], driver="gelsd").solution[:, 0]
    weights["ln_f.bias"] = (before + shift).to(before.dtype)
    missed = W @ (weights["ln_f.bias"] - before.double()) - bias
    if missed.abs().max() > 1e-5 * bias.abs().max():
        raise ConfigError(
            f"{where} has no output bias, and this one cannot be folded into ln_f.bias "
            f"(vocab_size {len(W)}, n_embd {W.shape[1]}); train with --head_bias false"
        )
