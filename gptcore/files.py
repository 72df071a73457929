"""Files that anyone may have written, and files that must survive: JSON and safetensors.

Reading: nothing in a file runs, what is allocated is bounded by the size of the file, and whatever
is wrong with it is a ConfigError. That is why tensors are not read with torch.load where it can be
helped: even with weights_only=True twenty bytes of pickle may ask for a gigabyte (`bytearray(n)`).

Writing: a file is on the disk when its function returns, and its fingerprint is that of the bytes
that were meant, so that what a disk made of them can be told apart.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from gptcore.config import ConfigError

JSON_BYTES = 64 << 20  # larger than any vocabulary
CHUNK_BYTES = 1 << 20
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
FLOATING = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises: ConfigError if it cannot be read, is no JSON, too large or too deep.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(JSON_BYTES)
        return json.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not one of ours: nested too deep") from error


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file; no tensor is read.

    Raises: ConfigError if it is damaged, or holds other than floating point numbers.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            for name, piece in slices.items():
                if piece.get_dtype() not in FLOATING:
                    raise ConfigError(
                        f"{path}: {name} must be floating point; got {piece.get_dtype()}"
                    )
            return {name: tuple(piece.get_shape()) for name, piece in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: damaged: {_one_line(error)}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises: ConfigError if it is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: damaged: {_one_line(error)}") from error


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write CPU tensors as safetensors; returns the fingerprint.

    Layout: 8 bytes length of the header (little endian), the header in JSON, the tensors.

    Raises: OSError.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    data = (t.contiguous().view(-1).view(torch.uint8).numpy() for t in tensors.values())
    return write_bytes(path, (len(head).to_bytes(8, "little"), head, *data))


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
