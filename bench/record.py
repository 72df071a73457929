"""What a result must say about itself: machine, versions, date, command, revision."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.worker import is_allocator_variable
from gptcore.config import ConfigError

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
_NUMBERS = re.compile(r"\[([-+.,\de\s]+)\]")  # a list of numbers, to be written on one line
_RESULTS = ":!bench/results"  # where a run may have written before another
_FOLDER_FLAGS = ("--nanogpt", "--json", "--plot")


def environment(device: torch.device) -> dict[str, Any]:
    """Device and versions, without the names of hosts, users or folders.

    allocator_variables: those set here, which peers in processes of their own run without.
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "liger-kernel", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    record: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "allocator_variables": sorted(filter(is_allocator_variable, os.environ)),
    }
    if device.type == "cuda":
        record["cuda"] = torch.version.cuda or torch.version.hip
        record["cudnn"] = torch.backends.cudnn.version()
        record["driver"] = driver_version()
        record["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return record


def driver_version() -> str | None:
    """Of the NVIDIA driver; None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.split()[0] if said.stdout.split() else None


def device_name(device: torch.device) -> str:
    """The product's name, for a CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The model the CPU says it is, and the widest vectors torch uses on it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def revision() -> dict[str, Any]:
    """The git revision of this tree and whether tracked files other than results differ from it."""
    try:
        head = _git("rev-parse", "HEAD")
        dirty = bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", _RESULTS))
    except (OSError, subprocess.CalledProcessError):
        return {"revision": None, "dirty": None}
    return {"revision": head, "dirty": dirty}


def _git(*args: str) -> str:
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def command_line(argv: Sequence[str]) -> str:
    """The command as anyone could repeat it: folders by their last name only."""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if words and words[-1] in _FOLDER_FLAGS:
            word = _short(word)
        elif equals and flag in _FOLDER_FLAGS:
            word = f"{flag}={_short(value)}"
        words.append(word)
    return " ".join(["python -m bench", *words])


def _short(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path


def new(argv: Sequence[str], device: torch.device) -> dict[str, Any]:
    """An empty record of one invocation; "questions" is filled by the questions asked."""
    return {
        "schema": SCHEMA,
        "command": command_line(argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git": revision(),
        "environment": environment(device),
        "questions": {},
    }


def check_writable(flag: str, path: Path) -> None:
    """Make the folder of `path` and try a file beside it; what stands there is left alone.

    Raises: ConfigError if `write` would fail there.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{flag} must be a file; got {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise ConfigError(
            f"{flag} must name a place where files can be written; got {path}: {error.strerror}"
        ) from error


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def write(record: dict[str, Any], path: Path) -> None:
    """Write `record` as JSON, whole or not at all; numbers keep six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    text = json.dumps(_rounded(record), indent=1)
    text = _NUMBERS.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A record written by `write`.

    Raises: ValueError if the file is not one.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"read: {path} must be JSON; got {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"read: {path} must be a record of schema {SCHEMA}")
    return record


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
