"""Text to tokens and back."""

import builtins
import sys
import types

import numpy as np
import pytest

from gptcore.config import ConfigError
from gptcore.tokenizer import (
    BytesTokenizer,
    CharTokenizer,
    compact_dtype,
    from_state,
    tokenizer_for,
)

TEXTS = ["hello\nworld", "a", "naïve café, 你好 \U0001f600 ok", "\r\n\t\x00"]


@pytest.mark.parametrize("kind", ["char", "bytes"])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_decoding_undoes_encoding(kind, text):
    tokenizer = tokenizer_for(kind, text)
    tokens = tokenizer.encode(text)
    assert tokens.dtype == compact_dtype(tokenizer.vocab_size)
    assert tokenizer.decode(tokens.tolist()) == text
    again = from_state(tokenizer.state())
    assert (again.encode(text) == tokens).all() and again.vocab_size == tokenizer.vocab_size


def test_characters_are_numbered_as_the_notebook_does():
    text = "First Citizen: 你好"
    characters = sorted(set(text))
    tokenizer = CharTokenizer.of(text)
    assert tokenizer.encode(text).tolist() == [characters.index(c) for c in text]
    assert tokenizer.vocab_size == len(characters)


def test_unseen_characters_are_named():
    tokenizer = CharTokenizer.of("abc")
    for prompt, unseen in (("abXcY", "'XY'"), ("é", "'é'"), ("\U0001f600", "'\U0001f600'")):
        with pytest.raises(ConfigError, match="never seen") as error:
            tokenizer.encode(prompt)
        assert unseen in str(error.value)


def test_an_id_between_known_ones_is_unseen():
    with pytest.raises(ConfigError, match="'b'"):
        CharTokenizer.of("ac").encode("b")  # its code point lies inside the table


def test_streaming_yields_whole_characters_only():
    tokenizer = BytesTokenizer()
    pieces = list(tokenizer.decode_stream(tokenizer.encode("a你b")))
    assert pieces == ["a", "", "", "你", "b", ""]
    cut = tokenizer.encode("你")[:2]
    assert tokenizer.decode(cut) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(("kind", "token"), [("char", -1), ("char", 3), ("bytes", 256)])
def test_tokens_outside_the_vocabulary_are_refused(kind, token):
    tokenizer = tokenizer_for(kind, "abc")
    with pytest.raises(ConfigError, match=rf"in \[0, {tokenizer.vocab_size}\); got {token}"):
        tokenizer.decode([0, token])


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65537, "int32")])
def test_tokens_are_stored_compactly(size, dtype):
    assert np.dtype(compact_dtype(size)) == dtype


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        [],
        {"kind": "word"},
        {"kind": "char"},
        {"kind": "char", "characters": ""},
        {"kind": "char", "characters": "ba"},
        {"kind": "char", "characters": "aa"},
        {"kind": "char", "characters": "a\ud800"},
    ],
)
def test_foreign_states_are_refused(state):
    with pytest.raises(ConfigError):
        from_state(state)


def test_gpt2_without_tiktoken_names_the_fix(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tiktoken":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[bpe\]'"):
        tokenizer_for("gpt2", "x")


@pytest.mark.parametrize(
    "error",
    [ConnectionError("no network"), ValueError("Hash mismatch for data downloaded from")],
    ids=["offline", "a login page"],
)
def test_gpt2_offline_names_the_fix(monkeypatch, error):
    def offline(name):
        raise error

    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=offline))
    with pytest.raises(ConfigError, match="go online once, set TIKTOKEN_CACHE_DIR"):
        tokenizer_for("gpt2", "x")


def test_gpt2_tokens_spell_the_text(monkeypatch):
    """With a byte-pair vocabulary of our own, since GPT-2's is a download."""
    tiktoken = pytest.importorskip("tiktoken", reason="optional extra bpe is not installed")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"he": 256, b"hel": 257}
    encoding = tiktoken.Encoding(
        "ours", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = tokenizer_for("gpt2", "")
    tokens = tokenizer.encode("hel lo 你")
    assert tokens.dtype == np.uint16 and tokens[0] == 257 and tokenizer.vocab_size == 258
    assert tokenizer.decode(tokens) == "hel lo 你"


def test_a_new_line_or_what_comes_first():
    """Where a sample starts by itself; token 0 of bytes is no character to show."""
    assert BytesTokenizer().newline() == CharTokenizer("\t\nab").newline() == "\n"
    assert CharTokenizer("ab").newline() == "a"
