"""The command line: bad input is one line with the known words and exit code 2."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bench import record as recording
from bench import run
from bench.__main__ import QUESTIONS, main

BAD = {
    "benchmark": (["atention"], "known: all, attention"),
    "benchmark beside a good one": (["step", "nothing"], "known: all, attention"),
    "peer": (["step", "--peers", "cublas"], "known: all, none, naive, eager"),
    "one peer of two": (["step", "--peers", "naive,cublas"], "known: all, none, naive, eager"),
    "device": (["step", "--device", "tpu"], "auto, cpu, cuda or cuda:N"),
    "device not here": (["step", "--device", "cuda:77"], "sees"),
    "dtype": (["step", "--dtype", "int8"], "known: float32, bfloat16, float16"),
    "dtype of a model": (["step", "--dtype", "float16"], "float32 or bfloat16"),
    "nanogpt folder": (["step", "--nanogpt", "/nowhere"], "must be a folder with model.py"),
    "results folder": (["report", "--results", __file__], "must be a folder"),
    "plot folder": (["step", "--plot", __file__], "must be a folder"),
    "json folder": (["step", "--json", "/"], "must be a file"),
    "json under a file": (["step", "--json", f"{__file__}/y.json"], "where files can be written"),
    "json of a long name": (["step", "--json", f"{'y' * 250}.json"], "File name too long"),
    "json of a longer name": (["step", "--json", "y" * 300], "File name too long"),
    "plot under a file": (["step", "--plot", f"{__file__}/y"], "where files can be written"),
    "name of a gpu": (["predict", "--gpu", "h300"], "known: "),
    "model": (["predict", "--model", "gpt5"], "known: "),
    "model that is no GPT": (["predict", "--model", "bigram"], "known: notebook, baby-cpu"),
    "gpus": (["predict", "--gpus", "0"], "must be above 0"),
    "seconds": (["--seconds", "-1"], "must be above 0"),
    "json of a report": (["report", "--json", "x"], "--json says nothing to report"),
    "gpu of a question": (["step", "--gpu", "h100"], "--gpu says nothing to step"),
    "seeds of a question": (["attention", "--seeds", "3"], "--seeds says nothing to attention"),
    "target of an ablation": (["ablation", "--target", "1.8"], "--target says nothing to ablation"),
    "data of a step": (["step", "--data", "x"], "--data says nothing to step"),
    "preset of a quick all": (["--quick", "--preset", "best"], "--preset says nothing to all"),
    "gpu of all": (["--gpu", "h100"], "--gpu says nothing to all"),
    "seconds of predict": (["predict", "--seconds", "9"], "--seconds says nothing to predict"),
    "task and question": (["report", "step"], "stands alone"),
    "quick and full": (["--quick", "--full"], "exclude each other"),
    "preset": (["time_to_loss", "--preset", "fast"], "known: "),
    "target": (["time_to_loss", "--target", "-1"], "--target must be a loss above 0; got -1"),
    "target nan": (["time_to_loss", "--target", "nan"], "--target must be a loss above 0"),
    "flag": (["--quik"], "did you mean --quick?"),
}


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    """What is bad is told before."""
    monkeypatch.setattr(run, "ask", None)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_2(case, capsys):
    argv, words = BAD[case]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""


def test_a_path_is_tried_and_what_stands_there_stays(tmp_path, capsys):
    good, new = tmp_path / "good.json", tmp_path / "new" / "x.json"
    good.write_text("good")
    for path in (good, new):
        recording.check_writable("--json", path)
    assert sorted(tmp_path.rglob("*")) == [good, new.parent] and good.read_text() == "good"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_no_file_replaces_a_pipe_or_device(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert main(["step", "--json", str(tmp_path / "pipe")]) == 2
    assert "--json must be a file" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("flags", [["--json", "/proc/x/y.json"], ["--plot", "/proc/x"]])
def test_no_file_can_be_written_there_whoever_asks(flags, capsys):
    assert main(["step", *flags]) == 2
    out, err = capsys.readouterr()
    assert f"{flags[0]} must name a place where files can be written" in err and out == ""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission_is_refused_before_measuring(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main(["step", "--json", str(tmp_path / "x.json")]) == 2
    out, err = capsys.readouterr()
    assert "Permission denied" in err and out == ""


def test_sigterm_ends_it_as_ctrl_c_does(monkeypatch):
    """By an exception: what stops the trainings that it started, then runs."""
    ended = []

    def asking(*args, **options):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            ended.append(True)

    monkeypatch.setattr(run, "run", asking)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert main(["layer_norm"]) == 1
        assert ended and signal.getsignal(signal.SIGTERM) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_help_imports_no_torch():
    code = (
        "import sys, bench.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n")
    assert all(name in done.stdout for name in QUESTIONS)
