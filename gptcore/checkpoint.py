"""Checkpoints: a folder that is either whole or not there.

    model.safetensors   the parameters
    state.pt            optimizer, step, best loss, elapsed time (loads with weights_only=True)
    config.json         TrainConfig, GPTConfig, corpus, versions
    tokenizer.json      the tokenizer
    manifest.json       size and SHA-256 of each of them, written last

A new checkpoint is written beside the old one, synced, and renamed into place; the old one goes
only when the new one is there. What a crash may leave is `NAME.new` (ignored) or `NAME.old` (used).
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from gptcore.config import ConfigError, GPTConfig, TrainConfig, read_saved
from gptcore.tokenizer import Tokenizer, from_state

FORMAT = 1
FILES = ("model.safetensors", "state.pt", "config.json", "tokenizer.json")


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint on disk; tensors are read when asked for."""

    folder: Path
    train: TrainConfig
    model: GPTConfig
    config: dict[str, Any]  # config.json as it stands
    tokenizer: Tokenizer

    def load_weights(self, model: nn.Module) -> None:
        """Copy the weights into `model`, names and shapes checked first.

        Raises: ConfigError if they do not belong to it.
        """
        expected, found = named_weights(model), self.read_weights()
        self.check_names(found, expected)
        for name, weight in expected.items():
            if found[name].shape != weight.shape:
                raise ConfigError(
                    f"{self.folder}: weights do not fit the model: {name} is "
                    f"{tuple(found[name].shape)}, must be {tuple(weight.shape)}"
                )
        with torch.no_grad():
            for name, weight in expected.items():
                weight.copy_(found[name])

    def read_weights(self) -> dict[str, torch.Tensor]:
        """The weights by name.

        Raises: ConfigError if the file is damaged.
        """
        try:
            return load_file(self.folder / "model.safetensors")
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{self.folder}: model.safetensors is damaged: {error}") from error

    def check_names(self, found: dict[str, Any], expected: dict[str, Any]) -> None:
        """Raises: ConfigError unless both have the same names."""
        if found.keys() != expected.keys():
            odd = sorted(found.keys() ^ expected.keys())
            raise ConfigError(
                f"{self.folder}: weights do not fit the model: {len(odd)} names differ, {odd[0]}"
            )

    def load_state(self) -> dict[str, Any]:
        """Optimizer state and counters; only tensors and plain values can be in it.

        Raises: ConfigError if it is damaged.
        """
        try:
            return torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # on foreign bytes the restricted unpickler raises anything
            raise ConfigError(f"{self.folder}: state.pt is damaged") from error


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by name, a shared one once."""
    return dict(model.named_parameters())


def save_checkpoint(
    folder: Path,
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    config_json: str,
    state: dict[str, Any],
) -> None:
    """Write a checkpoint; until it is whole, the one before it stays.

    Args:
        weights: `named_weights` of a model, none of them in pieces (gptcore.distributed).
    Raises: OSError if the disk refuses; the checkpoint before is then untouched.
    """
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        weights = {name: weight.detach() for name, weight in weights.items()}
        save_file(weights, new / "model.safetensors")
        torch.save(state, new / "state.pt")
        (new / "config.json").write_text(config_json, encoding="utf-8")
        (new / "tokenizer.json").write_text(json.dumps(tokenizer.state()), encoding="utf-8")
        manifest = {"format": FORMAT, "files": {name: _fingerprint(new / name) for name in FILES}}
        (new / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for name in (*FILES, "manifest.json", "."):
            _sync(new / name)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def open_checkpoint(path: str | Path, which: str | None = None) -> Checkpoint:
    """Open a checkpoint folder, or the best (else last) one of a run folder.

    Args:
        path: run folder or checkpoint folder.
        which: "best" or "last" of a run folder; None takes the first there is.
    Raises: ConfigError if there is none, or it is damaged or foreign.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run folder; train.py names the one it writes")
    if (path / "manifest.json").is_file():
        return _open(path)
    names = ("best", "last") if which is None else (which,)
    for name in names:
        for candidate in (path / name, path / f"{name}.old"):
            if candidate.is_dir():
                return _open(candidate)
    raise ConfigError(
        f"{path}: holds no checkpoint ({' or '.join(names)}); give a folder that train.py wrote"
    )


def _open(folder: Path) -> Checkpoint:
    """Verify the manifest, then read the small files."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        recorded = {name: manifest["files"][name] for name in FILES}
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder}: not a checkpoint of train.py (no valid manifest.json)"
        ) from error
    if version != FORMAT:
        raise ConfigError(f"{folder}: checkpoint format {version!r}; this version reads {FORMAT}")
    for name in FILES:
        try:
            same = _fingerprint(folder / name) == recorded[name]
        except OSError as error:
            raise ConfigError(f"{folder}: {name} cannot be read: {error.strerror}") from error
        if not same:
            raise ConfigError(
                f"{folder}: {name} is damaged (its SHA-256 is not the recorded one); "
                f"{_other_checkpoint(folder)}"
            )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = from_state(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from error
    train, model = read_saved(config, str(folder))
    return Checkpoint(folder, train, model, config, tokenizer)


def _other_checkpoint(folder: Path) -> str:
    """What to try instead of a damaged checkpoint."""
    for name in (folder.name.removesuffix(".old") + ".old", "last", "best"):
        other = folder.with_name(name)
        if other != folder and other.is_dir():
            return f"try {other}"
    return "copy it again from where it came"


def _fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
