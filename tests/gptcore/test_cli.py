"""The command lines as a user types them; bad input is one line, the fix, exit 2."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptcore import generation, model, trainer
from gptcore.__main__ import main
from gptcore.flags import run_command
from kernels import backend

ROOT = Path(__file__).parents[2]


def fails(capsys, command, argv, message, code=2):
    """Run `command`; one line on stderr with `message`, exit `code`."""
    assert command(argv) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_training_says_what_to_type_next(train_main, tiny_flags, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train_main([*tiny_flags, f"--out-dir={folder}"]) == 0
    out = capsys.readouterr().out
    assert "step 0: train loss" in out and "bits per character" in out
    assert "exact validation loss" in out
    lines = out.splitlines()
    assert lines[-2].split() == ["run", "folder", str(folder)]
    command = lines[-1].split("python -m gptcore ")[1]
    assert command.startswith(f"sample {folder} --start ")  # which has no capital T
    assert main(shlex.split(command)) == 0


def test_default_run_folders_are_numbered(train_main, tiny_flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train_main([*tiny_flags, "--max_iters=0"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "baby-cpu-1",
        "baby-cpu-2",
    ]


def test_offline_training_says_so(train_main, tiny_flags, tmp_path, monkeypatch, capsys):
    import urllib.error
    import urllib.request

    def unreachable(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GPTCORE_DATA_DIR", raising=False)
    flags = [flag for flag in tiny_flags if not flag.startswith("--data")]
    assert train_main([*flags, "--max_iters=2", f"--out_dir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert out.count("WARNING: Tiny Shakespeare cannot be had (no network)") == 2
    assert "pydoc_data.topics" in (tmp_path / "run" / "config.json").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data=/nowhere.txt"], "--data /nowhere.txt: no such file"),
        (["--block_size=1000"], "text shorter than a block"),
        (["--n_heads=2"], "did you mean --n_head?"),
        (["--dropout=1.5"], "dropout must be below 0.99999; got 1.5"),
        (["--device=tpu"], "device must be auto, cpu, cuda or cuda:N; got 'tpu'"),
        (["--device=mps"], "device must be auto, cpu, cuda or cuda:N; got 'mps'"),
        (["--device=cuda:99"], "device cuda:99: torch"),
        (["--resume"], "--resume needs the run folder; add --out_dir"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_training_input_leaves_nothing_behind(
    train_main, tiny_flags, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    fails(capsys, train_main, [*tiny_flags, *flags], message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        *("train --out_dir=", "train --preset=", "train --data=", "train --init_from="),
        *("train --n_embd=8 --backend=", "lr_range --out_dir=", "lr_range --preset="),
        *("sweep --grid=n_embd=8,16 --out_dir=", "sweep --grid=n_embd=8,16 --init_from="),
        *("eval RUN --data=", "prepare mine.txt --out_dir=", "import a b --format=nanogpt --data="),
    ],
)
def test_an_empty_value_is_refused(
    train_main, tiny_flags, trained_run, tmp_path, monkeypatch, capsys, command
):
    """--out_dir "$RUN" with RUN unset is not the current folder, whose files it would replace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("mine")
    words = [str(trained_run) if word == "RUN" else word for word in command.split()]
    name, *flags = words
    if name in ("train", "sweep", "lr_range"):
        flags = [*tiny_flags, *flags]
    message = f"{words[-1].strip('-=')} must not be empty; is a shell variable unset?"
    if name == "train":
        fails(capsys, train_main, flags, message)
    else:
        fails(capsys, main, [name, *flags], message)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"


def test_an_empty_folder_name_in_a_file_is_refused(train_main, tiny_flags, tmp_path, capsys):
    (tmp_path / "my.toml").write_text('out_dir = ""\n')
    flags = [*tiny_flags, f"--config={tmp_path / 'my.toml'}"]
    fails(capsys, train_main, flags, "out_dir must not be empty; got ''")


