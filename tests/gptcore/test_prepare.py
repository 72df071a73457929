"""Prepared folders: the tokens of the text itself, whatever interrupts their making."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from gptcore import prepare
from gptcore.__main__ import main
from gptcore.config import ConfigError
from gptcore.data import BatchStream, Corpus, Text, load_data
from gptcore.prepare import open_prepared, prepare_folder
from gptcore.tokenizer import before_last_space, tokenizer_for
from kernels.rng import make_key

ROOT = Path(__file__).parents[2]
TEXT = "Ob nah, ob fern:\n\n  “Ça va?” 思い出 — 😀  and so on, and\tso on. " * 40


@pytest.fixture
def small_blocks(monkeypatch):
    """Every few bytes a block, every few blocks a save."""
    monkeypatch.setattr(prepare, "READ_BYTES", 36)
    monkeypatch.setattr(prepare, "SAVE_BYTES", 300)


@pytest.fixture
def text(tmp_path) -> str:
    """Path of TEXT."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def fake_tiktoken(monkeypatch):
    """GPT-2's pattern, words numbered by a hash: what tiktoken does but for the vocabulary."""
    pattern = pytest.importorskip("regex").compile(
        r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    )

    def encode(text):
        return [sum(word.encode()) * 31 % 50257 for word in pattern.findall(text)]

    encoding = types.SimpleNamespace(n_vocab=50257, encode_ordinary=encode)
    module = types.SimpleNamespace(get_encoding=lambda name: encoding)
    monkeypatch.setitem(sys.modules, "tiktoken", module)
    return pattern


def tokens_in(folder: Path, name: str = "tokens.bin") -> bytes:
    return (folder / name).read_bytes()


@pytest.mark.parametrize("kind", ["char", "bytes", "gpt2"])
def test_the_folder_holds_the_tokens_of_the_text(kind, text, tmp_path, small_blocks, request):
    if kind == "gpt2":
        request.getfixturevalue("fake_tiktoken")
    prepare_folder([text], [], tmp_path / "out", kind)
    prepared = open_prepared(tmp_path / "out")
    tokenizer = tokenizer_for(kind, TEXT)
    expected = tokenizer.encode(TEXT)
    assert prepared.vocabulary.state() == tokenizer.state()
    assert prepared.tokens.dtype == expected.dtype and np.array_equal(prepared.tokens, expected)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "tokenizer.json",
        "tokens.bin",
    ]


def test_files_are_joined_and_byte_order_marks_dropped(tmp_path, small_blocks):
    paths = []
    for number, content in enumerate(("\ufeffone\n", "zwei ä\n", "\ufeffthree")):
        paths.append(str(tmp_path / f"{number}.txt"))
        Path(paths[-1]).write_text(content, encoding="utf-8")
    command = ["prepare", *paths[:2], "--val", paths[2], f"--out_dir={tmp_path / 'out'}"]
    assert main(command) == 0
    prepared = open_prepared(tmp_path / "out")
    decode = prepared.vocabulary.decode
    assert decode(prepared.tokens) == "one\nzwei ä\n" and decode(prepared.val) == "three"
    assert prepared.vocabulary.characters == "".join(sorted(set("one\nzwei ä\nthree")))
    corpus = Corpus.build(prepared, prepared.vocabulary, val_fraction=0.5)
    assert (len(corpus.train), len(corpus.val)) == (11, 5)


def test_a_fraction_of_a_folder_with_val_is_refused(text, train_main, tmp_path, capsys):
    prepare_folder([text], [text], tmp_path / "out", "char")
    flags = [f"--data={tmp_path / 'out'}", "--val_fraction=0.2", "--device=cpu"]
    assert train_main([*flags, f"--out_dir={tmp_path / 'run'}"]) == 2
    assert "--val_fraction needs a text that is not split already" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["char", "bytes"])
def test_a_folder_and_its_text_are_the_same_corpus(kind, text, tmp_path):
    prepare_folder([text], [], tmp_path / "out", kind)
    tokenizer = tokenizer_for(kind, TEXT)
    folder, plain = (
        Corpus.build(source, tokenizer, val_fraction=0.2)
        for source in (load_data(str(tmp_path / "out")), Text(TEXT, "test"))
    )
    assert folder.tokens_per_character == plain.tokens_per_character
    for step in (0, 300):
        batches = [BatchStream(c, 7, 6, 16).batch(step, 2, 4) for c in (folder, plain)]
        assert all(map(torch.equal, *batches))
    assert all(map(torch.equal, *(list(c.validation(3, 16))[-1] for c in (folder, plain))))


