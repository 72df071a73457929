"""A checkpoint is whole or not there, and says in one line what is wrong with it."""

import contextlib
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptcore import checkpoint as checkpoints
from gptcore.checkpoint import (
    CheckpointWriter,
    Content,
    Progress,
    SavedAnew,
    named_weights,
    newest_whole,
    open_checkpoint,
    optimizer_tensors,
    set_aside,
    write_checkpoint,
)
from gptcore.config import ConfigError, GPTConfig, RunError, TrainConfig, to_json
from gptcore.files import fingerprint, replace_text
from gptcore.model import MODELS, build_model
from gptcore.tokenizer import CharTokenizer

resource = pytest.importorskip("resource")

SHAPE = GPTConfig(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=4)
TOKENIZER = CharTokenizer("abc")
NAMES = {model: name for name, model in MODELS.items()}


def content_of(model, shape=SHAPE, step=7):
    """What a checkpoint of `model` holds, an optimizer that has stepped once included."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return Content(
        weights={name: weight.detach() for name, weight in named_weights(model).items()},
        optimizer=optimizer_tensors(model, optimizer),
        progress=Progress(step=step),
        tokenizer=TOKENIZER,
        config_json=to_json(TrainConfig(model=NAMES[type(model)]), shape),
    )


def save(folder, model, shape=SHAPE, step=7):
    """A checkpoint of `model`, written at once."""
    write_checkpoint(folder, content_of(model, shape, step))


def refingerprint(folder):
    """Make the manifest agree with files changed on purpose."""
    files = {name: fingerprint(folder / name) for name in checkpoints.FILES}
    manifest = {"format": checkpoints.FORMAT, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))


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
    assert (found.model, found.train.model, found.tokenizer.characters) == (shape, name, "abc")
    assert found.progress == Progress(step=7)
    other = build_model(name, found.model)
    found.load_weights(other)
    optimizer = torch.optim.AdamW(other.parameters(), fused=True)
    found.load_optimizer(other, optimizer)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert optimizer.state[b]["step"] == 1
        assert torch.equal(optimizer.state[b]["exp_avg"], torch.full_like(b, 0.1))


def test_weights_are_plain_safetensors(folder):
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == dict(build_model("gpt", SHAPE).named_parameters()).keys()


def test_a_run_folder_gives_best_before_last(folder):
    model = build_model("gpt", SHAPE)
    assert open_checkpoint(folder.parent).folder == folder
    save(folder.with_name("best"), model, step=3)
    assert open_checkpoint(folder.parent).progress.step == 3
    assert open_checkpoint(folder.parent, "last").progress.step == 7
    assert open_checkpoint(folder).progress.step == 7  # the checkpoint itself
    assert open_checkpoint(folder, "last").progress.step == 7
    with pytest.raises(ConfigError, match="last is a checkpoint, not the best one of a run; leave"):
        open_checkpoint(folder, "best")


def test_nothing_but_the_checkpoint_is_left(folder):
    save(folder, build_model("gpt", SHAPE), step=8)
    assert [path.name for path in folder.parent.iterdir()] == ["last"]
    assert open_checkpoint(folder).progress.step == 8


@pytest.fixture
def disk(monkeypatch):
    """The log of what was synced, as inodes, and of "rename"."""
    log, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: log.append(os.fstat(file).st_ino) or fsync(file))
    for owner, name in ((Path, "rename"), (os, "replace")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real: log.append("rename") or real(*a))
    return log


def test_a_checkpoint_is_on_the_disk_before_and_after_it_takes_its_name(folder, disk):
    """Its files and their entries before; the entries of the run folder after."""
    save(folder, build_model("gpt", SHAPE), step=8)
    *first, before, old, new, after = disk
    assert {path.stat().st_ino for path in folder.iterdir()} == set(first)
    assert before == folder.stat().st_ino and after == folder.parent.stat().st_ino
    assert old == new == "rename"


def test_a_text_is_on_the_disk_before_it_takes_its_name(tmp_path, disk):
    replace_text(tmp_path / "a.json", "{}")
    assert disk == [(tmp_path / "a.json").stat().st_ino, "rename"]


class Killed(BaseException):
    """Stands for kill -9: no cleaning up runs after it."""


CALLS = 14  # of the file system, in one save


@pytest.mark.parametrize("number", range(CALLS + 1))
@pytest.mark.parametrize("left_over", ["nothing", "last.old", "last.new"])
def test_killed_at_any_point_a_whole_checkpoint_is_there(folder, monkeypatch, number, left_over):
    """The process ends at its call `number` of the file system, which it begins and does not end.

    What is on the disk then is opened, and saving goes on.
    """
    if left_over != "nothing":  # by an earlier crash
        shutil.copytree(folder, folder.with_name(left_over))
        (folder.with_name(left_over) / "manifest.json").unlink()
    calls = []

    def dying(real, halfway):
        def call(*args, **kwargs):
            calls.append(real.__name__)
            if len(calls) == number + 1:
                halfway(*args)
                raise Killed
            return real(*args, **kwargs)

        return call

    def half_a_file(path, *args):
        path.write_bytes(b"half")

    def half_a_folder(path, *args):
        if path.is_dir():
            next(path.iterdir()).unlink()

    def nothing(*args):
        pass

    with monkeypatch.context() as patch:
        for module, name, halfway in (
            (checkpoints, "write_tensors", half_a_file),
            (checkpoints, "write_text", half_a_file),
            (checkpoints, "sync_folder", nothing),
            (type(folder), "mkdir", nothing),
            (type(folder), "rename", nothing),
            (shutil, "rmtree", half_a_folder),
        ):
            patch.setattr(module, name, dying(getattr(module, name), halfway))
        with pytest.raises(Killed) if number < CALLS else contextlib.nullcontext():
            save(folder, build_model("gpt", SHAPE), step=8)
    if number < CALLS:
        step = 8 if calls.count("rename") == 2 and calls[-1] != "rename" else 7
        assert open_checkpoint(folder.parent, "last").progress.step == step
    else:
        assert len(calls) == CALLS
    save(folder, build_model("gpt", SHAPE), step=9)
    assert open_checkpoint(folder.parent, "last").progress.step == 9
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 1,000 bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@contextlib.contextmanager
def read_only(folder):
    """Nothing can be made in `folder`, not even by root, who is someone else meanwhile."""
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_refuses_leaves_the_checkpoint_before(folder, trouble):
    content = content_of(build_model("gpt", SHAPE), step=8)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = {"full": "File too large", "read-only": "Permission denied"}[trouble]
    with pytest.raises(RunError, match="^cannot save [^\n]*--resume$") as error:
        with full_disk() if trouble == "full" else read_only(folder.parent):
            write_checkpoint(folder, content)
    assert words in str(error.value) and "the checkpoint before is untouched" in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


# ---- written meanwhile -----------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch):
    """An event without which no checkpoint gets written."""
    go = threading.Event()

    def waiting(*args):
        assert go.wait(60)
        return write_checkpoint(*args)

    monkeypatch.setattr(checkpoints, "write_checkpoint", waiting)
    yield go
    go.set()


def test_the_step_does_not_wait_and_cannot_change_what_is_written(folder, slow_disk):
    model = build_model("gpt", SHAPE)
    content = content_of(model, step=8)
    expected = {name: weight.clone() for name, weight in content.weights.items()}
    with CheckpointWriter() as writer:
        writer.save([folder, folder.with_name("best")], content)  # returns while the disk is stuck
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(-1.0)  # the next step
        assert open_checkpoint(folder).progress.step == 7
        slow_disk.set()
    for name in ("last", "best"):
        found = open_checkpoint(folder.parent, name)
        assert found.progress.step == 8
        weights = found.read_weights()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_one_save_at_a_time(folder, slow_disk):
    """The second one waits for the first, and both copies use the same memory."""
    first, second = (content_of(build_model("gpt", SHAPE), step=step) for step in (8, 9))
    writer = CheckpointWriter()
    writer.save([folder], first)
    addresses = [buffer.data_ptr() for buffer in writer._buffers.values()]
    later = threading.Timer(0.2, slow_disk.set)
    later.start()
    writer.save([folder], second)
    assert slow_disk.is_set()  # it did wait
    writer.wait()
    assert open_checkpoint(folder).progress.step == 9
    assert [buffer.data_ptr() for buffer in writer._buffers.values()] == addresses
    later.join()


@pytest.mark.parametrize("how", ["save", "wait", "check", "exit"])
def test_what_went_wrong_in_the_thread_is_told(folder, how):
    content = content_of(build_model("gpt", SHAPE), step=8)
    writer = CheckpointWriter()
    with full_disk():
        writer.save([folder], content)
        writer._thread.join()
    with pytest.raises(RunError, match="cannot save .*last: File too large"):
        if how == "exit":
            with writer:
                pass
        else:
            {"save": lambda: writer.save([folder], content)}.get(how, getattr(writer, how))()
    writer.wait()  # told once
    assert open_checkpoint(folder).progress.step == 7


def test_an_error_outside_is_not_hidden_by_one_of_the_disk(folder):
    with full_disk(), pytest.raises(ZeroDivisionError), CheckpointWriter() as writer:
        writer.save([folder], content_of(build_model("gpt", SHAPE)))
        raise ZeroDivisionError


# ---- read meanwhile --------------------------------------------------------------------------

READINGS = 11  # of files, to open a checkpoint


@pytest.mark.parametrize("name", ["best", "last"])
@pytest.mark.parametrize("number", range(READINGS + 1))
def test_what_is_read_while_it_is_saved_is_one_save(folder, monkeypatch, number, name):
    """A save comes before the reader's call `number`; read through, then it is the newer one."""
    torch.manual_seed(1)
    contents = {step: content_of(build_model("gpt", SHAPE), step=step) for step in (7, 8)}
    folder = folder.with_name(name)
    write_checkpoint(folder, contents[7])
    calls = []

    def late(real):
        def call(*args):
            calls.append(real.__name__)
            if len(calls) == number + 1:
                write_checkpoint(folder, contents[8])
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        for reader in ("read_json", "fingerprint", "tensor_shapes"):
            patch.setattr(checkpoints, reader, late(getattr(checkpoints, reader)))
        found = open_checkpoint(folder.parent if number % 2 else folder)
    saved = contents[found.progress.step].weights
    weights = found.read_weights()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    assert (len(calls) > READINGS) == (0 < number < READINGS)  # read twice where it had to be
    if number < READINGS:
        assert found.progress.step == 8