def test_a_backend_that_cannot_run_here(
    train_main, tiny_flags, prepared, tmp_path, monkeypatch, capsys
):
    """Trained on a GPU, used without one: one line with the fix, and the fix works."""
    monkeypatch.setattr(backend, "_INTERPRETING", True)
    run = prepared("--backend=triton", "--dtype=float32", "--max_iters=0")
    trainer.save(run, "best", "last")
    run.writer.wait()
    run.unlock()
    monkeypatch.setattr(backend, "_INTERPRETING", False)
    other, folder = tmp_path / "other", str(run.folder)
    for command, argv in (
        (train_main, [*tiny_flags, f"--out_dir={other}", "--max_iters=0", "--backend=triton"]),
        (train_main, [*tiny_flags, f"--out_dir={other}", "--max_iters=0", f"--init_from={folder}"]),
        (main, ["sample", folder, "--device=cpu", "--max_new_tokens=1"]),
        (main, ["eval", folder, "--device=cpu"]),
        (train_main, [f"--out_dir={folder}", "--resume"]),
    ):
        message = "device cpu: backend 'triton' needs CUDA or ROCm tensors"
        fails(capsys, command, argv, message)
        assert not other.exists()
        assert command([*argv, "--backend=auto"]) == 0
        shutil.rmtree(other, ignore_errors=True)


def test_an_existing_run_folder_is_kept(train_main, tiny_flags, trained_run, tmp_path, capsys):
    before = (trained_run / "metrics.jsonl").read_text()
    flags = [*tiny_flags, f"--out_dir={trained_run}"]
    fails(capsys, train_main, flags, "exists; add --resume to go on with it")
    (tmp_path / "file").touch()
    flags = [*tiny_flags, f"--out_dir={tmp_path / 'file'}"]
    fails(capsys, train_main, flags, "a file, not a folder; give another")
    assert (trained_run / "metrics.jsonl").read_text() == before
    (tmp_path / "letter.txt").write_text("mine")
    flags = [*tiny_flags, f"--out_dir={tmp_path}", "--resume"]
    fails(capsys, train_main, flags, "is not a run folder")
    flags = [*tiny_flags, f"--out_dir={tmp_path / 'letter.txt' / 'x'}"]
    fails(capsys, train_main, flags, "cannot make the run folder: Not a directory")


def test_sampling_is_reproducible(trained_run, capsys):
    def text(*flags):
        assert main(["sample", str(trained_run), "--start", "the", *flags]) == 0
        return capsys.readouterr().out

    options = ("--max-new-tokens=40", "--temperature=0.8", "--top_k=5", "--seed=1")
    first = text(*options)
    assert first.startswith("the") and len(first) == len("the") + 40 + 1
    assert text(*options) == first
    assert text(*options[:-1], "--seed=2") != first
    assert text("--max_new_tokens=0") == "the\n"
    assert text("--checkpoint=last", "--temperature=0", "--max_new_tokens=9") == text(
        "--checkpoint=last", "--top_k=1", "--max_new_tokens=9"
    )


