"""Resuming: bit for bit, past damage, in one folder at a time, and what it refuses."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gptcore import evaluation, machine, trainer
from gptcore.checkpoint import open_checkpoint
from gptcore.config import ConfigError
from gptcore.flags import parse_settings
from gptcore.log import read_metrics
from gptcore.trainer import prepare
from tests.gptcore.runs import assert_same_weights, comparable, weights_of

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "r+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("at", "number"), [(0, signal.SIGTERM), (3, signal.SIGINT), (8, signal.SIGTERM)]
)
def test_resuming_is_bit_identical(
    train_main, tiny_flags, trained_run, tmp_path, monkeypatch, capsys, at, number
):
    """Interrupted in step `at`, gone on with: weights, optimizer and metrics are the same."""
    folder = tmp_path / "run"
    real = trainer.training_step

    def interrupted(run):
        if run.step == at:
            signal.raise_signal(number)
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", interrupted)
        assert train_main([*tiny_flags, f"--out_dir={folder}"]) == 1
    last = open_checkpoint(folder, "last").progress
    assert (last.step, last.evaluated_step) == (at + 1, at // 4 * 4)
    assert f"python train.py --out_dir {folder} --resume" in capsys.readouterr().out
    assert train_main([f"--out_dir={folder}", "--resume"]) == 0
    assert_same_weights(weights_of(trained_run), weights_of(folder))
    a, b = (load_file(run / "last" / "optimizer.safetensors") for run in (trained_run, folder))
    assert len(a) > 30
    assert_same_weights(a, b)
    assert comparable(folder) == comparable(trained_run)


def test_a_crash_between_saves_goes_back_to_the_last(
    train_main, tiny_flags, trained_run, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    real = trainer.training_step

    def crashing(run):
        if run.step == 7:
            raise ZeroDivisionError
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", crashing)
        with pytest.raises(ZeroDivisionError):
            train_main([*tiny_flags, f"--out_dir={folder}"])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # the line the crash cut off
    assert open_checkpoint(folder, "last").progress.step == 4
    assert train_main([f"--out_dir={folder}", "--resume"]) == 0
    assert_same_weights(weights_of(trained_run), weights_of(folder))
    assert comparable(folder) == comparable(trained_run)


def test_resume_starts_where_there_is_nothing(train_main, tiny_flags, trained_run, tmp_path):
    flags = [*tiny_flags, f"--out_dir={tmp_path / 'new'}", "--resume"]
    assert train_main(flags) == 0
    assert_same_weights(weights_of(trained_run), weights_of(tmp_path / "new"))
    assert train_main(flags) == 0  # already done: says so again, changes nothing
    assert comparable(tmp_path / "new") == comparable(trained_run)


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "killed"])
def test_a_run_that_never_finished_an_evaluation_is_resumed_as_itself(
    stopped, train_main, tiny_flags, trained_run, tmp_path, monkeypatch, capsys
):
    """Not as what the flags of the command to go on with alone would be."""
    folder = tmp_path / "run"

    def interrupt(run, batches):
        if not stopped:
            raise SystemExit  # as kill -9 would, nothing is saved
        run.stop.set()
        raise evaluation.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_until_stopped", interrupt)
        if stopped:
            assert train_main([*tiny_flags, f"--out_dir={folder}"]) == 1
            assert f"go on with: python train.py --out_dir {folder}" in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit):
                train_main([*tiny_flags, f"--out_dir={folder}"])
    assert (folder / "last").exists() == stopped and not (folder / "best").exists()
    assert train_main([f"--out_dir={folder}", "--resume", "--preset=cpu"]) == 2
    assert "was started with --preset baby-cpu, not cpu" in capsys.readouterr().err
    assert train_main([f"--out_dir={folder}", "--resume"]) == 0
    assert_same_weights(weights_of(trained_run), weights_of(folder))


@pytest.mark.parametrize(
    "flags",
    [
        "--init_from=RUN --preset=baby-cpu --learning_rate=0.005 --min_lr=0",
        "--init_from=BYTES --preset=baby-cpu --tokenizer=char",
        "--init_from=RUN --preset=baby-cpu",
        "--preset=add --block_size=256",
        "--preset=add --digits=2",
        "--preset=nanogpt-char --model=multihead",
    ],
)
def test_settings_as_the_presets_are_given_again(
    train_main, tiny_flags, trained_run, text_file, tmp_path, flags
):
    """Of a run killed before its first checkpoint all of config.json holds, whoever chose it."""
    origin = tmp_path / "bytes"
    if "BYTES" in flags:
        flags = flags.replace("BYTES", str(origin))
        argv = [*tiny_flags, "--tokenizer=bytes", "--max_iters=0", f"--out_dir={origin}"]
        assert train_main(argv) == 0
    flags = [*flags.replace("RUN", str(trained_run)).split(), "--device=cpu"]
    if "--preset=add" not in flags:
        flags.append(f"--data={text_file}")
    run = prepare(parse_settings([*flags, f"--out_dir={tmp_path / 'run'}"]))
    run.unlock()
    again = prepare(parse_settings([f"--out_dir={tmp_path / 'run'}", "--resume"]))
    again.unlock()
    assert again.config_json == run.config_json
    assert again.corpus.tokenizer.state() == run.corpus.tokenizer.state()


def test_a_checkpoint_is_no_run_folder(train_main, trained_run, capsys):
    for name in ("best", "last"):
        before = (trained_run / name / "config.json").read_bytes()
        assert train_main([f"--out_dir={trained_run / name}", "--resume"]) == 2
        message = f"is a checkpoint, not a run folder; give --out_dir {trained_run}\n"
        assert capsys.readouterr().err.endswith(message)
        assert (trained_run / name / "config.json").read_bytes() == before


def test_one_process_at_a_time_trains_in_a_folder(
    train_main, tiny_flags, trained_run, tmp_path, capsys
):
    pytest.importorskip("fcntl", reason="locks are POSIX")
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    argv = [f"--out_dir={folder}", "--resume", "--max_iters=14"]
    command = [sys.executable, "-c", HOLD, str(folder / "config.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            code = train_main(argv)
        finally:
            holder.kill()
    assert code == 2
    assert f"another process or thread trains in {folder}; wait" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert train_main(argv) == 0


def test_training_holds_its_folder_until_it_ends(prepared):
    pytest.importorskip("fcntl", reason="locks are POSIX")
    run = prepared()
    script = HOLD.replace("LOCK_EX", "LOCK_EX | fcntl.LOCK_NB").replace("600", "0")
    command = [sys.executable, "-c", script, str(run.folder / "config.json")]
    assert b"BlockingIOError" in subprocess.run(command, capture_output=True).stderr
    run.unlock()
    assert subprocess.run(command, capture_output=True).stdout == b"held\n"


def test_one_run_of_a_process_at_a_time_trains_in_a_folder(prepared, train_main, monkeypatch):
    """As of two threads; one that could not be prepared is in nobody's way."""
    pytest.importorskip("fcntl", reason="locks are POSIX")
    run = prepared()
    argv = [f"--out_dir={run.folder}", "--resume", "--max_iters=1"]
    assert train_main(argv) == 2
    run.unlock()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "trim_metrics", lambda *args: {}["damage"])
        with pytest.raises(KeyError) as error:
            train_main(argv)
    assert train_main(argv) == 0
    assert error.tb  # whose frames hold the run that failed