def test_training_on_a_folder_is_training_on_its_text(train_main, tiny_flags, tmp_path):
    flags, (data,) = tiny_flags[:-1], (f.removeprefix("--data=") for f in tiny_flags[-1:])
    assert main(["prepare", data, f"--out_dir={tmp_path / 'tokens'}"]) == 0
    runs = {"plain": data, "folder": str(tmp_path / "tokens")}
    for name, source in runs.items():
        assert train_main([*flags, f"--data={source}", f"--out_dir={tmp_path / name}"]) == 0
    weights = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in runs]
    assert weights[0] == weights[1]
    again = [f"--out_dir={tmp_path / 'folder'}", "--resume", "--max_iters=14"]
    assert train_main(again) == 0
    assert main(["eval", str(tmp_path / "folder")]) == 0


# ---- interruptions ---------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from gptcore import prepare
from gptcore.tokenizer import CharacterSet, CharTokenizer
prepare.READ_BYTES, prepare.SAVE_BYTES, moment = 36, 300, int(sys.argv[1])
for owner, name in ((CharacterSet, "add"), (CharTokenizer, "encode"), (os, "replace")):
    def counted(*arguments, work=getattr(owner, name)):
        global moment
        moment -= 1
        if moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*arguments)
    setattr(owner, name, counted)
from gptcore.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("moments", [(1, 60), (100, 20), (150, 30), (178, 5)])
def test_killed_it_goes_on_to_the_same_bytes(moments, text, tmp_path):
    """Twice killed without warning, the third run ends as an undisturbed one does."""
    command = ["prepare", text, f"--out_dir={tmp_path / 'out'}"]
    for moment in moments:
        argv = [sys.executable, "-c", KILLED, str(moment), *command]
        killed = subprocess.run(argv, cwd=ROOT, capture_output=True, timeout=600)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        with pytest.raises(ConfigError, match="interrupted|not one of"):
            open_prepared(tmp_path / "out")
    assert main(command) == 0
    prepare_folder([text], [], tmp_path / "whole", "char")
    assert tokens_in(tmp_path / "out") == tokens_in(tmp_path / "whole")
    assert open_prepared(tmp_path / "out").sha256 == open_prepared(tmp_path / "whole").sha256


def interrupted(monkeypatch, text, folder, after: int) -> None:
    """Prepare, broken off when `after` pieces are encoded."""
    encode = prepare.CharTokenizer.encode
    pieces = iter(range(after))

    def breaks(tokenizer, piece):
        if next(pieces, None) is None:
            raise KeyboardInterrupt
        return encode(tokenizer, piece)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare.CharTokenizer, "encode", breaks)
        prepare_folder([text], [], folder, "char")


def test_going_on_reads_only_what_is_left(text, tmp_path, small_blocks, monkeypatch):
    interrupted(monkeypatch, text, tmp_path / "out", 50)
    state = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert state["encoded"][1] > 1000 and state["bytes"]["tokens.bin"] > 700
    positions = []
    texts = prepare._texts

    def watched(inputs, start, cut):
        positions.append(list(start))
        return texts(inputs, start, cut)

    monkeypatch.setattr(prepare, "_texts", watched)
    prepare_folder([text], [], tmp_path / "out", "char")
    assert positions == [[0, os.path.getsize(text)], state["encoded"]]
    assert tokens_in(tmp_path / "out") == bytes(tokenizer_for("char", TEXT).encode(TEXT))


