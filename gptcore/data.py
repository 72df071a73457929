"""Corpora: where a text comes from, and how batches are drawn from it.

The tokens are held once, as a compact integer tensor: on the training device where they fit, else
on the host, where those of a prepared folder (gptcore.prepare) stay in their file, mapped. A batch
is one indexing operation and a pure function of (seed, step): sequence r of the global batch of a
step starts at random_integers(key, SITE_BATCH, r), whatever rank or micro-batch asks for it.
"""

import contextlib
import hashlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from gptcore.config import ConfigError
from gptcore.evaluation import Evaluation
from gptcore.files import check_regular
from gptcore.prepare import Prepared, open_prepared
from gptcore.tokenizer import Tokenizer, tokenizer_for
from kernels.rng import SITE_BATCH, make_key, random_integers

NAMES = ("auto", "tinyshakespeare", "pydoc")  # of texts; anything else is a path
TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_TIMEOUT_S = 10.0
DEVICE_SHARE = 0.25  # of the free memory of a GPU, for the tokens
MEASURED_TOKENS = 1 << 20  # whose characters are counted; of Tiny Shakespeare, all


@dataclass(frozen=True)
class Text:
    """A text and where it came from; `note` is what the user must be told about it."""

    content: str
    source: str
    note: str = ""

    @property
    def sha256(self) -> str:
        """Of the UTF-8 bytes."""
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()

    def tokenizer(self, kind: str) -> Tokenizer:
        """A new tokenizer `kind` for this text."""
        return tokenizer_for(kind, self.content)

    def split(self, tokenizer: Tokenizer, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Tokens to train on, and the end of the text to validate on.

        Raises: ConfigError if `tokenizer` lacks characters of the text.
        """
        tokens = tokenizer.encode(self.content)
        split = int((1 - val_fraction) * len(tokens))
        return tokens[:split], tokens[split:]


def load_data(data: str) -> Text | Prepared:
    """What `--data` names: a text, as `load_text` finds it, or a folder of prepared tokens.

    Raises: ConfigError if it is missing, empty, damaged or not UTF-8.
    """
    prepared = data not in NAMES and Path(data).is_dir()
    return open_prepared(data) if prepared else load_text(data)


def load_text(data: str) -> Text:
    """The text that `--data` names.

    Args:
        data: "tinyshakespeare", "pydoc", "auto" (the first that can be had), or a path.
    Raises: ConfigError if it is missing, empty or not UTF-8.
    """
    if data == "pydoc":
        return _pydoc_text()
    if data not in ("auto", "tinyshakespeare"):
        return read_text_file(data)
    try:
        return _tiny_shakespeare()
    except OSError as error:
        reason = str(getattr(error, "reason", error))
        if data == "tinyshakespeare":
            raise ConfigError(
                f"Tiny Shakespeare is not cached and cannot be downloaded ({reason}); put "
                "tinyshakespeare.txt into $GPTCORE_DATA_DIR, or give --data FILE"
            ) from error
        text = _pydoc_text()
        note = (
            f"Tiny Shakespeare cannot be had ({reason}): training on the English reference text "
            "inside Python (pydoc_data.topics) instead"
        )
        return Text(text.content, text.source, note)


def read_text_file(path: str) -> Text:
    """The UTF-8 text of a file; a byte order mark is dropped.

    Raises: ConfigError if it is missing, unreadable, no regular file, empty or not UTF-8.
    """
    try:
        check_regular(Path(path))
        raw = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(
            f"--data {path}: no such file; give a text file, tinyshakespeare or pydoc"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"--data {path}: cannot read it: {error.strerror}; give a text file"
        ) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--data {path}: not UTF-8 at byte {error.start}; convert it, for example with "
            "iconv -f latin1 -t utf-8"
        ) from error
    if not text:
        raise ConfigError(f"--data {path}: the file is empty; give one with text in it")
    return Text(text, str(Path(path)))


def cache_dir() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/gptcore or ~/.cache/gptcore."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "gptcore"
    try:
        return Path.home() / ".cache" / "gptcore"
    except RuntimeError:  # no HOME, and a user whom the system does not know
        return Path(tempfile.gettempdir()) / "gptcore"


def _pydoc_text() -> Text:
    from pydoc_data.topics import topics

    return Text("\n\n".join(topics[name] for name in sorted(topics)), "pydoc_data.topics")


def _tiny_shakespeare() -> Text:
    """From the cache, $GPTCORE_DATA_DIR or the network; OSError where none has it."""
    cached = cache_dir() / "tinyshakespeare.txt"
    candidates = [cached]
    if folder := os.environ.get("GPTCORE_DATA_DIR"):
        candidates.append(Path(folder) / "tinyshakespeare.txt")
    for path in candidates:
        if not path.is_file():
            continue
        raw = path.read_bytes()
        if _is_tiny_shakespeare(raw):
            return Text(raw.decode("utf-8"), f"tinyshakespeare ({path})")
        if path is not cached:  # a damaged cache is simply downloaded again
            raise ConfigError(
                f"{path} is not Tiny Shakespeare: its SHA-256 must be "
                f"{TINY_SHAKESPEARE_SHA256}; replace it, or give --data {path} to train on it as is"
            )
    try:
        with urllib.request.urlopen(TINY_SHAKESPEARE_URL, timeout=DOWNLOAD_TIMEOUT_S) as response:
            raw = response.read()
    except http.client.HTTPException as error:  # a body cut short, or no HTTP at all
        raise OSError(repr(error)) from error
    if not _is_tiny_shakespeare(raw):
        raise OSError(f"{TINY_SHAKESPEARE_URL} sent {len(raw)} bytes with another SHA-256")
    _cache(cached, raw)
    return Text(raw.decode("utf-8"), f"tinyshakespeare ({TINY_SHAKESPEARE_URL})")


def _is_tiny_shakespeare(raw: bytes) -> bool:
    return hashlib.sha256(raw).hexdigest() == TINY_SHAKESPEARE_SHA256


def _cache(path: Path, raw: bytes) -> None:
    """Write whole or not at all; a read-only home costs only the next download."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(raw)
        os.replace(file.name, path)
    except OSError as error:
        print(f"note: not cached: {error}")


@dataclass(frozen=True)
class Corpus:
    """A text as tokens, split in two; the end of the text is held out.

    Attributes:
        train, val: (tokens,) uint8, uint16 or int32, both on one device: `device` or the host.
        device: where batches are wanted.
        tokens_per_character: of the validation text, its first MEASURED_TOKENS tokens.
        eval_tokens: `validation` has no more targets than this; None: all.
    """

    unit = "tokens"  # what `sizes` counts

    text: Text | Prepared
    tokenizer: Tokenizer
    train: torch.Tensor
    val: torch.Tensor
    device: torch.device
    tokens_per_character: float
    eval_tokens: int | None = None

    @classmethod
    def build(
        cls,
        text: Text | Prepared,
        tokenizer: Tokenizer,
        *,
        val_fraction: float = 0.1,
        device="cpu",
        eval_tokens: int | None = None,
    ) -> "Corpus":
        """Encode `text`, unless it was prepared, and split it.

        Raises: ConfigError if `tokenizer` lacks characters of `text` or is not the folder's.
        """
        device = torch.device(device)
        splits = [torch.from_numpy(part) for part in text.split(tokenizer, val_fraction)]
        if _fits(sum(part.nbytes for part in splits), device):
            splits = [part.to(device) for part in splits]
        train, val = splits
        tokens_per_character = 1.0
        if tokenizer.kind != "char":
            measured = val[:MEASURED_TOKENS].tolist()
            tokens_per_character = len(measured) / max(1, len(tokenizer.decode(measured)))
        return cls(text, tokenizer, train, val, device, tokens_per_character, eval_tokens)

    @property
    def on_host(self) -> bool:
        """Whether batches are gathered on the host for another device."""
        return self.train.device.type != self.device.type

    @property
    def sizes(self) -> dict[str, int]:
        """How much there is to train and to validate on."""
        return {"train_tokens": len(self.train), "val_tokens": len(self.val)}

    @property
    def remark(self) -> str:
        """What there is to say about a corpus that is large."""
        words = "; too large for the device, batches come from the host" if self.on_host else ""
        if self.eval_tokens is not None and self.eval_tokens < len(self.val):
            words += f"; {self.eval_tokens:,} of them, spread evenly, are evaluated (--eval_tokens)"
        return words

    def extent(self, evaluation: Evaluation) -> tuple[int, int, str]:
        """How much was evaluated, of how much, and of what."""
        return evaluation.targets, len(self.val) - 1, "targets"

    def scores(self, evaluation: Evaluation) -> dict[str, float]:
        """What metrics.jsonl records beside loss and accuracy."""
        return {}

    def example(self) -> str:
        """A word to start a sample with, of characters that the text has; perhaps none."""
        known = ("LEONTES:",) if "tinyshakespeare" in self.text.source else ()
        for word in (*known, "The"):
            with contextlib.suppress(ConfigError):
                self.tokenizer.encode(word)
                return word
        words = self.tokenizer.decode(self.val[:200].tolist()).split()[1:]  # the first, in part
        return next((word[:12] for word in words if word.isprintable()), "")

    def check_block(self, block_size: int) -> None:
        """Raises: ConfigError unless each split holds a block and its targets."""
        shorter = min(len(self.train), len(self.val))
        if shorter > block_size:
            return
        fix = f"--block_size {shorter - 1} or less, or more text" if shorter > 1 else "more text"
        raise ConfigError(
            f"text shorter than a block: {self.text.source} splits into {len(self.train)} training "
            f"and {len(self.val)} validation tokens, block_size {block_size} needs "
            f"{block_size + 1} of each; give {fix}"
        )

    def batch(
        self, key: torch.Tensor, size: int, block_size: int, *, split="train", site=SITE_BATCH
    ):
        """Random windows: rows first .. first + size of the global batch of key's step.

        Args:
            key: (3,) int64 [seed, step, first] of `kernels.rng`.
        Returns: idx, targets, each (size, block_size) int64, on `device`.
        """
        tokens = self.train if split == "train" else self.val
        key = key.to(tokens.device)
        starts = random_integers(key, site, range(size), len(tokens) - block_size)
        return self._windows(tokens, starts, block_size)

    def _windows(self, tokens: torch.Tensor, starts: torch.Tensor, block_size: int):
        """idx, targets (len(starts), block_size) int64 of the windows at `starts`, on `device`."""
        window = windows(tokens, starts, block_size + 1)
        if self.device.type == "cuda" and self.on_host:
            window = window.pin_memory()
        window = window.to(self.device, non_blocking=True)
        return window[:, :-1], window[:, 1:]

    def validation(self, size: int, block_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every validation token but the first as a target exactly once.

        Where there are more than `eval_tokens`, as many whole windows as hold no more, at least
        one, spread evenly, are taken instead.

        Yields idx, targets (<= size, block_size). The last one is a single row if a tail is left,
        whose targets end in -100: kernels for a length of its own would have to be compiled.
        """
        whole = count = (len(self.val) - 1) // block_size
        capped = self.eval_tokens is not None and len(self.val) - 1 > self.eval_tokens
        if capped:
            count = max(1, self.eval_tokens // block_size)
        for first in range(0, count, size):
            rows = torch.arange(first, min(first + size, count), device=self.val.device)
            yield self._windows(self.val, rows * whole // count * block_size, block_size)
        tail = self.val[whole * block_size :].long()[None].to(self.device)
        if not capped and tail.shape[1] > 1:
            missing = 0, block_size + 1 - tail.shape[1]
            yield F.pad(tail[:, :-1], missing), F.pad(tail[:, 1:], missing, value=-100)

    def training_sample(self, batches: int, size: int, block_size: int):
        """Yield up to `batches` batches of windows spread evenly over the training split."""
        count = min(batches * size, (len(self.train) - 1) // block_size)
        last = len(self.train) - block_size - 1
        starts = torch.linspace(0, last, count, dtype=torch.float64).long().to(self.train.device)
        for rows in starts.split(size):
            yield self._windows(self.train, rows, block_size)


def windows(tokens: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """(len(starts), length) int64, the tokens from each start on; all on one device."""
    if tokens.dtype == torch.uint16:  # not every device can index it
        return tokens.view(torch.int16).unfold(0, length, 1)[starts].long() & 0xFFFF
    return tokens.unfold(0, length, 1)[starts].long()


def _fits(size_bytes: int, device: torch.device) -> bool:
    """Whether tokens of that size are to be held on `device`."""
    if device.type == "cuda":
        return size_bytes <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
    return device.type == "cpu"


class BatchStream:
    """`corpus.batch` step after step, with the starts of many steps drawn in one go.

    Drawing those of one step costs as much dispatch as drawing those of many, and that is no small
    part of a small model's step on a CPU.
    """

    STARTS_AHEAD = 1 << 14  # in few steps where they have many rows

    def __init__(self, corpus: Corpus, seed: int, rows: int, block_size: int):
        self.corpus, self.seed, self.rows, self.block_size = corpus, seed, rows, block_size
        self.steps_ahead = max(1, min(128, self.STARTS_AHEAD // rows))
        self._window, self._starts = -1, None

    def batch(self, step: int, first: int, size: int):
        """Equal to corpus.batch(make_key(seed, step, first), size, block_size)."""
        window, offset = divmod(step, self.steps_ahead)
        tokens = self.corpus.train
        if window != self._window:
            steps = torch.arange(self.steps_ahead, device=tokens.device)
            keys = make_key(self.seed, 0, 0, tokens.device).repeat(self.steps_ahead, 1)
            keys[:, 1] = (steps + window * self.steps_ahead) & 0xFFFFFFFF
            high = len(tokens) - self.block_size
            self._starts = random_integers(keys, SITE_BATCH, range(self.rows), high)
            self._window = window
        return self.corpus._windows(
            tokens, self._starts[offset, first : first + size], self.block_size
        )
