"""Checkpoints: a folder that is either whole or not there.

    model.safetensors      the parameters
    optimizer.safetensors  what the optimizer keeps of each, as PARAMETER/SLOT
    state.json             Progress: step, best loss, elapsed time
    config.json            TrainConfig, GPTConfig, corpus, versions
    tokenizer.json         the tokenizer
    manifest.json          size and SHA-256 of each of them, written last

A new checkpoint is written beside the old one, synced, and renamed into place; the old one goes
only when the new one is there. What a crash may leave is `NAME.new` (ignored) or `NAME.old` (used).
A damaged one that resuming passes by becomes `NAME.damaged`.
`CheckpointWriter` does this in a thread, from a copy, so that training goes on. Who reads meanwhile
holds the manifest against the one that was verified: while they agree, it is the same save.

Nothing in a checkpoint is believed: hashes, types, names and shapes are checked when it is opened,
before a model is built; nothing in it can run code.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptcore.config import ConfigError, GPTConfig, RunError, TrainConfig, read_saved
from gptcore.distributed import is_sharded, scatter
from gptcore.files import fingerprint, read_json, sync_folder, write_text
from gptcore.model import build_model
from gptcore.optim import state_slots
from gptcore.tensors import read_tensors, tensor_shapes, write_tensors
from gptcore.tokenizer import Tokenizer, from_state

FORMAT = 2
FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "config.json",
    "tokenizer.json",
)
READS = 8  # of a checkpoint that is saved anew each time, before that is an error
BUFFER_BYTES = 1 << 28  # of a model, what no file vouches for: rotary angles, the naive masks


class SavedAnew(ConfigError):
    """A save has replaced the checkpoint while it was read."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Raises: ConfigError if it could be no run's.
    """

    step: int = 0  # updates done
    elapsed_s: float = 0.0
    best_val_loss: float = math.inf
    best_step: int = 0
    evaluated_step: int = -1  # of the last evaluation

    def __post_init__(self):
        for name, least in (("step", 0), ("best_step", 0), ("evaluated_step", -1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**53:
                raise ConfigError(
                    f"{name} must be a whole number of at least {least}; got {value!r}"
                )
        for name in ("elapsed_s", "best_val_loss"):
            value = getattr(self, name)
            if type(value) is int and abs(value) < 2**53:
                continue
            if type(value) is not float or math.isnan(value):
                raise ConfigError(f"{name} must be a number; got {value!r}")


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds, in memory.

    Attributes:
        weights: by the names of the parameters, a shared one once.
        optimizer: as `optimizer_tensors` gives it.
        config_json: as `to_json` wrote it.
    """

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    progress: Progress
    tokenizer: Tokenizer
    config_json: str