def test_sampling_is_as_asked(trained_run, monkeypatch):
    asked = []
    monkeypatch.setattr(
        generation, "stream", lambda model, idx, **options: asked.append(options) or iter(())
    )
    given = {"max_new_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    given |= {"repetition_penalty": 1.2, "seed": 5}
    for flags in ([], [f"--{name}={value}" for name, value in given.items()]):
        assert main(["sample", str(trained_run), *flags]) == 0
    default, told = asked
    assert (default["max_new_tokens"], default["temperature"]) == (500, 0.8)
    assert {name: told[name] for name in given} == given


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--start=Ünö"], "text has characters the model has never seen: 'Üö'"),
        (["--start="], "start must not be empty"),
        (["--temperature=-1"], "temperature"),
        (["--top_k=0"], "top_k"),
        (["--top_p=2"], "top_p"),
        (["--max_new_tokens=-1"], "max_new_tokens"),
        (["--max_new_tokens=many"], "argument --max_new_tokens: invalid int value: 'many'"),
        (["--max_new_tokens=1000000000000"], "GB free: give a smaller --max_new_tokens or --num"),
        (["--num_samples=1000000000000"], "GB free: give a smaller --max_new_tokens or --num"),
        (["--max_new_tokens=1", f"--num_samples={10**300}"], "GB free: give a smaller"),
        (["--temprature=1"], "unknown flag --temprature; did you mean --temperature?"),
        (["--checkpoint=worst"], "invalid choice: 'worst'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_sampling_input(trained_run, capsys, flags, message):
    fails(capsys, main, ["sample", str(trained_run), *flags], message)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["smaple"], "invalid choice: 'smaple'"),
        (["sample"], "the following arguments are required: RUN"),
        (["sample", "/nowhere"], "/nowhere: no such run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_commands(capsys, argv, message):
    fails(capsys, main, argv, message)


def test_eval_repeats_the_exact_loss(trained_run, tmp_path, capsys):
    from gptcore.log import read_metrics

    assert main(["eval", str(trained_run), "--checkpoint=last", "--device=cpu"]) == 0
    end = read_metrics(trained_run / "metrics.jsonl")[-1]
    assert (
        f"loss {end['val_loss']:.4f}, {end['val_bits_per_character']:.3f} bits per character, "
        f"accuracy {end['val_accuracy']:.1%}, 599 targets\n"
    ) in capsys.readouterr().out
    other = tmp_path / "other.txt"
    for count in (20, 1):  # the second is shorter than a block of 8 and its targets
        other.write_text("the king" * count)
        assert main(["eval", str(trained_run), f"--data={other}"]) == 0
        assert f", {8 * count - 1} targets" in capsys.readouterr().out  # all of it
    other.write_text("t")
    fails(capsys, main, ["eval", str(trained_run), f"--data={other}"], "at least two tokens")
    other.write_text("Zebra!" * 100)
    fails(capsys, main, ["eval", str(trained_run), f"--data={other}"], "never seen")


def test_eval_refuses_a_text_that_has_changed(train_main, tiny_flags, text_file, tmp_path, capsys):
    """Its loss would be another, on other tokens; with --data it is what was asked for."""
    text, folder = shutil.copy(text_file, tmp_path / "text.txt"), str(tmp_path / "run")
    flags = [*tiny_flags, f"--data={text}", f"--out_dir={folder}", "--max_iters=1"]
    assert train_main(flags) == 0
    assert main(["eval", folder]) == 0
    with open(text, "a") as file:
        file.write("the king and queen " * 100)
    capsys.readouterr()
    message = (
        f"the text has changed since: trained on {text}, now there is {text}; give --data FILE"
    )
    fails(capsys, main, ["eval", folder], message)
    assert main(["eval", folder, f"--data={text}"]) == 0
    assert ", 7,899 targets" in capsys.readouterr().out  # all of it
    assert main(["eval", folder, f"--data={text_file}"]) == 0
    assert ", 599 targets" in capsys.readouterr().out  # what was held out of the same text


def test_eval_repeats_a_loss_in_bfloat16_of_so_many_tokens(
    train_main, tiny_flags, tmp_path, capsys
):
    folder, other = tmp_path / "run", tmp_path / "other.txt"
    flags = ["--dtype=bfloat16", "--eval_tokens=64", f"--out_dir={folder}"]
    assert train_main([*tiny_flags, *flags]) == 0
    said = re.search(r"validation loss (\S+) ", capsys.readouterr().out)[1]
    assert main(["eval", str(folder), "--checkpoint=last"]) == 0
    assert f"loss {said}, " in capsys.readouterr().out
    other.write_text("the king" * 20)
    assert main(["eval", str(folder), f"--data={other}"]) == 0
    assert ", 159 targets" in capsys.readouterr().out  # all of another text


def test_what_a_terminal_cannot_show_is_escaped(tiny_flags, tmp_path):
    """Samples of bytes hold U+FFFD; Latin-1 has none."""
    text = tmp_path / "text.txt"
    text.write_text("naïve Füße " * 600, encoding="utf-8")
    command = [sys.executable, "train.py", *tiny_flags, f"--data={text}", "--tokenizer=bytes"]
    done = subprocess.run(
        [*command, f"--out_dir={tmp_path / 'run'}", "--max_iters=4"],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert done.returncode == 0, done.stderr
    assert b"\\ufffd" in done.stdout


@pytest.mark.parametrize("word", ["--num_samples", "extra"])
def test_only_flags_of_the_command_are_suggested(word, trained_run, capsys):
    """`eval --num_samples 3` was asked whether it meant --num_samples."""
    fails(capsys, main, ["eval", str(trained_run), word], f"{word}; see python -m gptcore --help")


def test_a_run_is_not_resumed_to_a_step_before_its_own(train_main, trained_run, tmp_path, capsys):
    folder = shutil.copytree(trained_run, tmp_path / "run")
    before = (folder / "config.json").read_text()
    argv = [f"--out_dir={folder}", "--resume", "--max_iters=5"]
    fails(capsys, train_main, argv, "is at step 12; give as many --max_iters or more; got 5")
    assert (folder / "config.json").read_text() == before


def test_a_compiler_that_fails_is_one_line(train_main, tiny_flags, tmp_path, monkeypatch, capsys):
    from torch._dynamo.exc import TorchDynamoException

    def fail(run):
        raise TorchDynamoException("no C++ compiler\nand much more")

    monkeypatch.setattr(trainer, "training_step", fail)
    argv = [*tiny_flags, f"--out_dir={tmp_path / 'run'}"]
    message = "torch.compile failed: no C++ compiler; leave --compile out"
    fails(capsys, train_main, argv, message, code=1)


@pytest.mark.parametrize(
    "command",
    [
        *("train --data=LONG", "train --out_dir=LONG", "train --init_from=LONG"),
        *("train --out_dir=LONG --resume", "lr_range --out_dir=LONG", "lr_range --data=LONG"),
        *("sample LONG", "eval LONG", "eval RUN --data=LONG", "prepare LONG", "export LONG x"),
    ],
)
def test_a_text_in_the_place_of_a_path(
    train_main, tiny_flags, trained_run, tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    long = "To be, or not to be: " * 20
    name, *flags = (word.replace("LONG", long) for word in command.split())
    flags = [str(trained_run) if word == "RUN" else word for word in flags]
    flags += ["--format=notebook"] * (name == "export")
    flags = [*tiny_flags * (name == "train"), *flags]
    run = train_main if name == "train" else lambda argv: main([name, *argv])
    fails(capsys, run, flags, "To be, or not")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_one_may_not_enter(trained_run, tmp_path, capsys):
    folder = tmp_path / "closed"
    shutil.copytree(trained_run, folder / "run")
    folder.chmod(0)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    user = os.geteuid()
    if user == 0:  # who may enter
        os.seteuid(65534)
    try:
        for command in ("sample", "eval"):
            message = f"cannot use {folder / 'run'}: Permission denied; give another path"
            fails(capsys, main, [command, str(folder / "run")], message)
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.EACCES, "Denied", "a/b"), 2, "cannot use a/b: Denied; give another path"),
        (OSError(errno.ENAMETOOLONG, "Long", "a"), 2, "cannot use a: Long; give another path"),
        (OSError(errno.EIO, "Broken", "a/b"), 1, "a/b: Broken"),
        (OSError(errno.EACCES, "Denied"), 1, "Denied"),
        (OSError("timed out"), 1, "timed out"),
    ],
    ids=str,
)
def test_an_error_of_the_system_is_one_line(capsys, error, code, message):
    def command():
        raise error

    assert run_command(command) == code
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["sample", "eval"])
def test_a_full_disk_is_one_line(trained_run, command):
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-m", "gptcore", command, str(trained_run)]
        done = subprocess.run(argv, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_a_run_is_sampled_while_it_is_saved(trained_run, tmp_path, monkeypatch, capsys):
    """After it was opened, before its weights are loaded: once, and then every time."""
    folder, real = shutil.copytree(trained_run, tmp_path / "run"), model.build_model
    manifest, left = folder / "best" / "manifest.json", 1

    def meanwhile(*args):
        nonlocal left
        if left:
            left -= 1
            manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "save": left}))
        return real(*args)

    monkeypatch.setattr(model, "build_model", meanwhile)
    command = ["sample", str(folder), "--max_new_tokens=5", "--seed=1"]
    assert main(command) == 0 and left == 0
    left = 100
    capsys.readouterr()
    fails(capsys, main, command, "best has changed while it was read: a run saves there; try again")
    assert left > 80


def test_a_closed_pipe_is_no_traceback(trained_run):
    """`python -m gptcore sample RUN | head -c 5`."""
    command = f"{sys.executable} -m gptcore sample {trained_run} --max_new_tokens=3000 | head -c 5"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert len(done.stdout) == 5 and "Traceback" not in done.stderr
