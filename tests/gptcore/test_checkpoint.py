"""A checkpoint is whole or not there, and says in one line what is wrong with it."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptcore import checkpoint as checkpoints
from gptcore.checkpoint import named_weights, open_checkpoint, save_checkpoint
from gptcore.config import ConfigError, GPTConfig, TrainConfig, to_json
from gptcore.model import build_model
from gptcore.tokenizer import CharTokenizer

SHAPE = GPTConfig(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=4)
TOKENIZER = CharTokenizer("abc")


def save(folder, model, shape=SHAPE, step=7):
    """A checkpoint of `model` with a little state."""
    state = {"step": step, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    config_json = to_json(TrainConfig(), shape)
    save_checkpoint(folder, named_weights(model), TOKENIZER, config_json, state)


def refingerprint(folder):
    """Make the manifest agree with files changed on purpose."""
    files = {name: checkpoints._fingerprint(folder / name) for name in checkpoints.FILES}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint, `last` of a run folder."""
    torch.manual_seed(0)
    save(tmp_path / "last", build_model("gpt", SHAPE))
    return tmp_path / "last"


@pytest.mark.parametrize("name", ["gpt", "naive", "bigram"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_was_saved_comes_back(tmp_path, name, tied):
    shape = SHAPE.replace(tied_head=tied, head_bias=not tied)
    torch.manual_seed(0)
    model = build_model(name, shape)
    save(tmp_path / "best", model, shape)
    found = open_checkpoint(tmp_path)
    assert (found.model, found.train, found.tokenizer.characters) == (shape, TrainConfig(), "abc")
    other = build_model(name, found.model)
    found.load_weights(other)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    state = found.load_state()
    assert state["step"] == 7
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], torch.ones(2))


def test_weights_are_plain_safetensors(folder):
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == dict(build_model("gpt", SHAPE).named_parameters()).keys()


def test_a_run_folder_gives_best_before_last(folder):
    model = build_model("gpt", SHAPE)
    assert open_checkpoint(folder.parent).folder == folder
    save(folder.with_name("best"), model, step=3)
    assert open_checkpoint(folder.parent).load_state()["step"] == 3
    assert open_checkpoint(folder.parent, "last").load_state()["step"] == 7
    assert open_checkpoint(folder).load_state()["step"] == 7  # the checkpoint itself


def test_nothing_but_the_checkpoint_is_left(folder):
    save(folder, build_model("gpt", SHAPE), step=8)
    assert [path.name for path in folder.parent.iterdir()] == ["last"]
    assert open_checkpoint(folder).load_state()["step"] == 8


class Killed(BaseException):
    """Stands for kill -9: no cleaning up runs after it."""


CALLS = ["save_file", "torch.save", "_fingerprint", "_sync", "rename 1", "rename 2", "rmtree"]


@pytest.mark.parametrize("where", CALLS)
def test_killed_at_any_point_a_whole_checkpoint_is_there(folder, monkeypatch, where):
    """The process ends at `where`; what is on the disk then is opened, and saving goes on."""

    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "rmtree", lambda *args, **kwargs: None
        )  # a dead process cleans nothing
        if where == "torch.save":
            patch.setattr(torch, "save", die)
        elif where.startswith("rename"):
            left = [int(where[-1])]
            real = type(folder).rename

            def rename(self, target):
                left[0] -= 1
                return real(self, target) if left[0] else die()

            patch.setattr(type(folder), "rename", rename)
        elif where == "rmtree":
            done = []

            def rmtree(path, **kwargs):
                done.append(path)
                return die() if str(path).endswith(".old") else None

            patch.setattr(shutil, "rmtree", rmtree)
        else:
            patch.setattr(checkpoints, where, die)
        if where == "rmtree":
            folder.with_name("last.old").mkdir()  # left by an earlier crash
        with pytest.raises(Killed):
            save(folder, build_model("gpt", SHAPE), step=8)
    expected = {7, 8} if where == "rmtree" else {7}
    assert open_checkpoint(folder.parent, "last").load_state()["step"] in expected
    save(folder, build_model("gpt", SHAPE), step=9)
    assert open_checkpoint(folder.parent, "last").load_state()["step"] == 9
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


def test_a_full_disk_leaves_the_checkpoint_before(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            save(folder, build_model("gpt", SHAPE), step=8)
    assert open_checkpoint(folder.parent).load_state()["step"] == 7
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


@pytest.mark.parametrize("name", [*checkpoints.FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_damage_is_named(folder, name, damage):
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    shutil.copytree(folder, folder.with_name("best"))
    with pytest.raises(ConfigError, match="^[^\n]*$") as error:
        open_checkpoint(folder.parent, "last")
    assert (
        "damaged" in str(error.value)
        or "cannot be read" in str(error.value)
        or ("no valid manifest" in str(error.value) or "no checkpoint" in str(error.value))
    )
    if name != "manifest.json" and damage != "missing":
        assert f"{name} is damaged" in str(error.value) and "best" in str(error.value)


def test_foreign_folders(tmp_path):
    with pytest.raises(ConfigError, match="no such run folder"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "last").mkdir()
    with pytest.raises(ConfigError, match="not a checkpoint of train.py"):
        open_checkpoint(tmp_path)


def test_a_later_format_is_named(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ConfigError, match="format 2; this version reads 1"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"x": torch.ones(1)}, "names differ"),
        ("other shapes", r"is \(3, 4\), must be \(3, 8\)"),
        (b"not safetensors", "model.safetensors is damaged"),
    ],
    ids=["names", "shapes", "bytes"],
)
def test_weights_that_do_not_fit(folder, weights, message):
    """Someone exchanged the weights and the manifest, not by accident."""
    path = folder / "model.safetensors"
    if isinstance(weights, bytes):
        path.write_bytes(weights)
    elif isinstance(weights, dict):
        save_file(weights, path)
    refingerprint(folder)
    shape = SHAPE.replace(n_embd=8) if weights == "other shapes" else SHAPE
    model = build_model("gpt", shape)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(folder).load_weights(model)
    assert all(map(torch.equal, before, model.parameters()))  # nothing half-loaded


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle ran code",))


@pytest.mark.parametrize("how", ["torch", "pickle", "text"])
def test_state_cannot_run_code(folder, how):
    path = folder / "state.pt"
    if how == "torch":
        torch.save({"step": Bomb()}, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        path.write_text("hello")
    refingerprint(folder)
    with pytest.raises(ConfigError, match="state.pt is damaged"):
        open_checkpoint(folder).load_state()