# ---- reading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint on disk; tensors are read when asked for."""

    folder: Path
    train: TrainConfig
    model: GPTConfig
    config: dict[str, Any]  # config.json as it stands
    tokenizer: Tokenizer
    progress: Progress
    manifest: dict[str, Any]  # manifest.json as it was verified

    def load_weights(self, model: nn.Module) -> None:
        """Copy the weights into `model`, names and shapes checked first.

        Raises: ConfigError if they do not belong to it; SavedAnew.
        """
        expected, weights = named_weights(model), self.read_weights()
        check_fit(self.folder, _shapes(weights), _shapes(expected))
        if is_sharded(model):
            scatter(weights, model)
        else:
            model.load_state_dict(weights, strict=False)  # a shared one has two names

    def read_weights(self) -> dict[str, torch.Tensor]:
        """The weights by name.

        Raises: ConfigError if the file is damaged; SavedAnew.
        """
        return self._tensors("model.safetensors")

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Those of the save that was verified, from the disk as they are needed."""
        try:
            return _of_file(read_tensors, self.folder / name)
        finally:
            _check_same(self.folder, self.manifest)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give `optimizer` of `model` the saved state; its options stay.

        Raises: ConfigError if the state is not that of such an optimizer; SavedAnew.
        """
        path = self.folder / "optimizer.safetensors"
        found = _of_file(tensor_shapes, path)
        if not found:  # saved before the first step
            optimizer.state.clear()
            return
        slots, names = state_slots(optimizer), _parameter_names(model, optimizer)
        expected = {
            f"{name}/{slot}": () if slot == "step" else tuple(p.shape)
            for p, name in names.items()
            for slot in slots[p]
        }
        kind = type(optimizer).__name__.lower()
        check_fit(path, found, expected, f"the state of --optimizer {kind}")
        tensors = self._tensors(path.name)
        state = {
            name: {slot: tensors[f"{name}/{slot}"] for slot in slots[p]}
            for p, name in names.items()
        }
        if is_sharded(model):
            scatter(state, model, optimizer)
            return
        optimizer.state.clear()
        for p, name in names.items():
            optimizer.state[p] = {
                slot: tensor.to(p.device, torch.float32, copy=True)
                for slot, tensor in state[name].items()
            }


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by name, a shared one once."""
    return dict(model.named_parameters())


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """What `optimizer` keeps, by PARAMETER/SLOT; empty before its first step."""
    return {
        f"{name}/{slot}": value
        for parameter, name in _parameter_names(model, optimizer).items()
        for slot, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def _parameter_names(model, optimizer) -> dict[nn.Parameter, str]:
    """The parameters that `optimizer` updates, with their names in `model`."""
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {p: name for name, p in model.named_parameters() if id(p) in updated}


def check_names(where, found: dict, expected: dict, what: str = "the model") -> None:
    """Raises: ConfigError unless both have the same names."""
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())
        raise ConfigError(
            f"{where}: weights do not fit {what}: {len(odd)} names differ, {odd[0][:100]}"
        )


def check_fit(where, found: dict[str, tuple], expected: dict[str, tuple], what="the model") -> None:
    """Raises: ConfigError unless both have the same names and shapes."""
    check_names(where, found, expected, what)
    for name, shape in expected.items():
        if found[name] != shape:
            raise ConfigError(
                f"{where}: weights do not fit {what}: {name} is {found[name]}, must be {shape}"
            )


def open_checkpoint(path: str | Path, which: str | None = None) -> Checkpoint:
    """Open a checkpoint folder, or the best (else last) one of a run folder.

    Args:
        path: run folder or checkpoint folder.
        which: "best" or "last" of a run folder; None takes the first there is.
    Raises: ConfigError if there is none, or it is damaged or foreign.
    """
    path = Path(path)
    for _ in _attempts(path):
        try:
            return _open_now(path, which)
        except ConfigError as error:
            failed = error
    raise failed


def _open_now(path: Path, which: str | None) -> Checkpoint:
    """`open_checkpoint`, which may fail because of a save meanwhile."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run folder; train.py names the one it writes")
    if (path / "manifest.json").is_file():
        if which not in (None, path.name):
            raise ConfigError(
                f"{path} is a checkpoint, not the {which} one of a run; leave --checkpoint out, or "
                "give the run folder"
            )
        return _open(path)
    names = ("best", "last") if which is None else (which,)
    for name in names:
        if folders := checkpoint_folders(path, name):
            return _open(folders[0])
    raise ConfigError(
        f"{path}: holds no checkpoint ({' or '.join(names)}); give a folder that train.py wrote"
    )


def checkpoint_folders(run: Path, name: str) -> list[Path]:
    """Where the checkpoint `name` of a run folder lies, the newest first."""
    return [folder for folder in (run / name, run / f"{name}.old") if folder.is_dir()]


def _attempts(path: Path) -> Iterator[None]:
    """One, and another as long as checkpoints in `path` were saved meanwhile, READS at most."""
    before = None
    for _ in range(READS):
        now = _saves(path)
        if now == before:
            return
        before = now
        yield
    if _saves(path) != before:
        raise _saved_anew(path)


