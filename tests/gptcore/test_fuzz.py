"""Damaged and malicious files: one line that says so, and nothing else.

Each case is a good file, damaged by a random number generator seeded with the name of the test, so
that a failure can be had again. What a loader may do with it: read it after all, or raise
ConfigError or RunError of one line. It may not run code, crash, hang, or allocate more than GiB
beyond what the process holds; a limit on the address space makes the last one an error.
"""

import contextlib
import json
import os
import pickle
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.checkpoint import (
    FILES,
    FORMAT,
    Content,
    Progress,
    named_weights,
    open_checkpoint,
    optimizer_tensors,
    write_checkpoint,
)
from gptcore.config import ConfigError, GPTConfig, RunError, TrainConfig, to_json
from gptcore.data import Corpus, load_data
from gptcore.files import fingerprint
from gptcore.flags import parse_settings
from gptcore.interop import load_nanogpt, load_notebook, load_transformers, save_transformers
from gptcore.log import read_metrics, trim_metrics
from gptcore.model import build_model
from gptcore.optim import make_optimizer
from gptcore.prepare import open_prepared, prepare_folder
from gptcore.tokenizer import BytesTokenizer, CharTokenizer, from_state

resource = pytest.importorskip("resource")
CASES, MANY = 200, 2000  # a loader
SPARE_BYTES = 1 << 30
SHAPE = GPTConfig(vocab_size=9, block_size=4, n_layer=1, n_head=2, n_embd=4, tied_head=False)
TOKENIZER = CharTokenizer("\n abcdefg")


# ---- damage ----------------------------------------------------------------------------------

BYTES = (b"", b"\0", b"\xff\xfe", b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 5000, b"[" * 200_000)
BYTES += (
    b'{"a":' * 100_000,
    b"null",
    b'"',
    b"\r\n",
    b"\xed\xa0\x80",
    b"2147483648",
    b"0.5",
    b"true",
)
VALUES = (None, True, False, 0, -1, 1, 2**31, 2**63, 10**9, 10**400, 0.5, -0.0, 1e308, float("nan"))
VALUES += (float("inf"), "", "x", "\0", "\ud800", "9" * 9, "../..", [], {}, [[]], ["x"], {"x": 1})


def deep(depth=100_000):
    return "[" * depth + "]" * depth


def damaged_bytes(dice: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """`content` with one kind of damage, and now and then a second one."""
    content = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 2))):
        kind = dice.randrange(9)
        a, b = sorted(dice.randrange(len(content) + 1) for _ in range(2))
        if kind <= 1 and content:
            for _ in range(dice.choice((1, 1, 2, 8, 64))):
                content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        elif kind == 2:
            del content[a:]
        elif kind == 3:
            del content[a:b]
        elif kind == 4:
            content[a:a] = content[a:b]
        elif kind == 5:
            content[a : a + dice.choice((0, 1, 4, 8))] = dice.choice(BYTES)
        elif kind == 6:
            other = dice.choice(others)
            content[a:b] = other[: dice.randrange(len(other) + 1)]
        elif kind == 7:  # lengths of headers and archives
            width, value = dice.choice((2, 4, 8)), dice.choice((0, 1, 2**15, 2**31 - 1, 2**63 - 1))
            at = dice.choice((0, a, max(0, len(content) - 30)))
            content[at : at + width] = (value & (256**width - 1)).to_bytes(width, "little")
        else:
            content[a:b] = dice.randbytes(min(64, b - a))
    return bytes(content)


def damaged_json(dice: random.Random, content: Any) -> Any:
    """`content` with one value replaced, removed, added or renamed, at any depth."""
    if not isinstance(content, (dict, list)) or not content or dice.random() < 0.1:
        return dice.choice(VALUES)
    content = dict(content) if isinstance(content, dict) else list(content)
    key = dice.choice(list(content) if isinstance(content, dict) else range(len(content)))
    kind = dice.randrange(10)
    if kind == 0:
        del content[key]
    elif kind == 1 and isinstance(content, dict):
        content[dice.choice(("x", "", "__class__", key.upper()))] = content.pop(key)
    elif kind == 2 and isinstance(content, dict):
        content["more"] = dice.choice(VALUES)
    else:
        content[key] = damaged_json(dice, content[key])
    return content