def test_tokens_that_are_gone_are_not_made_up(text, tmp_path, small_blocks, monkeypatch, capsys):
    """Going on would fill the gap with zeros, and record their checksum."""
    folder = tmp_path / "out"
    interrupted(monkeypatch, text, folder, 50)
    os.truncate(folder / "tokens.bin", 700)
    assert main(["prepare", text, f"--out_dir={folder}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"tokens.bin is shorter than progress.json says; delete {folder}" in line
    assert (folder / "tokens.bin").stat().st_size == 700


def test_a_whole_folder_is_left_alone(text, tmp_path, capsys):
    command = ["prepare", text, f"--out_dir={tmp_path / 'out'}"]
    assert main(command) == 0
    before = (tmp_path / "out" / "tokens.bin").stat().st_mtime_ns
    assert main(command) == 0
    assert "whole already" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokens.bin").stat().st_mtime_ns == before


def test_one_process_at_a_time_prepares_a_folder(text, tmp_path, small_blocks, monkeypatch, capsys):
    """A second one is refused in the midst of the first, which ends as if alone."""
    pytest.importorskip("fcntl", reason="locks are POSIX")
    command, codes = ["prepare", text, f"--out_dir={tmp_path / 'out'}"], []
    encode = prepare.CharTokenizer.encode

    def meanwhile(tokenizer, piece):
        if len(codes) < 50:
            codes.append(0)
            if len(codes) in (1, 50):  # as this one begins to write, and after it saved
                codes[-1] = main(command)
        return encode(tokenizer, piece)

    with monkeypatch.context() as patch:
        patch.setattr(prepare.CharTokenizer, "encode", meanwhile)
        assert main(command) == 0
    assert (codes[0], codes[-1]) == (2, 2)
    error = f"error: another process or thread prepares {tmp_path / 'out'}; wait for its end"
    assert capsys.readouterr().err.count(error) == 2
    assert tokens_in(tmp_path / "out") == bytes(tokenizer_for("char", TEXT).encode(TEXT))
    open_prepared(tmp_path / "out")
    assert main(command) == 0  # nobody holds it any more


def test_a_file_of_the_users_own_is_no_beginning(text, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "tokens.bin").write_bytes(b"mine")
    fails(capsys, ["prepare", text, f"--out_dir={folder}"], "holds no preparation to go on with")
    assert [path.name for path in folder.iterdir()] == ["tokens.bin"]
    assert tokens_in(folder) == b"mine"
    (folder / "tokens.bin").write_bytes(b"")  # as of one killed when it had just begun
    assert main(["prepare", text, f"--out_dir={folder}"]) == 0


def test_a_full_disk_keeps_what_is_there(text, tmp_path, small_blocks, monkeypatch, capsys):
    import errno

    fsync, calls = os.fsync, iter(range(8))

    def full(descriptor):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    command = ["prepare", text, f"--out_dir={tmp_path / 'out'}"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in error and "it goes on" in error
    assert main(command) == 0


# ---- memory and devices ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_no_piece_is_longer_than_a_block(kind, text, small_blocks, request):
    cut = len if kind == "char" else before_last_space
    pieces = list(prepare._texts([{"path": text}], (0, 0), cut))
    assert "".join(piece for piece, _ in pieces) == TEXT
    assert max(len(piece.encode()) for piece, _ in pieces) <= (40 if kind == "char" else 74)
    assert pieces[-1][1] == [0, os.path.getsize(text)]


def test_words_without_end_are_refused(tmp_path, monkeypatch, small_blocks):
    monkeypatch.setattr(prepare, "LONGEST_PIECE_BYTES", 100)
    path = tmp_path / "long.txt"
    path.write_text("x" * 1000)
    with pytest.raises(ConfigError, match="no space or new line.*--tokenizer bytes"):
        list(prepare._texts([{"path": str(path)}], (0, 0), before_last_space))


@pytest.mark.parametrize(
    "text", ["a b", "ab\n\n cd", "a  b", "it's\t ok  \n", "x 　 y", "\n\n", "abc", "", TEXT]
)
def test_cuts_do_not_change_the_words(text, fake_tiktoken):
    """Every cut of every beginning of a text parts it where the whole is parted."""
    words = fake_tiktoken.findall(text)
    for end in range(min(len(text), 200)):
        cut = before_last_space(text[:end])
        assert fake_tiktoken.findall(text[:cut]) + fake_tiktoken.findall(text[cut:]) == words


def test_tokens_are_mapped_not_read(text, tmp_path):
    prepare_folder([text], [], tmp_path / "out", "bytes")
    prepared = load_data(str(tmp_path / "out"))
    corpus = Corpus.build(prepared, prepared.vocabulary)
    assert isinstance(prepared.tokens, np.memmap) and not corpus.on_host
    assert corpus.train.data_ptr() == prepared.tokens.ctypes.data
    corpus.train[0] = 255  # stays in memory
    assert open_prepared(tmp_path / "out").tokens[0] != 255


def test_what_does_not_fit_the_device_is_gathered_on_the_host():
    """The device "meta" has room for nothing: the batches arrive there, the tokens do not."""
    corpus = Corpus.build(Text(TEXT, "test"), tokenizer_for("char", TEXT), device="meta")
    assert corpus.on_host and corpus.train.device.type == "cpu"
    for batch in (
        corpus.batch(make_key(1, 2, 0), 4, 16),
        BatchStream(corpus, 1, 4, 16).batch(2, 0, 4),
        *corpus.validation(2, 64),
        *corpus.training_sample(1, 4, 16),
    ):
        assert all(x.device.type == "meta" and x.dtype == torch.int64 for x in batch)


@pytest.mark.parametrize("flags", [(), ("--gradient_accumulation_steps=2",)])
def test_fetched_batches_are_the_streams(prepared, flags):
    """As on a GPU whose memory the corpus exceeds: fixed buffers, filled before each update."""
    plain, fetching = prepared(*flags).update, prepared(*flags).update
    for _ in range(4):
        fetching._fetch()
        assert torch.equal(plain(), fetching())
    assert len(fetching.fetched) == len(flags) + 1


@pytest.mark.parametrize(
    "limit, windows", [(None, 25), (199, 25), (198, 24), (96, 12), (20, 2), (1, 1)]
)
def test_evaluation_of_a_long_split_is_bounded(limit, windows):
    text = Text("".join(map(chr, range(256, 2256))), "test")
    corpus = Corpus.build(text, tokenizer_for("char", text.content), eval_tokens=limit)
    batches = list(corpus.validation(5, 8))
    assert sum(len(idx) for idx, _ in batches) == windows
    taken = [row.tolist() for idx, targets in batches for row in idx[targets[:, -1] >= 0]]
    every = [row.tolist() for row in corpus.val[:192].long().view(24, 8)]
    starts = [every.index(row) for row in taken]
    assert len(set(starts)) == len(starts) and starts == sorted(starts)
    assert starts[0] == 0 and (windows < 12 or starts[-1] >= 22)  # spread over the split


def test_the_run_says_how_much_is_evaluated(train_main, tiny_flags, tmp_path, capsys):
    """And says exact only of all of it; `eval` says the same."""
    flags, folder = [*tiny_flags, "--max_iters=1"], str(tmp_path / "run")
    assert train_main([*flags, "--eval_tokens=100", f"--out_dir={folder}"]) == 0
    out = capsys.readouterr().out
    assert "100 of them, spread evenly, are evaluated" in out and "exact" not in out
    assert re.search(r"\nvalidation loss [\d.]+ over 96 of 599 targets \(", out)
    assert main(["eval", folder]) == 0
    assert capsys.readouterr().out.endswith(", 96 of 599 targets\n")
    assert train_main([*flags, f"--out_dir={folder}2"]) == 0
    assert re.search(r"\nexact validation loss [\d.]+ over 599 targets \(", capsys.readouterr().out)
    assert main(["eval", folder + "2"]) == 0
    assert capsys.readouterr().out.endswith(", 599 targets\n")


# ---- bad input -------------------------------------------------------------------------------


def fails(capsys, argv, message, code=2, command=main):
    capsys.readouterr()
    assert command(argv) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error), error


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read it: No such file"),
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"abc\n" * 30 + b"\xe9t\xe9", "not UTF-8 at byte 120; convert it"),
        (b"abc\n" * 30 + "é".encode()[:1], "not UTF-8 at byte 120; convert it"),
    ],
    ids=["missing", "empty", "mark", "latin1", "cut-off"],
)
@pytest.mark.parametrize("kind", ["char", "bytes"])
def test_bad_files(content, message, kind, tmp_path, capsys, small_blocks):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    fails(capsys, ["prepare", str(path), f"--tokenizer={kind}"], message)
    assert not (tmp_path / "bad.txt.tokens" / "manifest.json").exists()


