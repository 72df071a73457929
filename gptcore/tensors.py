"""Tensors in files: safetensors, and what torch.save wrote elsewhere.

Nothing in a file runs, and what is allocated is bounded by the size of the file. Of a pickle that
takes more than weights_only=True, where twenty bytes may still ask for a gigabyte (`bytearray(n)`,
a compressed archive): `check_pickle` looks at it before torch.load does.
"""

import json
import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from gptcore.config import ConfigError
from gptcore.files import write_bytes

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
LEGACY_MAGIC, LEGACY_PICKLES = 0x1950A86A20F9469CFC6C, 5
# All that a dictionary of tensors and plain values needs; the storages come by number.
PICKLED_NAMES = (
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    "collections OrderedDict",
    *(f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int")),
    *(f"torch {kind}Storage" for kind in ("Short", "Char", "Byte", "Bool")),
)


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


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """Write CPU tensors as safetensors; returns the fingerprint.

    Layout: 8 bytes length of the header (little endian), the header in JSON, the tensors.

    Raises: OSError.
    """
    header, end = {"__metadata__": metadata} if metadata else {}, 0
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


def read_pickle(path: Path) -> Any:
    """What torch.save wrote, if it is tensors and plain values; tensors may stay on the disk.

    Raises: ConfigError if it is not; OSError if it cannot be read.
    """
    check_pickle(path)
    try:
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # on foreign bytes the restricted unpickler raises anything
        raise ConfigError(f"{path}: damaged, or no PyTorch file") from error


def check_pickle(path: Path) -> None:
    """Look through a file of torch.save, of its present or old format, without unpickling anything.

    Raises: ConfigError unless its pickles name nothing but tensors, and it claims no more than it
        holds; OSError if it cannot be read.
    """
    size = Path(path).stat().st_size
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                file.seek(0)
                for _ in range(LEGACY_PICKLES):  # their sizes are allocated before they are read
                    _check_opcodes(path, file, size)
                return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ConfigError(f"{path}: compressed, which torch.save never does")
            if sum(entry.file_size for entry in entries) > size:
                raise ConfigError(f"{path}: damaged: entries larger than the file")
            (entry,) = (entry for entry in entries if entry.filename.endswith("data.pkl"))
            _check_opcodes(path, archive.read(entry), math.inf)
    except (OSError, ConfigError):
        raise
    except Exception as error:  # on foreign bytes zipfile and pickletools raise anything
        raise ConfigError(f"{path}: damaged, or no PyTorch file") from error


def _check_opcodes(path: Path, content, most: float) -> None:
    """Hold one pickle, bytes or from where a file stands, against what tensors need."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL" and argument in PICKLED_NAMES:
            continue
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
            raise ConfigError(
                f"{path}: a pickled model, which could run code when loaded; where the model can "
                "be made, torch.save(model.state_dict(), 'weights.pt') and import that"
            )
        if isinstance(argument, int) and argument > most and argument != LEGACY_MAGIC:
            raise ConfigError(f"{path}: damaged, or no PyTorch file: {argument} in {most} bytes")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