def _saves(path: Path) -> list[tuple[int, int] | None]:
    """What tells one state of a run folder or checkpoint from that after a save."""
    found = []
    for folder in ("", "best", "best.old", "last", "last.old"):
        try:
            status = os.stat(path / folder / "manifest.json")
            found.append((status.st_ino, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def newest_whole(run: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest whole checkpoint of a run folder, and what is wrong with the damaged ones.

    Behind a whole `last` nothing is looked at; without any checkpoint there is none.
    Raises: ConfigError if all are damaged.
    """
    for _ in _attempts(run):
        newest, damaged = _newest_now(run)
        if not damaged:
            break
    if damaged and newest is None:
        raise ConfigError(f"{'; '.join(damaged.values())}; {_way_on(next(iter(damaged)))}")
    return newest, damaged


def _newest_now(run: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """`newest_whole`, where a save meanwhile looks like damage."""
    newest, damaged = None, {}
    for folder in (*checkpoint_folders(run, "last"), *checkpoint_folders(run, "best")):
        try:
            found = _read(folder)
        except ConfigError as error:
            damaged[folder] = str(error)
            continue
        if newest is None or found.progress.step > newest.progress.step:
            newest = found
        if folder.name == "last":
            break
    return newest, damaged


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that none is written over it; returns its new name.

    Raises: OSError.
    """
    for number in itertools.count(1):
        aside = folder.with_name(f"{folder.name}.damaged{number if number > 1 else ''}")
        if not aside.exists():
            return folder.rename(aside)


def _open(folder: Path) -> Checkpoint:
    """`_read`, and what to do where that fails."""
    try:
        return _read(folder)
    except SavedAnew:
        raise
    except ConfigError as error:
        raise ConfigError(f"{error}; {_way_on(folder)}") from error


def _read(folder: Path) -> Checkpoint:
    """Verify the manifest, read the small files, hold the large ones against them."""
    manifest = _verify(folder)
    config, state, progress = (
        read_json(folder / name) for name in ("config.json", "tokenizer.json", "state.json")
    )
    if not isinstance(progress, dict):
        raise ConfigError(f"{folder}: state.json must be an object")
    try:
        tokenizer, progress = from_state(state), Progress(**progress)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{folder}: {error}") from error
    train, model = read_saved(config, str(folder))
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{model.vocab_size}"
        )
    _check_shapes(folder, train.model, model)
    _check_same(folder, manifest)
    return Checkpoint(folder, train, model, config, tokenizer, progress, manifest)


def _check_same(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises: SavedAnew unless `manifest` is still there: what was read of `folder` is its save."""
    try:
        same = read_json(folder / "manifest.json") == manifest
    except ConfigError:
        same = False
    if not same:
        raise _saved_anew(folder)


def _saved_anew(path: Path) -> SavedAnew:
    return SavedAnew(f"{path} has changed while it was read: a run saves there; try again")


def _of_file(read: Callable[[Path], Any], path: Path) -> Any:
    """read(path), where what torch says of a file that is gone is a ConfigError, too."""
    try:
        return read(path)
    except RuntimeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _verify(folder: Path) -> dict[str, Any]:
    """manifest.json.

    Raises: ConfigError unless every file is the one that it records.
    """
    if not (folder / "manifest.json").is_file():
        raise ConfigError(f"{folder}: not a checkpoint of train.py (no manifest.json)")
    manifest = read_json(folder / "manifest.json")
    try:
        version, recorded = manifest["format"], manifest["files"]
        recorded = {name: recorded[name] for name in FILES} if version == FORMAT else {}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: not a checkpoint of train.py (manifest.json)") from error
    if version != FORMAT:
        raise ConfigError(f"{folder}: checkpoint format {version!r}; this version reads {FORMAT}")
    for name in FILES:
        try:
            found = fingerprint(folder / name)
        except OSError as error:
            raise ConfigError(f"{folder}: {name} cannot be read: {error.strerror}") from error
        if found != recorded[name]:
            raise ConfigError(f"{folder}: {name} is damaged (its SHA-256 is not the recorded one)")
    return manifest


def _check_shapes(folder: Path, name: str, config: GPTConfig) -> None:
    """Raises: ConfigError unless the weights are those of such a model, which is not allocated."""
    found = _of_file(tensor_shapes, folder / "model.safetensors")
    modules = {"gpt": config.n_layer, "naive": config.n_layer * config.n_head}
    if {**modules, "multihead": config.n_head}.get(name, 0) > len(found):
        raise ConfigError(
            f"{folder}: weights do not fit the model: {len(found)} of them for n_layer "
            f"{config.n_layer} and n_head {config.n_head}"
        )
    try:
        with torch.device("meta"):
            model = build_model(name, config)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes that no tensor can have
        raise ConfigError(f"{folder}: config.json asks for an impossible model") from error
    weights = named_weights(model)
    check_fit(folder, found, _shapes(weights))
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if buffers > max(BUFFER_BYTES, 16 * sum(weight.nbytes for weight in weights.values())):
        raise ConfigError(
            f"{folder}: config.json asks for {buffers:,} bytes beside the weights; got block_size "
            f"{config.block_size}"
        )


def _way_on(folder: Path) -> str:
    """What to do about a checkpoint that cannot be read."""
    name = folder.name.removesuffix(".old")
    for other in map(folder.with_name, (f"{name}.old", "last", "best")):
        with contextlib.suppress(ConfigError):  # damaged as well
            if other != folder:
                _verify(other)
                return f"to go on from {other}, set this one aside: mv {folder} {folder}.damaged"
    return "copy it again from where it came"


# ---- writing ---------------------------------------------------------------------------------


def write_checkpoint(folder: Path, content: Content) -> None:
    """Write a checkpoint of CPU tensors; until it is whole, the one before it stays.

    Raises: RunError if the disk refuses; the checkpoint before is then untouched.
    """
    new, old = (folder.with_name(folder.name + suffix) for suffix in (".new", ".old"))
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        progress = dataclasses.asdict(content.progress)
        files = {
            "model.safetensors": write_tensors(new / "model.safetensors", content.weights),
            "optimizer.safetensors": write_tensors(
                new / "optimizer.safetensors", content.optimizer
            ),
            "state.json": write_text(new / "state.json", json.dumps(progress)),
            "config.json": write_text(new / "config.json", content.config_json),
            "tokenizer.json": write_text(
                new / "tokenizer.json", json.dumps(content.tokenizer.state())
            ),
        }
        manifest = {"format": FORMAT, "files": files}
        write_text(new / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        sync_folder(new)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise RunError(
            f"cannot save {folder}: {error.strerror or error}; the checkpoint before is untouched; "
            f"make room, then: python train.py --out_dir {folder.parent} --resume"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


class CheckpointWriter:
    """Writes checkpoints in a thread, so that training goes on meanwhile.

    `save` copies the tensors into buffers on the host, which are kept for the next time, and
    returns. One checkpoint is written at a time: a save that comes before the last one is done
    waits for it. What went wrong is raised in the caller's thread by the next call. As a context
    manager it waits at the end.
    """

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: dict[str, torch.Tensor] = {}

    def save(self, folders: Sequence[Path], content: Content) -> None:
        """Begin to write `content`, tensors on any device, to each of `folders`.

        Raises: RunError if the save before could not be written.
        """
        self.wait()
        originals = [*content.weights.values(), *content.optimizer.values()]
        weights = self._copy("weights", content.weights)
        optimizer = self._copy("optimizer", content.optimizer)
        content = dataclasses.replace(content, weights=weights, optimizer=optimizer)
        devices = {tensor.device for tensor in originals if tensor.is_cuda}
        copied = [torch.cuda.current_stream(device).record_event() for device in devices]
        self._thread = threading.Thread(
            target=self._write, args=(list(folders), content, copied), name="checkpoint"
        )
        self._thread.start()

    def check(self) -> None:
        """Raises: what went wrong in the thread, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Until all that was saved is on the disk.

        Raises: RunError if it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None:
            self.wait()
        else:  # the first error is the one to tell
            with contextlib.suppress(RunError):
                self.wait()

    def _copy(self, group: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies on the host; from a GPU they are on their way when this returns."""
        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(f"{group} {name}")
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                pinned = tensor.is_cuda
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                self._buffers[f"{group} {name}"] = buffer
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        return copies

    def _write(self, folders: list[Path], content: Content, copied) -> None:
        try:
            for event in copied:
                event.synchronize()
            for folder in folders:
                write_checkpoint(folder, content)
        except BaseException as error:  # told to the caller's thread by check()
            self._error = error