def test_bad_folders(text, tmp_path, capsys, monkeypatch):
    fails(capsys, ["prepare", str(tmp_path)], "not a file")
    fails(capsys, ["prepare", text, "--tokenizer=words"], "invalid choice")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    fails(capsys, ["prepare", text, f"--out_dir={tmp_path / 'full'}"], "give another --out_dir")
    other = tmp_path / "other.txt"
    other.write_text("other")
    prepare_folder([str(other)], [], tmp_path / "out", "char")
    for flags in ([text], [str(other), "--tokenizer=bytes"]):
        fails(capsys, ["prepare", *flags, f"--out_dir={tmp_path / 'out'}"], "of other texts or")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "READ_BYTES", 36)
        interrupted(patch, text, tmp_path / "half", 5)
    os.utime(text, ns=(0, 0))
    fails(capsys, ["prepare", text, f"--out_dir={tmp_path / 'half'}"], "that have changed since")


def damaged(folder: Path, name: str, change) -> None:
    content = bytearray((folder / name).read_bytes())
    (folder / name).write_bytes(change(content))


def flipped(content):
    content[len(content) // 2] ^= 1
    return content


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("tokens.bin", flipped, "damaged .its sha256"),
        ("tokens.bin", lambda content: content[:-1], "damaged .its bytes"),
        ("tokenizer.json", flipped, "damaged .its sha256"),
        ("manifest.json", lambda content: content[:-5], "no valid manifest.json"),
        ("manifest.json", lambda content: b"[]", "no valid manifest.json"),
        (
            "manifest.json",
            lambda content: content.replace(b'"format": 1', b'"format": 9'),
            "format 9",
        ),
        ("manifest.json", lambda content: content.replace(b"tokens.bin", b"../../x"), "no valid"),
    ],
    ids=["flip", "short", "tokenizer", "manifest", "list", "format", "escape"],
)
def test_damaged_folders(name, change, message, text, tmp_path, capsys, train_main):
    prepare_folder([text], [], tmp_path / "out", "char")
    damaged(tmp_path / "out", name, change)
    flags = [f"--data={tmp_path / 'out'}", f"--out_dir={tmp_path / 'run'}"]
    fails(capsys, flags, message, command=train_main)
    assert not (tmp_path / "run").exists()
    if "damaged" in message:  # and preparing again does not call it whole
        fails(capsys, ["prepare", text, f"--out_dir={tmp_path / 'out'}"], message)


