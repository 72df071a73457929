"""Settings: defaults < preset < TOML < flags; what is wrong is said in one line."""

import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptcore.__main__ import main
from gptcore.config import (
    LARGEST_HEAD,
    MODEL_NAMES,
    SETTINGS_OF,
    ConfigError,
    GPTConfig,
    check_model,
    ignored_by,
    kinds_of,
    read_saved,
    to_json,
)
from gptcore.flags import FIELDS, Parser, parse_settings
from gptcore.presets import PRESETS

ROOT = Path(__file__).parents[2]


def settings(*argv, device="cpu"):
    """(TrainConfig, GPTConfig) of a command line."""
    train, model = parse_settings(list(argv)).merged(device)
    return train, GPTConfig(**model)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_fields_and_pass_validation(preset):
    assert PRESETS[preset].keys() <= FIELDS.keys()
    settings("--preset", preset)


def test_the_default_preset_depends_on_the_device():
    assert settings(device="cuda") == settings("--preset", "notebook")
    assert settings(device="cpu") == settings("--preset", "cpu")
    assert settings(device="cuda") != settings(device="cpu")


def test_notebook_preset_is_the_notebook():
    train, model = settings("--preset=notebook")
    assert (model.n_embd, model.n_head, model.n_layer, model.block_size) == (384, 6, 6, 256)
    assert (model.dropout, model.scale, model.activation) == (0.2, 384**-0.5, "relu")
    assert (train.batch_size, train.learning_rate, train.max_iters) == (64, 3e-4, 5000)
    # torch.optim.AdamW(model.parameters(), lr): its defaults, on every parameter
    assert (train.beta1, train.beta2, train.weight_decay) == (0.9, 0.999, 0.01)
    assert (train.decay_params, train.grad_clip, train.schedule) == ("all", 0.0, "constant")


def all_settings(*argv):
    """Every setting of a command line, in one dictionary."""
    train, model = settings(*argv)
    return dataclasses.asdict(train) | dataclasses.asdict(model)


