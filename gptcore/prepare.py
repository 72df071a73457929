"""python -m gptcore prepare: a text larger than memory becomes token ids in a file to be mapped.

    tokens.bin       the ids, uint8, uint16 or int32, little-endian
    val.bin          those of --val, where it was given
    tokenizer.json   the tokenizer
    manifest.json    size and SHA-256 of these files and what they were made of, written last

The text streams through in blocks of READ_BYTES, for characters twice: the vocabulary comes first.
Every SAVE_BYTES the tokens are synced and progress.json says how far reading and writing have come.
After an interruption the same command goes on from there, and ends with the same bytes.
"""

import codecs
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gptcore.config import ConfigError, RunError
from gptcore.files import CAN_LOCK, fingerprint, lock, read_json, replace_text
from gptcore.flags import Parser
from gptcore.tokenizer import CharacterSet, CharTokenizer, Tokenizer, compact_dtype, from_state

FORMAT = 1
READ_BYTES = 1 << 22
SAVE_BYTES = 1 << 27
LONGEST_PIECE_BYTES = 1 << 26  # of text without a place to cut it


# ---- reading a prepared folder ---------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """The tokens of a folder, mapped; it stands where a `gptcore.data.Text` does.

    Attributes:
        tokens, val: (tokens,) of the smallest dtype that holds the vocabulary; val may be None.
        vocabulary: the tokenizer that made them.
        sha256: of the digests of all files.
    """

    source: str
    tokens: np.ndarray
    val: np.ndarray | None
    vocabulary: Tokenizer
    sha256: str
    note: str = ""

    def tokenizer(self, kind: str) -> Tokenizer:
        """The folder's own tokenizer.

        Raises: ConfigError if it is not of that kind.
        """
        if kind != self.vocabulary.kind:
            raise ConfigError(
                f"--data {self.source}: its tokenizer is {self.vocabulary.kind}, not {kind}; "
                "leave --tokenizer out, or prepare the text again"
            )
        return self.vocabulary

    def split(self, tokenizer: Tokenizer, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Tokens to train on and to validate on: val.bin, else the end of tokens.bin.

        Raises: ConfigError if `tokenizer` is not the folder's.
        """
        if tokenizer.state() != self.vocabulary.state():
            raise ConfigError(
                f"--data {self.source}: prepared with another vocabulary than the model's; "
                "give the text itself, or a folder prepared from the model's own text"
            )
        if self.val is not None:
            return self.tokens, self.val
        split = int((1 - val_fraction) * len(self.tokens))
        return self.tokens[:split], self.tokens[split:]