def test_a_save_meanwhile_is_no_damage_to_resume_past(folder, monkeypatch):
    real, content = checkpoints.fingerprint, content_of(build_model("gpt", SHAPE), step=8)
    save(folder.with_name("best"), build_model("gpt", SHAPE), step=3)

    def once(path):
        monkeypatch.setattr(checkpoints, "fingerprint", real)
        write_checkpoint(folder, content)
        return real(path)

    monkeypatch.setattr(checkpoints, "fingerprint", once)
    found, damaged = newest_whole(folder.parent)
    assert (found.progress.step, damaged) == (8, {})


def test_tensors_of_another_save_are_not_taken(folder):
    """Opened before it and loaded after it: weights, optimizer and step would be of two."""
    found, model = open_checkpoint(folder), build_model("gpt", SHAPE)
    before = [parameter.clone() for parameter in model.parameters()]
    save(folder, build_model("gpt", SHAPE), step=8)
    optimizer = torch.optim.AdamW(model.parameters())
    for load in (lambda: found.load_weights(model), lambda: found.load_optimizer(model, optimizer)):
        with pytest.raises(SavedAnew, match="last has changed while it was read: a run saves"):
            load()
    assert all(map(torch.equal, before, model.parameters())) and not optimizer.state


def test_a_folder_that_is_saved_for_ever(folder, monkeypatch):
    """Neither waited for without end nor called damaged, nor said to be set aside."""
    real, contents = checkpoints.read_json, content_of(build_model("gpt", SHAPE))
    monkeypatch.setattr(
        checkpoints, "read_json", lambda path: write_checkpoint(folder, contents) or real(path)
    )
    dumps, count = json.dumps, itertools.count()  # no two saves are the same
    monkeypatch.setattr(json, "dumps", lambda *a, **k: dumps(*a, **k) + " " * next(count))
    for opens in (open_checkpoint, newest_whole):
        with pytest.raises(ConfigError, match="a run saves there; try again$"):
            opens(folder.parent)