def damage(dice: random.Random, path: Path, others: list[bytes]) -> None:
    """Damage a file where it lies, by its bytes or, if it is JSON, by its values."""
    content = path.read_bytes()
    if path.suffix == ".json" and dice.random() < 0.6:
        text = json.dumps(damaged_json(dice, json.loads(content)))
        if dice.random() < 0.03:
            text = text.replace("1", deep(), 1)
        path.write_text(text)
    elif path.suffix == ".safetensors" and dice.random() < 0.4:
        length = int.from_bytes(content[:8], "little")
        header = json.dumps(damaged_json(dice, json.loads(content[8 : 8 + length]))).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    else:
        path.write_bytes(damaged_bytes(dice, content, others))


# ---- what is loaded --------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A folder of good files, and what is done with it when one of them is damaged."""

    make: Any  # folder -> None
    load: Any  # folder -> anything
    repair: Any = None  # folder -> None: makes the damage pass the first check


def make_checkpoint(folder, shape=SHAPE):
    torch.manual_seed(0)
    model = build_model("gpt", shape)
    optimizer = make_optimizer(model, TrainConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    config_json = to_json(TrainConfig(), shape, preset="notebook")
    optimizer = optimizer_tensors(model, optimizer)
    weights = {name: weight.detach() for name, weight in named_weights(model).items()}
    content = Content(weights, optimizer, Progress(), TOKENIZER, config_json)
    write_checkpoint(folder / "last", content)


def make_rotary(folder):
    make_checkpoint(folder, SHAPE.replace(position="rotary", token_shift=True))


def load_checkpoint(folder):
    found = open_checkpoint(folder)
    model = build_model(found.train.model, found.model)
    found.load_weights(model)
    found.load_optimizer(model, make_optimizer(model, found.train))
    found.tokenizer.decode(range(found.tokenizer.vocab_size))


def agree(folder):
    """A manifest that agrees with files exchanged on purpose."""
    with contextlib.suppress(OSError):
        files = {name: fingerprint(folder / "last" / name) for name in FILES}
        manifest = {"format": FORMAT, "files": files}
        (folder / "last" / "manifest.json").write_text(json.dumps(manifest))


def make_toml(folder):
    lines = ("preset = 'cpu'", "n_embd = 64", "learning_rate = 1e-3", "bias = true", "data = 'x'")
    (folder / "settings.toml").write_text("# settings\n" + "\n".join(lines) + "\n")


def load_toml(folder):
    parse_settings([f"--config={folder / 'settings.toml'}"]).merged()


def make_text(folder):
    (folder / "text.txt").write_text("a cab faced a bag a bee fed\n" * 20, encoding="utf-8")


def load_text(folder):
    text = load_data(str(folder / "text.txt"))
    Corpus.build(text, text.tokenizer("char")).check_block(8)
    Corpus.build(text, BytesTokenizer()).check_block(8)
    Corpus.build(text, TOKENIZER).check_block(8)


def make_prompt(folder):
    (folder / "prompt").write_text("\na bad cab\n")


def load_prompt(folder):
    prompt = os.fsdecode((folder / "prompt").read_bytes())  # as a shell hands it over
    BytesTokenizer().decode(BytesTokenizer().encode(prompt))
    for text in (prompt, TOKENIZER.decode([3, 4, 5]) + prompt):
        TOKENIZER.decode(TOKENIZER.encode(text))


def make_tokenizer(folder):
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER.state()))


def load_tokenizer(folder):
    from gptcore.files import read_json

    tokenizer = from_state(read_json(folder / "tokenizer.json"))
    tokenizer.decode(tokenizer.encode("abc"))


def make_prepared(folder):
    make_text(folder)
    prepare_folder([str(folder / "text.txt")], [], folder / "tokens", "char")
    (folder / "text.txt").unlink()


def load_prepared(folder):
    prepared = open_prepared(str(folder / "tokens"))
    corpus = Corpus.build(prepared, prepared.tokenizer(prepared.vocabulary.kind))
    corpus.check_block(8)


