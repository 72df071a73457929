"""Files that anyone may have written, and files that must survive.

Reading: what is allocated is bounded by the size of the file, and whatever is wrong with it is a
ConfigError. Writing: a file is on the disk when its function returns, and its fingerprint is that
of the bytes that were meant, so that what a disk made of them can be told apart.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptcore.config import ConfigError

JSON_BYTES = 64 << 20  # larger than any vocabulary
CHUNK_BYTES = 1 << 20


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises: ConfigError if it cannot be read, is no JSON, too large or too deep.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(JSON_BYTES)
        return json.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not one of ours: nested too deep") from error


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write `text`; returns the fingerprint.

    Raises: OSError.
    """
    return write_bytes(path, [text.encode("utf-8")])


def write_bytes(path: Path, pieces: Iterable) -> dict[str, Any]:
    """Write buffers one after the other, down to the disk; returns size and SHA-256 of them all.

    Raises: OSError.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                digest.update(chunk)
                size += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file.

    Raises: OSError.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync_folder(path: Path) -> None:
    """Force the entries of a folder to the disk.

    Raises: OSError.
    """
    if os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