def test_a_file_that_torch_cannot_open(folder, monkeypatch):
    """It raises RuntimeError where another program would say OSError."""
    found = open_checkpoint(folder)

    def gone(path):
        raise RuntimeError(f"unable to open file <{path}> in read-only mode")

    monkeypatch.setattr(checkpoints, "read_tensors", gone)
    with pytest.raises(ConfigError, match="model.safetensors: cannot be read: unable to open"):
        found.read_weights()
    monkeypatch.setattr(checkpoints, "tensor_shapes", gone)
    with pytest.raises(ConfigError, match="model.safetensors: cannot be read: unable to open"):
        open_checkpoint(folder)


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*checkpoints.FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_damage_is_named_and_the_way_on_works(folder, name, damage):
    """One line, ending in a command after which the other checkpoint is taken."""
    shutil.copytree(folder, folder.with_name("last.old"))
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(ConfigError, match=f"^[^\n]*{name}[^\n]*$") as error:
        open_checkpoint(folder.parent, "last")
    assert f"to go on from {folder}.old" in str(error.value)
    subprocess.run(str(error.value).split("set this one aside: ")[1], shell=True, check=True)
    assert open_checkpoint(folder.parent, "last").folder == folder.with_name("last.old")
    assert folder.with_name("last.damaged").is_dir()  # nothing is overwritten