def open_prepared(folder: str | Path) -> Prepared:
    """Map the tokens of a folder, once every byte has been checked against its SHA-256.

    Raises: ConfigError if the folder is none of ours, unfinished or damaged.
    """
    folder = Path(folder)
    if (folder / "progress.json").is_file() and not (folder / "manifest.json").is_file():
        raise ConfigError(
            f"--data {folder}: its preparation was interrupted; give the same "
            "python -m gptcore prepare command again, it goes on"
        )
    files = _read_manifest(folder)["files"]
    _check_file(folder / "tokenizer.json", files["tokenizer.json"])
    try:
        tokenizer = from_state(read_json(folder / "tokenizer.json"))
    except ValueError as error:
        raise ConfigError(f"--data {folder}: tokenizer.json: {error}") from error
    names = [name for name in ("tokens.bin", "val.bin") if name in files]
    mapped = [_map(folder / name, files[name], tokenizer) for name in names]
    digests = "".join(files[name]["sha256"] for name in sorted(files))
    return Prepared(
        source=str(folder),
        tokens=mapped[0],
        val=mapped[1] if len(mapped) > 1 else None,
        vocabulary=tokenizer,
        sha256=hashlib.sha256(digests.encode()).hexdigest(),
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json, its form checked."""
    try:
        manifest = read_json(folder / "manifest.json")
        files, version = manifest["files"], manifest["format"]
        for name in ("tokens.bin", "tokenizer.json"):
            files[name]
        for name, recorded in files.items():
            if name not in ("tokens.bin", "val.bin", "tokenizer.json"):
                raise ValueError(name)
            if not (type(recorded["bytes"]) is int and type(recorded["sha256"]) is str):
                raise ValueError(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--data {folder}: a folder, but not one of python -m gptcore prepare (no valid "
            "manifest.json); give a text file, or prepare one"
        ) from error
    if version != FORMAT:
        raise ConfigError(f"--data {folder}: format {version!r}; this version reads {FORMAT}")
    return manifest


def _map(path: Path, recorded: dict[str, Any], tokenizer: Tokenizer) -> np.ndarray:
    """The ids in a checked file, mapped; writes stay private, as torch wants them allowed."""
    dtype = np.dtype(compact_dtype(tokenizer.vocab_size))
    if recorded["bytes"] % dtype.itemsize or not recorded["bytes"]:
        raise ConfigError(f"{path}: {recorded['bytes']} bytes are no whole number of {dtype} ids")

    def check(block: bytes) -> None:
        ids = np.frombuffer(block, dtype)
        if ids.max() >= tokenizer.vocab_size or ids.min() < 0:
            raise ConfigError(
                f"{path}: ids from {ids.min()} to {ids.max()}, the vocabulary has "
                f"{tokenizer.vocab_size}; delete {path.parent} and prepare the text again"
            )

    _check_file(path, recorded, check)
    return np.memmap(path, dtype, mode="c")


def _check_file(path: Path, recorded: dict[str, Any], check: Callable | None = None) -> None:
    """Raises: ConfigError unless size and SHA-256 are the recorded ones and `check` agrees."""
    try:
        found = {"bytes": path.stat().st_size}
        if found["bytes"] == recorded["bytes"]:
            found = fingerprint(path, check)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    for name, value in found.items():
        if value != recorded[name]:
            raise ConfigError(
                f"{path} is damaged (its {name} are {value}, recorded are {recorded[name]}); "
                "delete the folder and prepare the text again"
            )


# ---- writing one -----------------------------------------------------------------------------


def add_arguments(parser: Parser) -> None:
    """The flags of `prepare`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 texts, joined in order")
    parser.add_argument("--out_dir", default=None, help="the folder [first FILE, then .tokens]")
    parser.add_argument(
        "--val", nargs="+", default=(), metavar="FILE", help="validate on these, not on the end"
    )
    parser.add_argument(
        "--tokenizer", choices=("char", "bytes", "gpt2"), default="char", help="[char]"
    )


def prepare(arguments) -> int:
    """turn texts of any size into a folder of tokens for train.py --data"""
    folder = Path(arguments.out_dir or arguments.files[0] + ".tokens")
    try:
        manifest = prepare_folder(arguments.files, arguments.val, folder, arguments.tokenizer)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on with {folder}")
        raise
    except OSError as error:
        raise RunError(
            f"cannot write {folder}: {error.strerror or error}; mend that, then give the same "
            "command again: it goes on"
        ) from error
    itemsize = np.dtype(manifest["dtype"]).itemsize
    for name in manifest["files"]:
        if name.endswith(".bin"):
            size = manifest["files"][name]["bytes"]
            print(f"{folder / name}: {size // itemsize:,} tokens, {size:,} bytes")
    print(
        f"tokenizer {manifest['tokenizer']}, vocabulary {manifest['vocab_size']}, "
        f"{manifest['dtype']}\ntrain on it   python train.py --data {folder}"
    )
    return 0


def prepare_folder(
    files: Sequence[str], val: Sequence[str], folder: Path, kind: str
) -> dict[str, Any]:
    """Write a prepared folder, or go on with one; a whole one of the same texts is left as it is.

    Returns: its manifest.
    Raises: ConfigError on bad files or a folder with something else in it; RunError if a text
        changes meanwhile; OSError if the disk refuses, with what is there kept.
    """
    inputs = [_describe(path) for path in (*files, *val)]
    job = {"format": FORMAT, "tokenizer": kind, "inputs": inputs, "val_files": len(val)}
    if (folder / "manifest.json").is_file():
        manifest = _read_manifest(folder)
        if all(manifest.get(name) == value for name, value in job.items()):
            for name, recorded in manifest["files"].items():
                _check_file(folder / name, recorded)
            print(f"{folder} is whole already")
            return manifest
        raise ConfigError(
            f"{folder} holds the tokens of other texts or another tokenizer; give another --out_dir"
        )
    _read_progress(folder, job)  # refuses a folder before anything is made in it
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "tokens.bin"):
        state = _read_progress(folder, job)
        replace_text(folder / "progress.json", json.dumps(state))
        if kind == "char":
            _collect_characters(folder, state)
            tokenizer = CharTokenizer(state["characters"])
        else:
            tokenizer = from_state({"kind": kind})
        _encode(folder, state, tokenizer, len(files))
        if [_describe(path) for path in (*files, *val)] != inputs:
            raise RunError(
                f"a text has changed while it was read; delete {folder} and prepare again"
            )
        replace_text(folder / "tokenizer.json", json.dumps(tokenizer.state()))
        names = (*state["bytes"], "tokenizer.json")
        manifest = {
            **job,
            "vocab_size": tokenizer.vocab_size,
            "dtype": np.dtype(compact_dtype(tokenizer.vocab_size)).name,
            "files": {name: fingerprint(folder / name) for name in names},
        }
        replace_text(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        (folder / "progress.json").unlink()
    return manifest


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file, which is made if need be, against other processes and threads.

    Raises: ConfigError if another one holds it.
    """
    with open(path, "ab") as file:
        if CAN_LOCK and not lock(file.fileno()):
            raise ConfigError(
                f"another process or thread prepares {path.parent}; wait for its end, or give "
                "another --out_dir"
            )
        yield


def _describe(path: str) -> dict[str, Any]:
    """What tells one version of a text from another."""
    try:
        status = Path(path).stat()
        if not Path(path).is_file():
            raise ConfigError(f"prepare {path}: not a file; give text files")
        with open(path, "rb") as file:
            beginning = file.read(len(codecs.BOM_UTF8) + 1)
    except OSError as error:
        raise ConfigError(f"prepare {path}: cannot read it: {error.strerror}") from error
    if beginning in (b"", codecs.BOM_UTF8):
        raise ConfigError(f"prepare {path}: the file is empty; give one with text in it")
    return {
        "path": str(Path(path).resolve()),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }


def _read_progress(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """How far an interrupted run of `job` came; the beginning where there was none."""
    if not folder.exists() or (folder.is_dir() and _unbegun(folder)):
        names = ("tokens.bin", "val.bin") if job["val_files"] else ("tokens.bin",)
        return {
            **job,
            "scanned": [0, 0],
            "characters": "",
            "encoded": [0, 0],
            "bytes": dict.fromkeys(names, 0),
        }
    try:
        state = read_json(folder / "progress.json")
        same = all(state.get(name) == value for name, value in job.items())
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{folder} exists and holds no preparation to go on with; give another --out_dir"
        ) from error
    if not same:
        raise ConfigError(
            f"{folder} holds an unfinished preparation of other texts (or of texts that have "
            "changed since); delete it, or give another --out_dir"
        )
    return state


def _unbegun(folder: Path) -> bool:
    """Whether `folder` is empty, or was left before its first progress.json was there."""
    names = set(os.listdir(folder)) - {"progress.json.new"}
    return not names or (names == {"tokens.bin"} and not os.path.getsize(folder / "tokens.bin"))


def _collect_characters(folder: Path, state: dict[str, Any]) -> None:
    """Add every character of the texts from state["scanned"] on to state["characters"]."""
    found = CharacterSet(state["characters"])
    saved = 0
    with _progress_bar(state["inputs"], state["scanned"], "vocabulary") as bar:
        for text, position in _texts(state["inputs"], state["scanned"], len):
            found.add(text)
            state["scanned"] = position
            bar.update(_read_bytes(state["inputs"], position) - bar.n)
            if bar.n - saved >= SAVE_BYTES:
                saved = bar.n
                state["characters"] = str(found)
                replace_text(folder / "progress.json", json.dumps(state))
    state["characters"] = str(found)
    replace_text(folder / "progress.json", json.dumps(state))


def _encode(folder: Path, state: dict[str, Any], tokenizer: Tokenizer, train_files: int) -> None:
    """Append the tokens of the texts from state["encoded"] on to the .bin files."""
    with contextlib.ExitStack() as stack:
        outs = {}
        for name, size in state["bytes"].items():
            (folder / name).touch()
            outs[name] = stack.enter_context(open(folder / name, "r+b"))
            if outs[name].seek(0, os.SEEK_END) < size:
                raise ConfigError(
                    f"{folder / name} is shorter than progress.json says; delete {folder} and "
                    "prepare the text again"
                )
            outs[name].truncate(size)  # what was written after the last save is written again
            outs[name].seek(size)
        bar = stack.enter_context(_progress_bar(state["inputs"], state["encoded"], "tokens"))
        saved = bar.n

        def save():
            for name, out in outs.items():
                out.flush()
                os.fsync(out.fileno())
                state["bytes"][name] = out.tell()
            replace_text(folder / "progress.json", json.dumps(state))

        for text, position in _texts(state["inputs"], state["encoded"], tokenizer.cut):
            name = "tokens.bin" if position[0] < train_files else "val.bin"
            outs[name].write(tokenizer.encode(text).data)
            state["encoded"] = position
            bar.update(_read_bytes(state["inputs"], position) - bar.n)
            if bar.n - saved >= SAVE_BYTES:
                saved = bar.n
                save()
        save()


def _texts(
    inputs: list[dict[str, Any]], start: Sequence[int], cut: Callable[[str], int]
) -> Iterator[tuple[str, list[int]]]:
    """Yield pieces of text from `start` on, and the [file, byte] after each.

    Args:
        cut: text -> where it may be parted, so that the parts encode as the whole does.
    """
    for number in range(start[0], len(inputs)):
        path, offset, raw = inputs[number]["path"], start[1] if number == start[0] else 0, b""
        with open(path, "rb") as file:
            if offset == 0 and file.read(3) == codecs.BOM_UTF8:
                offset = 3
            file.seek(offset)
            last = False
            while not last:
                block = file.read(READ_BYTES)
                raw, last = raw + block, not block
                try:
                    text, used = codecs.utf_8_decode(raw, "strict", last)
                except UnicodeDecodeError as error:
                    raise ConfigError(
                        f"prepare {path}: not UTF-8 at byte {offset + error.start}; convert it, "
                        "for example with iconv -f latin1 -t utf-8"
                    ) from error
                if not last and (end := cut(text)) < len(text):
                    used -= len(text[end:].encode())
                    text = text[:end]
                raw, offset = raw[used:], offset + used
                if len(raw) > LONGEST_PIECE_BYTES:
                    raise ConfigError(
                        f"prepare {path}: no space or new line in the {len(raw):,} bytes after "
                        f"{offset:,}; use --tokenizer bytes or char"
                    )
                if text:
                    yield text, [number, offset]


def _read_bytes(inputs: list[dict[str, Any]], position: Sequence[int]) -> int:
    """Bytes of all texts before [file, byte]."""
    return sum(entry["bytes"] for entry in inputs[: position[0]]) + position[1]


def _progress_bar(inputs: list[dict[str, Any]], position: Sequence[int], what: str) -> tqdm:
    return tqdm(
        total=_read_bytes(inputs, [len(inputs), 0]),
        initial=_read_bytes(inputs, position),
        desc=what,
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
    )
