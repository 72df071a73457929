"""Files that anyone may have written, and files that must survive.

Reading: what is allocated is bounded by the size of the file, and whatever is wrong with it is a
ConfigError. Writing: a file is on the disk when its function returns, and its fingerprint is that
of the bytes that were meant, so that what a disk made of them can be told apart.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from gptcore.config import ConfigError, RunError

JSON_BYTES = 64 << 20  # larger than any vocabulary
CHUNK_BYTES = 1 << 20
CAN_LOCK = fcntl is not None


def first_free(stem: str) -> Path:
    """The first of STEM-1, STEM-2, ... that does not exist."""
    return next(p for n in itertools.count(1) if not (p := Path(f"{stem}-{n}")).exists())


def lock(descriptor: int) -> bool:
    """Hold an open file or folder against other processes and threads until it is closed.

    Only where CAN_LOCK; and on some file systems nothing is held.

    Returns: False if another one holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def disk_errors(folder: Path, resume: Callable[[], str]) -> Iterator[None]:
    """What the disk refuses becomes one line, with the command to go on by."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; "
            f"mend that, then: {resume()}"
        ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises: ConfigError if it cannot be read, is no JSON, too large or too deep.
    """
    try:
        check_regular(path)
        with open(path, encoding="utf-8") as file:
            text = file.read(JSON_BYTES)
        return json.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not one of ours: nested too deep") from error


def check_regular(path: Path) -> None:
    """Raises: OSError unless `path` is a file that ends: no pipe, which would be waited for, and
    no device, also where a link leads to one.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes`, in UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Write `content` whole or not at all, and on the disk.

    Raises: OSError; what was there before is then untouched.
    """
    new = path.with_name(path.name + ".new")
    try:
        write_bytes(new, [content])
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    os.replace(new, path)


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


def fingerprint(path: Path, visit: Callable[[bytes], None] | None = None) -> dict[str, Any]:
    """Size and SHA-256 of a file, which `visit` sees in chunks of CHUNK_BYTES.

    Raises: OSError.
    """
    check_regular(path)
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if visit is not None:
                visit(chunk)
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