def test_no_other_damaged_one_is_offered(folder):
    shutil.copytree(folder, folder.with_name("best"))
    for name, way_on in (("last", "to go on from .*best"), ("best", "copy it again")):
        (folder.with_name(name) / "state.json").write_text("{}")
        with pytest.raises(ConfigError, match=f"last: state.json is damaged .*; {way_on}"):
            open_checkpoint(folder)


def test_a_whole_last_is_the_newest_whatever_else_there_is(folder):
    for name, step in (("best", 9), ("last.old", 3)):
        save(folder.with_name(name), build_model("gpt", SHAPE), step=step)
    (folder.with_name("last.old") / "state.json").unlink()
    found, damaged = newest_whole(folder.parent)
    assert (found.folder, damaged) == (folder, {})


def test_what_is_set_aside_replaces_nothing(folder):
    for name in ("last.damaged", "last.damaged2", "last.damaged3"):
        save(folder, build_model("gpt", SHAPE))
        assert set_aside(folder) == folder.with_name(name)
        assert open_checkpoint(folder.with_name(name)) and not folder.exists()


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
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 3}))
    with pytest.raises(ConfigError, match="format 3; this version reads 2"):
        open_checkpoint(folder)


def exchange(folder, name, change):
    """Someone exchanged a file and the manifest, not by accident."""
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        save_file(change(load_file(path)), path)
    refingerprint(folder)


def config_with(**fields):
    return lambda content: {**content, "model": {**content["model"], **fields}}


def train_with(**fields):
    return lambda content: {**content, "train": {**content["train"], **fields}}