@pytest.fixture
def saved_at(train_main, tiny_flags, tmp_path):
    """saved_at(last=8, best=4, ...) -> a run folder with these checkpoints of one run."""
    folder, shelf = tmp_path / "run", tmp_path / "shelf"
    for step in (4, 8, 12):
        assert (
            train_main([*tiny_flags, f"--out_dir={folder}", f"--max_iters={step}", "--resume"]) == 0
        )
        shutil.copytree(folder / "last", shelf / str(step))

    def make(**steps):
        for name in ("last", "best"):
            shutil.rmtree(folder / name)
        for name, step in steps.items():
            shutil.copytree(shelf / str(step), folder / name.replace("_", "."))
        return folder

    return make


def damage(checkpoint, how):
    """Truncate a file of a checkpoint, or remove it."""
    name, what = how.split()
    if what == "missing":
        (checkpoint / name).unlink()
    else:
        os.truncate(checkpoint / name, (checkpoint / name).stat().st_size - 1)


@pytest.mark.parametrize("how", ["model.safetensors truncated", "manifest.json missing"])
@pytest.mark.parametrize(
    ("steps", "damaged", "found"),
    [
        ({"last": 8, "best": 4}, ["last"], "best, step 4"),
        ({"last": 8, "last_old": 4, "best": 8}, ["last"], "best, step 8"),
        ({"last": 8, "last_old": 8, "best": 4}, ["last"], "last.old, step 8"),
        ({"last": 8, "best": 8, "best_old": 4}, ["last", "best"], "best.old, step 4"),
        ({"last": 12, "best": 12}, ["last"], "best, step 12"),
    ],
    ids=lambda value: str(value).replace("'", ""),
)
def test_resuming_passes_damaged_checkpoints_by(
    saved_at, train_main, trained_run, capsys, steps, damaged, found, how
):
    """From the newest whole one, as one line says; the run is the same, and nothing is lost."""
    folder = saved_at(**steps)
    for name in damaged:
        damage(folder / name, how)
    files = {p.name: p.read_bytes() for p in (folder / "last").iterdir()}
    capsys.readouterr()
    assert train_main([f"--out_dir={folder}", "--resume", "--max_iters=12"]) == 0
    out, error = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if "WARNING" in line]
    assert line.startswith(f"WARNING: {folder}/last: ") and how.split()[0] in line
    for name in damaged:
        assert f"set aside as {folder}/{name}.damaged;" in line
    assert line.endswith(f"; going on from {folder}/{found}") and not error
    assert {p.name: p.read_bytes() for p in (folder / "last.damaged").iterdir()} == files
    assert_same_weights(weights_of(trained_run), weights_of(folder))
    assert comparable(folder) == comparable(trained_run)


