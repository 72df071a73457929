"""Where texts come from, and batches as a pure function of (seed, step)."""

import dataclasses
import hashlib
import http.client
import io
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from gptcore import data
from gptcore.config import ConfigError
from gptcore.data import BatchStream, Corpus, Text, load_text, windows
from gptcore.tokenizer import CharTokenizer, tokenizer_for
from kernels.rng import SITE_BATCH, SITE_EVALUATION, make_key, random_integers

FAKE = "To be, or not to be.\n" * 40


@pytest.fixture
def no_sources(monkeypatch, tmp_path):
    """An empty cache, no data folder, no network; counts the tries to reach it."""
    tries = []

    def unreachable(url, timeout):
        tries.append(url)
        assert 0 < timeout <= 30
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GPTCORE_DATA_DIR", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    return tries


@pytest.fixture
def fake_shakespeare(monkeypatch):
    """Makes FAKE pass for Tiny Shakespeare."""
    digest = hashlib.sha256(FAKE.encode()).hexdigest()
    monkeypatch.setattr(data, "TINY_SHAKESPEARE_SHA256", digest)


def corpus_of(text: str, kind: str = "char", **options) -> Corpus:
    return Corpus.build(Text(text, "test"), tokenizer_for(kind, text), **options)


@pytest.fixture(scope="module")
def corpus():
    return corpus_of("".join(chr(97 + i * i % 26) for i in range(2000)))


def test_the_real_corpus(monkeypatch):
    folder = os.environ.get("GPTCORE_DATA_DIR")
    path = Path(folder or "/nonexistent") / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("GPTCORE_DATA_DIR holds no tinyshakespeare.txt")
    text = load_text("auto")
    assert len(text.content) == 1_115_394 and not text.note
    corpus = corpus_of(text.content)
    assert (len(corpus.train), len(corpus.val)) == (1_003_854, 111_540)
    assert corpus.tokenizer.vocab_size == 65 and corpus.train.dtype == torch.uint8


def test_embedded_text_where_nothing_can_be_had(no_sources):
    text = load_text("auto")
    assert len(no_sources) == 1
    assert text.source == "pydoc_data.topics" and len(text.content) > 300_000
    assert "Tiny Shakespeare cannot be had (no network)" in text.note
    assert load_text("pydoc").content == text.content and load_text("pydoc").note == ""


def test_asked_for_by_name_nothing_else_is_served(no_sources):
    with pytest.raises(ConfigError, match=r"cannot be downloaded \(no network\).*GPTCORE_DATA_DIR"):
        load_text("tinyshakespeare")


def test_downloads_once_and_caches(no_sources, fake_shakespeare, monkeypatch):
    responses = [io.BytesIO(FAKE.encode())]
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: responses.pop())
    assert load_text("auto").content == FAKE
    cached = data.cache_dir() / "tinyshakespeare.txt"
    assert cached.read_text() == FAKE and list(cached.parent.iterdir()) == [cached]
    assert load_text("auto").content == FAKE  # a second download would raise IndexError


def test_a_user_without_a_home_has_a_cache(no_sources, fake_shakespeare, monkeypatch, tmp_path):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(data.tempfile, "gettempdir", lambda: str(tmp_path))
    assert load_text("auto").source == "pydoc_data.topics"
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(FAKE.encode()))
    assert load_text("auto").content == FAKE
    assert (tmp_path / "gptcore" / "tinyshakespeare.txt").read_text() == FAKE


def test_a_damaged_cache_is_downloaded_again(no_sources, fake_shakespeare, monkeypatch):
    cached = data.cache_dir() / "tinyshakespeare.txt"
    cached.parent.mkdir(parents=True)
    cached.write_text(FAKE[:-1])
    assert load_text("auto").source == "pydoc_data.topics" and len(no_sources) == 1
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(FAKE.encode()))
    assert load_text("auto").content == FAKE and cached.read_text() == FAKE