IMPOSSIBLE = 10**9


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", lambda w: {"x": torch.ones(1)}, "names differ"),
        (
            "model.safetensors",
            lambda w: {**w, "ln_f.weight": torch.ones(5)},
            r"ln_f.weight is \(5,\), must be \(4,\)",
        ),
        ("model.safetensors", lambda w: {**w, "ln_f.weight": torch.ones(4, dtype=int)}, "got I64"),
        ("config.json", config_with(n_embd=8), "must be"),
        ("config.json", config_with(n_embd=IMPOSSIBLE), "impossible model"),
        ("config.json", config_with(n_embd=2**62), "impossible model"),
        ("config.json", config_with(n_embd=10**400), "impossible model"),
        ("config.json", config_with(n_layer=IMPOSSIBLE), "of them for n_layer 1000000000"),
        ("config.json", config_with(n_head=IMPOSSIBLE, head_size=1), "must be"),
        ("config.json", config_with(block_size=IMPOSSIBLE), "must be"),
        ("config.json", config_with(vocab_size=2), "tokenizer has 3 tokens, the model only 2"),
        ("config.json", config_with(vocab_size=4), "must be"),
        ("config.json", lambda c: {**c, "train": {"model": "naive"}}, "names differ"),
        ("tokenizer.json", lambda t: {"kind": "bytes"}, "tokenizer has 256 tokens"),
        ("tokenizer.json", lambda t: {"kind": "char", "characters": "ba"}, "sorted"),
        ("state.json", lambda s: {**s, "step": -1}, "step must be"),
        ("state.json", lambda s: {**s, "elapsed_s": "1"}, "elapsed_s must be"),
        ("state.json", lambda s: {**s, "more": 1}, "more"),
        ("state.json", lambda s: [1], "state.json must be an object"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_built(folder, name, change, message):
    exchange(folder, name, change)
    with pytest.raises(ConfigError, match=message) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: {}, None),
        (lambda o: {"x/exp_avg": torch.ones(1)}, "names differ"),
        (lambda o: {**o, "ln_f.weight/exp_avg": torch.ones(3)}, "must be"),
        (lambda o: {**o, "ln_f.weight/step": torch.ones(1)}, "must be"),
    ],
    ids=["none yet", "names", "shapes", "no scalar"],
)
def test_state_of_another_optimizer(folder, change, message):
    exchange(folder, "optimizer.safetensors", change)
    model = build_model("gpt", SHAPE)
    optimizer = torch.optim.AdamW(model.parameters())
    with contextlib.nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        open_checkpoint(folder).load_optimizer(model, optimizer)
    assert not optimizer.state


def test_weights_of_another_model_are_not_half_loaded(folder):
    model = build_model("gpt", SHAPE.replace(n_embd=8))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=r"is \(3, 4\), must be \(3, 8\)"):
        open_checkpoint(folder).load_weights(model)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_header_that_claims_terabytes(folder):
    path = folder / "model.safetensors"
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    refingerprint(folder)
    with pytest.raises(ConfigError, match="model.safetensors: damaged"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_file_without_an_end(folder, name, kind):
    """As an archive may hold them: it would be waited for, or read for ever."""
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    signal.alarm(60)  # ends the tests if it is
    with pytest.raises(ConfigError, match="not a regular file|not a checkpoint|no checkpoint"):
        open_checkpoint(folder)
    signal.alarm(0)


@pytest.mark.parametrize("name", ["gpt", "naive"])
def test_what_the_weights_say_nothing_about_is_bounded(folder, name):
    """Positions of rotary angles, and the masks of the naive model: few weights, many bytes."""
    shape = SHAPE.replace(position="rotary", block_size=64)
    save(folder, build_model(name, shape), shape)
    if name == "naive":
        exchange(folder, "config.json", train_with(model="naive"))
    assert open_checkpoint(folder).model.block_size == 64
    exchange(folder, "config.json", config_with(block_size=10**9))
    with pytest.raises(ConfigError, match="bytes beside the weights; got block_size 1000000000"):
        open_checkpoint(folder)


def test_nothing_of_a_checkpoint_is_unpickled(folder, monkeypatch):
    """Not even where only tensors may be in it: a pickle may ask for any amount of memory."""
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load"))
    monkeypatch.setattr(pickle, "loads", lambda *args, **kwargs: pytest.fail("pickle.loads"))
    model = build_model("gpt", SHAPE)
    found = open_checkpoint(folder)
    found.load_weights(model)
    found.load_optimizer(model, torch.optim.AdamW(model.parameters()))