def test_a_missing_last_is_no_damage(saved_at, train_main, trained_run, capsys):
    folder = saved_at(best=4)
    assert train_main([f"--out_dir={folder}", "--resume", "--max_iters=12"]) == 0
    assert "WARNING" not in capsys.readouterr().out
    assert comparable(folder) == comparable(trained_run)


def test_without_a_whole_checkpoint_nothing_is_touched(saved_at, train_main, capsys):
    folder = saved_at(last=8, best=4)
    for name in ("last", "best"):
        damage(folder / name, "state.json truncated")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train_main([f"--out_dir={folder}", "--resume", "--max_iters=12"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.count("state.json is damaged") == 2
    assert error.endswith("; copy it again from where it came\n")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_resumed_run_stays_on_its_device(train_main, tiny_flags, tmp_path, monkeypatch):
    """The one it was given, not the one that "auto" would be; unless it is given another."""
    folder = f"--out_dir={tmp_path / 'run'}"
    assert train_main([*tiny_flags, folder, "--max_iters=1"]) == 0
    named = []
    monkeypatch.setattr(
        machine, "pick_device", lambda name: named.append(name) or torch.device("cpu")
    )
    assert train_main([folder, "--resume", "--max_iters=2"]) == 0
    assert named[-1] == "cpu"
    assert train_main([folder, "--resume", "--max_iters=3", "--device=auto"]) == 0
    assert named[-1] == "auto"


def test_a_resumed_run_keeps_the_dtype_that_was_timed(prepared, tmp_path, monkeypatch):
    """Timed anew it might be another, and the weights no longer those of a run never stopped."""
    timed = iter([(torch.bfloat16, "it was faster"), (torch.float32, "now it is not")])
    pick = trainer.pick_dtype

    def pretend(model, corpus, config, *rest):
        return next(timed) if config.dtype == "auto" else pick(model, corpus, config, *rest)

    monkeypatch.setattr(trainer, "pick_dtype", pretend)
    run = prepared("--dtype=auto")
    assert run.update.dtype == torch.bfloat16 and run.config.dtype == "bfloat16"
    trainer.save(run, "last")
    run.writer.wait()
    run.unlock()
    for flags, dtype, reason in (
        ([], torch.bfloat16, "as the run began"),
        (["--dtype=auto"], torch.float32, "now it is not"),
    ):
        resumed = prepare(parse_settings([f"--out_dir={run.folder}", "--resume", *flags]))
        assert (resumed.update.dtype, resumed.dtype_reason) == (dtype, reason)
        resumed.unlock()


def test_a_resumed_run_may_go_further(train_main, tiny_flags, tmp_path):
    folder = f"--out_dir={tmp_path / 'run'}"
    assert train_main([*tiny_flags, folder, "--max_iters=5"]) == 0
    assert train_main([folder, "--resume", "--max_iters=8", "--learning_rate=1e-3"]) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 4, 5, 8]
    assert records[-1]["kind"] == "end" and records[-1]["step"] == 8
    assert [r["lr"] for r in records if r["kind"] == "train"] == [5e-3, 5e-3, 1e-3, 1e-3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_embd=32"], "n_embd is 16 in"),
        (["--tokenizer=bytes"], "tokenizer is 'char' in"),
        (["--preset=notebook"], "was started with --preset baby-cpu, not notebook"),
        (["--data=pydoc"], "is not the text this run was trained on"),
    ],
)
def test_what_resuming_cannot_change(trained_run, flags, message):
    with pytest.raises(ConfigError, match=message):
        prepare(parse_settings([f"--out_dir={trained_run}", "--resume", *flags]))