BABY = dict(max_iters=10_000, eval_interval=500, dropout=0.2)
CHAR = dict(
    **dict(batch_size=64, gradient_accumulation_steps=1, block_size=256, n_layer=6, n_head=6),
    **dict(n_embd=384, dropout=0.2, bias=False, qkv_bias=False, head_bias=False, tied_head=True),
    **dict(embedding_dropout=True, attention_scale="head_size", activation="gelu", init="gpt2"),
    **dict(learning_rate=1e-3, min_lr=1e-4, schedule="cosine", max_iters=5000, warmup_iters=100),
    **dict(lr_decay_iters=None, beta1=0.9, beta2=0.99, weight_decay=0.1, decay_params="matrices"),
    **dict(grad_clip=1.0, eval_interval=250, eval_iters=200, log_interval=10),
)
FAST = dict(
    **dict(optimizer="muon", init="zero", position="rotary", token_shift=True, schedule="wsd"),
    **dict(decay_fraction=1.0, min_lr=0.0),
)
LARGE = FAST | dict(
    **dict(batch_size=64, block_size=256, n_layer=6, n_head=6, n_embd=384, qk_norm=True),
    **dict(tied_head=True, bias=False, qkv_bias=False, head_bias=False, learning_rate=0.015),
)
PUBLISHED = {
    # the second seed's table
    "baby-cpu": BABY
    | dict(batch_size=16, block_size=8, n_embd=16, head_size=4, n_layer=2, n_head=2)
    | dict(learning_rate=5e-3, eval_iters=100),
    "baby-gpu": BABY
    | dict(batch_size=64, block_size=256, n_embd=512, head_size=16, n_layer=6, n_head=6)
    | dict(learning_rate=1e-3, eval_iters=200),
    # nanoGPT's config/train_shakespeare_char.py, its README's on a macbook, config/train_gpt2.py
    "nanogpt-char": CHAR,
    "nanogpt-cpu": CHAR
    | dict(batch_size=12, block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0)
    | dict(max_iters=2000, eval_iters=20),
    "gpt2-124m": CHAR
    | dict(batch_size=12, gradient_accumulation_steps=40, block_size=1024, n_layer=12, n_head=12)
    | dict(n_embd=768, dropout=0.0, bias=True, qkv_bias=True, learning_rate=6e-4, min_lr=6e-5)
    | dict(max_iters=600_000, warmup_iters=2000, beta2=0.95, eval_interval=1000),
    # what README's losses and times were measured with
    "speedrun": LARGE | dict(max_iters=300, warmup_iters=30, dropout=0.1, weight_decay=0.8),
    "best": LARGE | dict(max_iters=1000, warmup_iters=50, dropout=0.2, weight_decay=0.4),
    "speedrun-cpu": FAST
    | dict(batch_size=8, block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0)
    | dict(max_iters=350, warmup_iters=20, learning_rate=0.02),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_what_was_published(preset):
    found = all_settings(f"--preset={preset}")
    assert {name: found[name] for name in PUBLISHED[preset]} == PUBLISHED[preset]


@pytest.mark.parametrize("preset", ["speedrun", "speedrun-cpu", "best", "cpu"])
def test_tuned_presets_evaluate_on_a_part_of_the_training_split(preset):
    """Of Tiny Shakespeare's million tokens at most a third, or evaluation costs more than steps."""
    train, model = settings(f"--preset={preset}")
    assert train.eval_iters * train.batch_size * model.block_size < 1e6 / 3


def test_gpt2_preset_pads_the_vocabulary_to_50304():
    train, model = settings("--preset=gpt2-124m")
    assert math.ceil(50257 / train.vocab_multiple) * train.vocab_multiple == 50304
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (12, 12, 768, 1024)
    assert model.bias and model.qkv_bias and model.tied_head and not model.head_bias


def test_flags_beat_file_beats_preset(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('preset = "baby-cpu"\nbatch-size = 5\nn_embd = 24\ndropout = 0\n')
    train, model = settings("--config", str(file), "--n-embd=32", "--max_iters", "7")
    assert (train.batch_size, model.n_embd, train.max_iters) == (5, 32, 7)  # file, flag, flag
    assert (model.head_size, model.dropout) == (4, 0)  # preset, file
    train, model = settings("--config", str(file), "--preset", "notebook")
    assert (train.learning_rate, train.batch_size) == (3e-4, 5)


def another(field):
    """A value that is not the default."""
    kinds, default = kinds_of(field), field.default
    if bool in kinds:
        return not default
    if int in kinds:
        return (default or 1) + 1
    if float in kinds:
        return (default or 1.0) / 2
    return next(x for x in field.metadata.get("choices", ["another"]) if x != default)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_a_flag_with_help(name):
    assert FIELDS[name].metadata["help"]
    value = another(FIELDS[name])
    needed = ["--position=rotary"] * (name == "qk_norm")
    for flag in (name, name.replace("_", "-")):
        found = all_settings("--preset=notebook", *needed, f"--{flag}", str(value))
        assert found[name] == value


@pytest.mark.parametrize(
    ("flags", "value"), [(["--bias"], True), (["--bias=false"], False), (["--bias", "0"], False)]
)
def test_booleans(flags, value):
    assert parse_settings(flags).given == {"bias": value}


@pytest.mark.parametrize("value", ["--My-lord, I-will", "--My-lord, I=no", "--né-é", "-a-b"])
def test_a_value_stays_as_it_is(value):
    """A text to continue may begin as a flag does."""
    parser = Parser()
    parser.add_argument("--to_continue")
    assert parser.parse_args([f"--to-continue={value}"]).to_continue == value
    if " " in value:
        assert parser.parse_args(["--to-continue", value]).to_continue == value


def test_none_and_numbers_are_read_as_their_type():
    given = parse_settings(["--head_size=none", "--dropout", "0", "--learning_rate=1e-3"]).given
    assert given == {"head_size": None, "dropout": 0.0, "learning_rate": 1e-3}


def test_model_names_are_those_that_can_be_built():
    from gptcore.model import MODELS

    assert set(MODEL_NAMES) == set(MODELS)


CHANGED = {  # from the settings of `built`; block_size and backend change nothing it looks at
    **{"vocab_size": 6, "n_layer": 3, "n_head": 1, "n_embd": 16, "head_size": 6, "dropout": 0.5},
    **{"embedding_dropout": True, "qkv_bias": True, "bias": False, "head_bias": False},
    **{"tied_head": True, "activation": "gelu", "attention_scale": "head_size"},
    **{"position": "learned", "qk_norm": True, "token_shift": True, "init": "zero"},
    **{"init_std": 0.5},
}


def built(model, **changes):
    """Weights, and the logits while training, of a small model drawn from a fixed seed."""
    import torch

    from gptcore.model import build_model
    from kernels.rng import make_key

    fields = {"vocab_size": 5, "block_size": 4, "n_layer": 2, "n_head": 2, "n_embd": 8}
    fields |= {"position": "rotary", "init": "gpt2", "dropout": 0.2}
    torch.manual_seed(0)
    module = build_model(model, GPTConfig(**fields | changes)).train()
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.1 * torch.randn(weight.shape)
        logits, _ = module(torch.tensor([[0, 1, 2, 3], [4, 0, 2, 1]]), key=make_key(1, 2))
    return [*module.state_dict().items(), ("logits", logits)]


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("model", MODEL_NAMES)
def test_a_model_ignores_just_what_it_is_said_to(model, name):
    plain, changed = built(model), built(model, **{name: CHANGED[name]})
    same = [a[0] == b[0] and a[1].equal(b[1]) for a, b in zip(plain, changed, strict=False)]
    assert (all(same) and len(plain) == len(changed)) == (name in ignored_by(model))


def test_every_setting_belongs_to_one_rung():
    names = [name for names in SETTINGS_OF.values() for name in names]
    assert sorted(names) == sorted(GPTConfig.__dataclass_fields__)


def test_heads_are_as_large_as_the_fused_attention_takes_them():
    from kernels.attention import MAX_HEAD_DIM

    assert LARGEST_HEAD == MAX_HEAD_DIM
    settings("--preset=notebook", "--n_embd=256", "--n_head=1")
    for model in MODEL_NAMES[1:]:  # the naive ones are not fused
        check_model(model, GPTConfig(n_head=1))
    settings("--preset=notebook", "--model=head", "--n_head=1")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n_heads=4"], "unknown flag --n_heads; did you mean --n_head?"),
        (["--lerning-rate", "1"], "unknown flag --lerning_rate; did you mean --learning_rate?"),
        (["--zzz"], "unknown flag --zzz; see train.py --help"),
        (["notebok"], "unknown argument notebok"),
        (["--preset=notebok"], "unknown preset 'notebok'; did you mean notebook?"),
        (["--preset=xyz"], "unknown preset 'xyz'; presets: auto, notebook"),
        (["--n_head=0"], "n_head must be at least 1; got 0"),
        (["--optimizer=muom"], "optimizer must be one of adamw, sgd, muon; got 'muom'; did you"),
        (["--init=zro"], "init must be one of notebook, gpt2, zero; got 'zro'; did you mean zero?"),
        (["--preset=notebook", "--qk_norm"], "qk_norm needs position rotary"),
        (["--position=rotary", "--head_size=3"], "rotary needs an even head size"),
        (
            ["--preset=notebook", "--n_head=1"],
            "at most 256 in --model gpt; got 384; give more --n_h",
        ),
        (["--head_size=258"], "head size must be at most 256 in --model gpt; got 258"),
        (["--model=multihead", "--tied_head"], "--tied_head says nothing to --model multihead; le"),
        (["--model=multihead", "--init=gpt2"], "--init says nothing to --model multihead; leave"),
        (["--preset=bigram", "--dropout=0.5"], "--dropout says nothing to --model bigram; leave"),
        (["--model=naive", "--backend=eager"], "--backend says nothing to --model naive; leave"),
        (["--n_head=six"], "argument --n_head: must be a whole number; got 'six'"),
        (["--n_head=6.5"], "argument --n_head: must be a whole number; got '6.5'"),
        (["--bias=maybe"], "argument --bias: must be true or false; got 'maybe'"),
        (["--n_head"], "argument --n_head: expected one argument"),
        (["--block_size=0"], "block_size must be at least 1; got 0"),
        (["--dropout=1.5"], "dropout must be below 0.99999; got 1.5"),
        (["--dropout=0.999999"], "dropout must be below 0.99999; got 0.999999"),
        (["--dropout=nan"], "dropout must be finite; got nan"),
        (["--cycle_gamma=1.05"], "cycle_gamma must be at most 1: peaks shrink; got 1.05"),
        (["--out_dir=a\0b"], "out_dir must not have a null character; got 'a\\x00b'"),
        (["--n_embd=4", "--n_head=8"], "n_embd // n_head must be at least 1"),
        (["--learning_rate=0"], "learning_rate must be above 0; got 0.0"),
        (["--learning_rate=inf"], "learning_rate must be finite; got inf"),
        (["--batch_size=-1"], "batch_size must be at least 1; got -1"),
        (["--val_fraction=1"], "val_fraction must be below 1; got 1.0"),
        (["--seed=4294967296"], "seed must be below 4294967296; got 4294967296"),
        (["--schedule=cosin"], "got 'cosin'; did you mean cosine?"),
        (["--model=gtp"], "got 'gtp'; did you mean gpt?"),
        (["--activation=tanh"], "activation must be one of relu, gelu, "),
        pytest.param(
            ["--config=/dev/zero"],
            "--config /dev/zero is not TOML",
            marks=pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero"),
        ),
        (["--config=/nowhere/x.toml"], "cannot read --config /nowhere/x.toml: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(argv, message):
    with pytest.raises(ConfigError) as error:
        settings(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('device = ["cpu"]', "device must be text; got ['cpu']"),
        ("out_dir = 5", "out_dir must be text; got 5"),
        ('resume = "no"', "resume must be true or false; got 'no'"),
    ],
)
def test_a_file_is_held_to_the_types_before_anything_reads_it(line, message, tmp_path, capsys):
    (tmp_path / "my.toml").write_text(line + "\n")
    config = f"--config={tmp_path / 'my.toml'}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings(config)
    assert main(["sweep", "--grid=n_embd=16,32", config]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_head": 6.0}, "n_head must be a whole number; got 6.0"),
        ({"head_size": 2.5}, "head_size must be a whole number; got 2.5"),
        ({"head_size": True}, "head_size must be a whole number; got True"),
        ({"dropout": "0.2"}, "dropout must be a number; got '0.2'"),
        ({"init_std": None}, "init_std must be a number; got None"),
        ({"bias": "no"}, "bias must be true or false; got 'no'"),
        ({"activation": ["relu"]}, "activation must be text; got ['relu']"),
        ({"init_std": math.inf}, "init_std must be finite; got inf"),
        ({"head_size": 0}, "head_size must be at least 1; got 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_model_fields(fields, message):
    for make in (GPTConfig, GPTConfig().replace):
        with pytest.raises(ConfigError) as error:
            make(**fields)
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"n_head = ", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (b"n_heads = 4", "unknown key 'n_heads'"),
        (b"n_head = '4'", "n_head must be a whole number; got '4'"),
        (b"bias = 1", "bias must be true or false; got 1"),
        (b"batch_size = 1.5", "batch_size must be a whole number; got 1.5"),
        (b"batch_size = true", "batch_size must be a whole number; got True"),
        (b"[n_head]\nx = 1", "n_head must be a whole number; got {'x': 1}"),
        (b"preset = 3", "unknown preset 3"),
        (b"vocab_size = 3", "unknown key 'vocab_size'"),
        (b"n-head = 4\nn_head = 2", "has n-head twice, once with _; leave one out"),
    ],
)
def test_bad_toml(tmp_path, content, message):
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="^[^\n]*$") as error:
        settings("--config", str(file))
    assert message in str(error.value)


def test_saved_configurations_come_back():
    train, model = settings("--preset=gpt2-124m")
    import json

    assert read_saved(json.loads(to_json(train, model)), "here") == (train, model)


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"train": 1, "model": 2},
        {"train": {}, "model": {"n_head": "6"}},
        {"train": {"colour": 1}, "model": {}},
        {"train": {}, "model": {"n_head": -1}},
    ],
)
def test_foreign_saved_configurations_are_refused(content):
    with pytest.raises(ConfigError):
        read_saved(content, "here")


def test_help_imports_no_torch():
    for command in (["train.py", "--help"], ["-m", "gptcore", "--help"], ["train.py", "--typo"]):
        code = (
            "import sys, runpy; sys.argv = sys.argv[1:]\n"
            "def end():\n    print('torch' in sys.modules)\n"
            "import atexit; atexit.register(end)\n"
            "name = sys.argv[0]\n"
            "if name == '-m':\n"
            "    sys.argv = sys.argv[1:]; runpy.run_module('gptcore', run_name='__main__')\n"
            "else:\n    runpy.run_path(name, run_name='__main__')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "False"
        assert done.returncode == (2 if "--typo" in command else 0)
        assert "Traceback" not in done.stderr
