"""Text to token ids and back: characters, bytes, or GPT-2's byte pairs.

A tokenizer has `kind`, `vocab_size`, `encode(text) -> numpy array`, `token_bytes(id) -> bytes`,
`decode(ids) -> str`, `cut(text) -> int` for texts that come in pieces, and `state() -> dict`, from
which `from_state` makes it again.
"""

import codecs
from collections.abc import Iterable, Iterator

import numpy as np

from gptcore.config import ConfigError


class Tokenizer:
    """What all tokenizers share: decoding through the bytes of each token."""

    kind: str
    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """(tokens,) integers of the smallest dtype that holds the vocabulary."""
        raise NotImplementedError

    def cut(self, text: str) -> int:
        """The last place where `text` may be parted: the parts encode as the whole does."""
        return len(text)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that one token stands for."""
        raise NotImplementedError

    def state(self) -> dict:
        """What `from_state` needs, as JSON values."""
        return {"kind": self.kind}

    def newline(self) -> str:
        """A new line, or the first token of a vocabulary that has none."""
        try:
            self.encode("\n")
        except ConfigError:
            return self.decode([0])
        return "\n"

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
        return "".join(self.decode_stream(tokens))

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield text as soon as whole characters are there, one piece a token, then the rest.

        Raises: ConfigError on a token outside the vocabulary.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in map(int, tokens):
            if not 0 <= token < self.vocab_size:
                raise ConfigError(f"decode: tokens must be in [0, {self.vocab_size}); got {token}")
            yield decoder.decode(self.token_bytes(token))
        yield decoder.decode(b"", final=True)


class CharTokenizer(Tokenizer):
    """One token a character; ids in the order of code points, as the notebook has them."""

    kind = "char"

    def __init__(self, characters: str):
        points = _code_points(characters).astype(np.int64)
        surrogates = (points >= 0xD800) & (points < 0xE000)
        if len(points) == 0 or (np.diff(points) <= 0).any() or surrogates.any():
            raise ConfigError(
                "CharTokenizer: characters must be at least one, distinct, sorted and whole; "
                f"got {characters[:50]!r}"
            )
        self.characters = characters
        self.vocab_size = len(points)
        self._bytes = [character.encode("utf-8") for character in characters]
        self._id_of_point = np.full(int(points[-1]) + 2, -1, dtype=np.int32)
        self._id_of_point[points] = np.arange(len(points))

    @classmethod
    def of(cls, text: str) -> "CharTokenizer":
        """The tokenizer of exactly the characters in `text`."""
        return cls(str(CharacterSet(text)))

    def encode(self, text: str) -> np.ndarray:
        """Raises: ConfigError naming the characters the vocabulary lacks."""
        points = _code_points(text)
        ids = self._id_of_point.take(points, mode="clip")  # beyond the last there is a -1
        if len(ids) and ids.min() < 0:
            unseen = "".join(map(chr, np.unique(points[ids < 0])[:20]))
            raise ConfigError(
                f"text has characters the model has never seen: {unseen!r}; leave them out, "
                f"it knows {self.characters!r}"
            )
        return ids.astype(compact_dtype(self.vocab_size))

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def state(self) -> dict:
        return {"kind": self.kind, "characters": self.characters}


class BytesTokenizer(Tokenizer):
    """One token a UTF-8 byte: 256 tokens, any text."""

    kind = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8).copy()

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, through the optional package tiktoken."""

    kind = "gpt2"

    def __init__(self):
        try:
            import tiktoken
        except ImportError as error:
            raise ConfigError(
                "tokenizer gpt2 needs the package tiktoken; pip install -e '.[bpe]', "
                "or use --tokenizer char or bytes"
            ) from error
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        # requests' exceptions are OSErrors; where a login page came instead, its hash is another.
        except (OSError, ValueError) as error:
            raise ConfigError(
                "tokenizer gpt2: its vocabulary is neither cached nor can it be downloaded "
                f"({type(error).__name__}); go online once, set TIKTOKEN_CACHE_DIR, or use "
                "--tokenizer char or bytes"
            ) from error
        self.vocab_size = self._encoding.n_vocab

    def encode(self, text: str) -> np.ndarray:
        ids = self._encoding.encode_ordinary(text)
        return np.array(ids, dtype=compact_dtype(self.vocab_size))

    def cut(self, text: str) -> int:
        return before_last_space(text)

    def token_bytes(self, token: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token)


class CharacterSet:
    """The characters of texts that come in pieces; `str` of it is sorted."""

    def __init__(self, characters: str = ""):
        self._seen = np.zeros(0x110000, dtype=bool)
        self.add(characters)

    def add(self, text: str) -> None:
        """Every character of `text` belongs to it."""
        self._seen[_code_points(text)] = True

    def __str__(self) -> str:
        return "".join(map(chr, np.flatnonzero(self._seen)))


def before_last_space(text: str) -> int:
    """The last place in `text` between something and a space or new line after it, else 0.

    There GPT-2's pattern always parts a text, whatever follows.
    """
    for end in range(len(text) - 1, 0, -1):
        if text[end] in " \n" and not text[end - 1].isspace():
            return end
    return 0


def compact_dtype(vocab_size: int) -> type:
    """The smallest of uint8, uint16, int32 that holds every id."""
    return np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.int32


def tokenizer_for(kind: str, text: str) -> Tokenizer:
    """The tokenizer `kind` for a new run on `text`.

    Raises: ConfigError for an unknown kind or one that cannot be had.
    """
    if kind == "char":
        return CharTokenizer.of(text)
    return from_state({"kind": kind})


def from_state(state: dict) -> Tokenizer:
    """The tokenizer that `state()` came from.

    Raises: ConfigError if `state` is not one of a tokenizer.
    """
    kind = state.get("kind") if isinstance(state, dict) else None
    if kind == "char" and isinstance(state.get("characters"), str):
        return CharTokenizer(state["characters"])
    if kind == "bytes":
        return BytesTokenizer()
    if kind == "gpt2":
        return GPT2Tokenizer()
    raise ConfigError(f"tokenizer must be char (with its characters), bytes or gpt2; got {kind!r}")


def _code_points(text: str) -> np.ndarray:
    """(characters,) uint32; lone surrogates, which a terminal may send, pass through."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