def make_notebook(folder):
    torch.manual_seed(0)
    torch.save(build_model("naive", SHAPE).state_dict(), folder / "model.pth")


def make_old_notebook(folder):
    torch.manual_seed(0)
    state = build_model("naive", SHAPE).state_dict()
    torch.save(state, folder / "model.pth", _use_new_zipfile_serialization=False)


def make_nanogpt(folder):
    torch.manual_seed(0)
    arguments = {"block_size": 4, "vocab_size": 9, "n_layer": 1, "n_head": 2, "n_embd": 4}
    theirs = {}
    shape = SHAPE.replace(bias=False, head_bias=False, tied_head=True, activation="gelu_erf")
    from gptcore.interop import _GPT2_NAMES

    for name, weight in build_model("gpt", shape).named_parameters():
        name = ".".join(_GPT2_NAMES.get(part, part) for part in name.split("."))
        theirs[f"transformer.{name}"] = weight.detach()
    content = {"model": theirs, "model_args": {**arguments, "bias": False, "dropout": 0.0}}
    torch.save(content, folder / "ckpt.pt")


def make_transformers(folder):
    torch.manual_seed(0)
    shape = SHAPE.replace(attention_scale="head_size", tied_head=True, activation="gelu")
    save_transformers(build_model("gpt", shape.replace(head_bias=False, qkv_bias=True)), folder)


def make_metrics(folder):
    records = [{"kind": "train", "step": step, "loss": 1.5} for step in range(5)]
    records += [{"kind": "eval", "step": 4, "val_loss": 1.5}, {"kind": "end", "step": 5}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)


def load_metrics(folder):
    read_metrics(folder / "metrics.jsonl")
    trim_metrics(folder / "metrics.jsonl", 3, 0)


CASES_OF = {
    "checkpoint": Case(make_checkpoint, load_checkpoint),
    "exchanged": Case(make_checkpoint, load_checkpoint, agree),
    "exchanged, rotary": Case(make_rotary, load_checkpoint, agree),
    "toml": Case(make_toml, load_toml),
    "text": Case(make_text, load_text),
    "prompt": Case(make_prompt, load_prompt),
    "tokenizer": Case(make_tokenizer, load_tokenizer),
    "prepared": Case(make_prepared, load_prepared),
    "notebook": Case(make_notebook, lambda folder: load_notebook(folder / "model.pth")),
    "notebook of old": Case(make_old_notebook, lambda folder: load_notebook(folder / "model.pth")),
    "nanogpt": Case(make_nanogpt, lambda folder: load_nanogpt(folder / "ckpt.pt")),
    "transformers": Case(make_transformers, load_transformers),
    "metrics": Case(make_metrics, load_metrics),
}


@pytest.fixture
def little_memory():
    """SPARE_BYTES more than the process holds now, and no more."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + SPARE_BYTES, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limit)


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
@pytest.mark.parametrize("number", [CASES, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES_OF)
def test_only_clean_errors(tmp_path, little_memory, name, number):
    case = CASES_OF[name]
    good, folder, trace = tmp_path / "good", tmp_path / "damaged", tmp_path / "code ran"
    good.mkdir()
    case.make(good)
    shutil.copytree(good, folder)
    case.load(folder)  # undamaged, it loads
    others = [path.read_bytes() for path in files_in(good)] + [pickle.dumps(Bomb(trace))]
    loaded = 0
    for round in range(number):
        dice = random.Random(f"{name} {round}")
        shutil.rmtree(folder)
        shutil.copytree(good, folder)
        damage(dice, dice.choice(files_in(folder)), others)
        if case.repair and dice.random() < 0.9:
            case.repair(folder)
        try:
            case.load(folder)
            loaded += 1
        except (ConfigError, RunError) as error:
            assert "\n" not in str(error) and len(str(error)) < 3000, f"{name} {round}"
        except BaseException as error:
            raise AssertionError(f"{name} {round}: {type(error).__name__}: {error}") from error
    print(f"\n{name}: {number} damaged, {loaded} loaded all the same")
    assert not trace.exists()
    assert loaded < number or name == "metrics"  # whose broken lines are left out


class Bomb:
    """Makes a folder when unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))