def test_a_download_with_another_checksum_is_not_used(no_sources, fake_shakespeare, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>"))
    assert "another SHA-256" in load_text("auto").note
    assert not (data.cache_dir() / "tinyshakespeare.txt").exists()


@pytest.mark.parametrize("what", ["body cut short", "no status line"])
def test_a_broken_download_is_not_used(no_sources, fake_shakespeare, monkeypatch, what):
    """What http.client raises then is no OSError."""

    class Response(io.BytesIO):
        def read(self):
            raise http.client.IncompleteRead(FAKE[:9].encode(), len(FAKE) - 9)

    def urlopen(url, timeout):
        if what == "no status line":
            raise http.client.BadStatusLine("garbage")
        return Response()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    text = load_text("auto")
    assert text.source == "pydoc_data.topics"
    assert ("IncompleteRead" if what == "body cut short" else "garbage") in text.note
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        load_text("tinyshakespeare")
    assert not data.cache_dir().exists()


def test_data_folder_is_used_and_checked(no_sources, fake_shakespeare, monkeypatch, tmp_path):
    """After the cache, before the network."""
    monkeypatch.setenv("GPTCORE_DATA_DIR", str(tmp_path))
    (tmp_path / "tinyshakespeare.txt").write_text(FAKE)
    assert load_text("auto").content == FAKE and no_sources == []
    (tmp_path / "tinyshakespeare.txt").write_text(FAKE + "!")
    with pytest.raises(ConfigError, match="is not Tiny Shakespeare: its SHA-256 must be"):
        load_text("auto")
    cached = data.cache_dir() / "tinyshakespeare.txt"
    cached.parent.mkdir(parents=True)
    cached.write_text(FAKE)
    assert load_text("auto").source == f"tinyshakespeare ({cached})"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"abc\xe9def", "not UTF-8 at byte 3; convert it"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_text(str(path))


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(ConfigError, match="cannot read it"):
        load_text(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_may_never_end_is_refused(tmp_path):
    """/dev/zero was read until the memory was full; a pipe's text is not there for --resume."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "link", "/dev/zero"):
        with pytest.raises(ConfigError, match="cannot read it: not a regular file; give a text"):
            load_text(str(path))


def test_files_are_read_as_they_are_but_for_the_mark(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\n")
    assert load_text(str(path)).content == "a\r\nb\n"


@pytest.mark.parametrize("length", [1, 9, 80, 90])
def test_text_shorter_than_a_block(length):
    corpus = corpus_of("a" * length)
    if length == 90:
        corpus.check_block(8)  # 81 and 9 tokens: just enough
        return
    with pytest.raises(ConfigError, match="shorter than a block.*more text"):
        corpus.check_block(8)


def test_split_is_the_notebooks():
    text = "".join(chr(32 + i % 90) for i in range(1003))
    corpus = corpus_of(text)
    n = int(0.9 * len(text))
    decode = corpus.tokenizer.decode
    assert decode(corpus.train.tolist()) == text[:n] and decode(corpus.val.tolist()) == text[n:]


def test_batches_are_windows_and_targets_are_one_ahead(corpus):
    key = make_key(5, 3, 0)
    idx, targets = corpus.batch(key, 7, 16)
    starts = random_integers(key, SITE_BATCH, range(7), len(corpus.train) - 16)
    for row, start in enumerate(starts.tolist()):
        assert idx[row].tolist() == corpus.train[start : start + 16].tolist()
        assert targets[row].tolist() == corpus.train[start + 1 : start + 17].tolist()
    assert idx.dtype == targets.dtype == torch.int64


def test_every_start_is_possible_and_none_runs_over():
    corpus = corpus_of("abcdefghijklmnopqrst")  # 18 training tokens: starts 0..13 for block 4
    idx, targets = corpus.batch(make_key(1, 1), 500, 4)
    assert {tuple(row) for row in idx.tolist()} == {
        tuple(corpus.train[s : s + 4].tolist()) for s in range(14)
    }


def test_a_batch_is_a_function_of_seed_step_and_row(corpus):
    whole = corpus.batch(make_key(1, 2, 0), 8, 16)[0]
    halves = [corpus.batch(make_key(1, 2, first), 4, 16)[0] for first in (0, 4)]
    assert torch.equal(whole, torch.cat(halves))
    for key in (make_key(2, 2), make_key(1, 3)):
        assert not torch.equal(whole, corpus.batch(key, 8, 16)[0])
    assert not torch.equal(whole, corpus.batch(make_key(1, 2), 8, 16, site=SITE_EVALUATION)[0])


@pytest.mark.parametrize("order", [range(0, 300, 37), [200, 0, 127, 128, 2**32 - 1]])
def test_the_stream_draws_what_single_batches_draw(corpus, order):
    stream = BatchStream(corpus, 9, 6, 16)
    for step in order:
        for first in (0, 3):
            expected = corpus.batch(make_key(9, step, first), 3, 16)
            assert all(map(torch.equal, stream.batch(step, first, 3), expected))


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32"])
def test_all_token_dtypes_index_alike(kind):
    tokens = torch.arange(200) + (0 if kind == "uint8" else 40_000)
    window = windows(tokens.to(getattr(torch, kind)), torch.tensor([0, 150]), 9)
    assert torch.equal(window, torch.stack([tokens[:9], tokens[150:159]]))


@pytest.mark.parametrize("block_size", [3, 7, 16, 198])
def test_validation_counts_every_token_once(corpus, block_size):
    batches = list(corpus.validation(5, block_size))
    assert {x.shape[1] for batch in batches for x in batch} == {block_size}
    idx, targets = (torch.cat([x.flatten() for x in xs]) for xs in zip(*batches, strict=True))
    count = len(corpus.val) - 1
    assert torch.equal(targets[:count], corpus.val[1:].long())
    assert torch.equal(idx[:count], corpus.val[:-1].long())
    assert len(idx) - count < block_size and targets[count:].tolist() == [-100] * (len(idx) - count)


def test_training_sample_spans_the_split_evenly(corpus):
    tokens = torch.arange(len(corpus.train))
    batches = list(dataclasses.replace(corpus, train=tokens).training_sample(3, 4, 16))
    assert [len(idx) for idx, _ in batches] == [4, 4, 4]
    starts = torch.cat([idx[:, 0] for idx, _ in batches])
    assert starts[0] == 0 and torch.equal(batches[-1][1][-1], tokens[-16:])
    assert starts.diff().max() - starts.diff().min() <= 1


def test_a_quarter_of_what_is_free_on_a_gpu_is_for_tokens(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    device = torch.device("cuda")
    assert data._fits(250, device) and not data._fits(251, device)


def test_validation_characters_of_other_tokenizers():
    corpus = corpus_of("é" * 100, "bytes")
    assert (len(corpus.val), corpus.tokens_per_character) == (20, 2.0)
    assert corpus_of("é" * 100).tokens_per_character == 1.0


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ConfigError, match="the file is empty; give one with text"):
        data.read_text_file(str(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("text", "start"), [("LEONTES: The", "LEONTES:"), ("The end", "The"), ("of all that", "all")]
)
def test_a_sample_starts_with_what_the_text_can_spell(tmp_path, text, start):
    """Whatever the file's name promises."""
    path = tmp_path / "my-tinyshakespeare.txt"
    path.write_text(f"{text} " * 20)
    read = data.read_text_file(str(path))
    assert Corpus.build(read, CharTokenizer.of(read.content)).example() == start