@pytest.mark.parametrize("kind", ["char", "bytes"])
def test_interrupted_at_once_it_goes_on(kind, text, tmp_path, monkeypatch):
    command = ["prepare", text, f"--out_dir={tmp_path / 'out'}", f"--tokenizer={kind}"]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_texts", interrupt)
        assert main(command) == 1
    assert main(command) == 0


def test_ids_beyond_the_vocabulary(text, tmp_path):
    """A folder whose checksums are right and whose tokens are not."""
    folder = tmp_path / "out"
    prepare_folder([text], [], folder, "char")
    damaged(folder, "tokens.bin", lambda content: content[:-1] + b"\xff")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["tokens.bin"] = prepare.fingerprint(folder / "tokens.bin")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="ids from 0 to 255, the vocabulary has"):
        open_prepared(folder)


def test_other_tokenizers_are_refused(text, tmp_path, capsys, train_main, trained_run):
    prepare_folder([text], [], tmp_path / "out", "bytes")
    flags = [f"--data={tmp_path / 'out'}", f"--out_dir={tmp_path / 'run'}"]
    fails(capsys, [*flags, "--tokenizer=char"], "its tokenizer is bytes", command=train_main)
    fails(capsys, ["eval", str(trained_run), flags[0]], "another vocabulary than the model's")


# ---- at scale --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the memory of a process")
def test_a_gigabyte_in_bounded_memory(tmp_path, text_file):
    """1 GB of text, prepared and trained on, never in memory; prints sizes and times.

    Pages of the file that stay mapped are the page cache's, which takes them back at need, so
    what counts is the memory that is the process's own.
    """
    path, words = tmp_path / "big.txt", Path(text_file).read_text()
    block = (words + "Überall ist es 思い出.\n").encode() * 160  # about 1 MB
    with open(path, "wb") as file:
        while file.tell() < 1 << 30:
            file.write(block)
    folder = tmp_path / "tokens"
    prepared, peak, seconds = measured("-m", "gptcore", "prepare", str(path), f"--out_dir={folder}")
    characters = path.stat().st_size // len(block) * len(block.decode())
    assert (folder / "tokens.bin").stat().st_size == characters and f"{characters:,}" in prepared
    print(f"{path.stat().st_size:,} bytes -> {characters:,} tokens, {seconds:.1f} s, {peak:.0f} MB")
    assert peak < 300
    flags = "--preset=cpu --max_iters=8 --eval_interval=8 --eval_iters=2 --eval_tokens=4096"
    run = f"--out_dir={tmp_path / 'run'}"
    small = measured("train.py", *flags.split(), f"--data={text_file}", run + "0")[1]
    _, peak, seconds = measured("train.py", *flags.split(), f"--data={folder}", run)
    print(f"trained 8 steps: {seconds:.1f} s, {peak:.0f} MB, on a small text {small:.0f} MB")
    assert peak < small + 100


def measured(*argv: str) -> tuple[str, float, float]:
    """Run Python with `argv`: its output, the most memory of its own in MB, seconds."""
    start, peak_kb = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            peak_kb = max(peak_kb, int(found[1]))
        time.sleep(0.02)
    out = process.communicate()[0]
    assert process.returncode == 0, out
    return out, peak_kb / 1e3, time.perf_counter() - start
