"""Sweeps and the range test: what is tried, run, skipped, ranked, shown and suggested."""

import contextlib
import csv
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from gptcore import lr_range
from gptcore.__main__ import main
from gptcore.config import ConfigError, RunError
from gptcore.flags import Settings, parse_settings
from gptcore.log import read_metrics
from gptcore.pool import Pool, Worker
from gptcore.sweep import Plan, draw, read_results, train_command, trial_name
from gptcore.sweep_plots import _apart, _axis
from gptcore.worker import trained

ROOT = Path(__file__).parents[2]


def plan(grid=None, random=None, trials=1, eta=None, **given) -> Plan:
    return Plan(Settings("baby-cpu", given), grid or {}, random or {}, trials, eta)


@pytest.fixture
def in_process(monkeypatch):
    """Trials run here instead of in a process of their own."""

    def run(self, request):
        return trained(Settings(request["preset"], request["given"]))

    monkeypatch.setattr(Worker, "run", run)


@pytest.fixture
def pretended(monkeypatch):
    """Trials do not run; the loss is as far from n_embd 20 as it is, and falls with the steps."""
    requests = []

    def run(self, request):
        given = request["given"]
        requests.append((given["n_embd"], given["max_iters"]))
        if given["n_embd"] == 13:
            return {"error": "the loss is nan", "bad_input": False}
        loss = abs(given["n_embd"] - 20) + 1 / given["max_iters"]
        result = {"best_val_loss": loss, "val_loss": loss + 1, "val_accuracy": 0.25}
        result |= {"step": given["max_iters"], "elapsed_s": 1.0}
        return {"error": None, "bad_input": False, "best_step": 1, **result}

    monkeypatch.setattr(Worker, "run", run)
    return requests


def flags_of(folder, *flags) -> list[str]:
    return ["sweep", f"--out_dir={folder}", "--preset=baby-cpu", "--device=cpu", *flags]


# ---- what is tried ---------------------------------------------------------------------------


def test_a_grid_is_every_combination():
    settings = plan({"n_embd": [16, 32], "dropout": [0.0, 0.1, 0.2]}).settings()
    assert len(settings) == 6
    assert {tuple(s.values()) for s in settings} == {
        (c, p) for c in (16, 32) for p in (0, 0.1, 0.2)
    }


def test_draws_are_a_pure_function_and_a_longer_plan_begins_the_same():
    drawn = {"learning_rate": "log:1e-4:1e-2", "n_layer": "uniform:1:9"}
    short, long = plan(random=drawn, trials=5), plan(random=drawn, trials=20)
    assert long.settings()[:5] == short.settings() == plan(random=drawn, trials=5).settings()
    other = plan(random=drawn, trials=5, seed=7).settings()
    assert other != short.settings()
    rates = [s["learning_rate"] for s in plan(random=drawn, trials=300).settings()]
    assert 1e-4 <= min(rates) < 2e-4 and 5e-3 < max(rates) <= 1e-2
    assert sorted(rates)[150] == pytest.approx(1e-3, rel=0.5)  # the middle, on a logarithmic scale
    layers = {s["n_layer"] for s in long.settings()}
    assert layers <= set(range(1, 10)) and len(layers) > 4
    assert all(isinstance(layer, int) for layer in layers)


def test_every_draw_meets_every_point_of_the_grid():
    settings = plan({"n_embd": [16, 32]}, {"learning_rate": "log:1e-4:1e-2"}, 3).settings()
    rates = [s["learning_rate"] for s in settings]
    assert len(settings) == 6 and rates[::2] == rates[1::2] and len(set(rates)) == 3


def test_choices_are_drawn_and_not_tried_twice():
    assert draw("optimizer", "adamw,sgd", random.Random(0)) in ("adamw", "sgd")
    assert len(plan(random={"optimizer": "adamw,sgd"}, trials=30).settings()) == 2


def test_drawn_values_can_be_retyped():
    value = draw("learning_rate", "log:1e-4:1e-2", random.Random(3))
    assert float(f"{value:.3g}") == value


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("beta2", 0.99, 0.9999), ("cycle_gamma", 0.9991, 0.9999), ("n_layer", 0.6, 2.6)],
    ids=["beta2", "cycle_gamma", "n_layer"],
)
@pytest.mark.parametrize("kind", ["uniform", "log"])
def test_draws_from_a_narrow_range_differ_and_stay_in_it(kind, name, low, high):
    seeds = range(300)
    values = [draw(name, f"{kind}:{low}:{high}", random.Random(seed)) for seed in seeds]
    assert all(low <= value <= high for value in values)
    assert len(set(values)) == 2 if name == "n_layer" else len(set(values)) > 150
    assert all(float(f"{value:.6g}") == value for value in values)


def test_trial_names_are_folders_and_differ():
    assert trial_name({"n_embd": 64, "bias": True}) == "n_embd=64,bias=true"
    a, b = (trial_name({"data": f"/{x * 200}/text.txt"}) for x in "ab")
    assert a != b and "/" not in a + b and len(a) < 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to try; give --grid"),
        (["--grid=n_embd"], "--grid must be NAME=..., NAME a flag of train.py"),
        (["--grid=n_embed=64"], "got 'n_embed=64'"),
        (["--grid=out_dir=a"], "none of out_dir"),
        (["--grid=tokenizer=char,bpe"], "--grid tokenizer: losses of trials that differ in it do"),
        (["--random=data=a,b", "--trials=2"], "give each --data a sweep of its own"),
        (["--grid=init_from=a,b"], "init_from can be tried with one tokenizer; give --tokenizer"),
        (["--grid=n_embd=64", "--grid=n_embd=32"], "each once"),
        (["--grid=n_embd=64,big"], "n_embd must be a whole number; got 'big'"),
        (["--grid=n_head=2,0"], "trial n_head=0: n_head must be at least 1"),
        (["--grid=dropout=0,2"], "trial dropout=2.0: dropout must be below 0.99999"),
        (["--random=learning_rate=log:1e-4:1e-2"], "--trials N, at least 1, goes with --random"),
        (["--grid=n_embd=64", "--trials=3"], "--trials N, at least 1, goes with --random"),
        (["--random=learning_rate=log:0:1", "--trials=2"], "must be log:LOW:HIGH or uniform"),
        (["--random=learning_rate=log:1", "--trials=2"], "must be log:LOW:HIGH or uniform"),
        (["--random=schedule=log:1:2", "--trials=2"], "for a number"),
        (["--grid=n_embd=64", "--random=n_embd=uniform:1:2", "--trials=1"], "must differ"),
        (["--grid=n_embd=64", "--jobs=0"], "--jobs must be at least 1"),
        (["--grid=n_embd=64", "--halving=1"], "--halving must be at least 2"),
        (["--grid=max_iters=5,6", "--halving"], "max_iters cannot be tried with --halving"),
        (["--grid=n_embd=64", "--max-iter=5"], "did you mean --max_iters"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_sweeps(flags, message, tmp_path, capsys, pretended):
    assert main(flags_of(tmp_path / "sweep", *flags)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


# ---- running ---------------------------------------------------------------------------------


def test_a_sweep_from_end_to_end(tiny_flags, tmp_path, capsys, monkeypatch):
    """Two processes side by side; the table, the files, and the best command does what it says."""
    folder, drawn, savefig = tmp_path / "sweep", [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *to, **how: drawn.append(self) or savefig(self, *to, **how)
    )
    flags = [*tiny_flags, "--grid=n_embd=8,16", "--grid=learning-rate=1e-4,1e-2", "--jobs=2"]
    assert main(["sweep", f"--out_dir={folder}", *flags]) == 0
    out = capsys.readouterr().out
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert len(rows) == 4 and all(row["step"] == "12" and not row["error"] for row in rows)
    losses = [float(row["best_val_loss"]) for row in rows]
    assert losses == sorted(losses)
    assert {row["learning_rate"] for row in rows[:2]} == {"0.01"}
    for row, curve in zip(rows, drawn[-1].axes[0].lines, strict=True):
        *records, end = read_metrics(folder / "trials" / row["trial"] / "metrics.jsonl")
        points = [[r["step"], r["val_loss"]] for r in records if r["kind"] == "eval"]
        assert curve.get_xydata().tolist() == points
        assert end["val_loss"] == float(row["val_loss"])
        assert end["val_accuracy"] == float(row["val_accuracy"])
    for name in ("parallel.png", "curves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    best = next(line for line in out.splitlines() if line.startswith("best "))
    words = shlex.split(best.removeprefix("best"))
    assert words[:2] == ["python", "train.py"]
    again = trained(parse_settings([*words[2:], f"--out_dir={tmp_path / 'again'}"]))
    assert again["best_val_loss"] == pytest.approx(losses[0], rel=1e-4)


def test_as_many_trials_as_asked_run_side_by_side(pretended, tmp_path, monkeypatch):
    """And each is evaluated five times."""
    together, run, intervals = threading.Barrier(2), Worker.run, []

    def noted(self, request):
        together.wait(timeout=30)
        intervals.append(request["given"]["eval_interval"])
        return run(self, request)

    monkeypatch.setattr(Worker, "run", noted)
    flags = ["--random=learning_rate=log:1e-4:1e-2", "--trials=4", "--jobs=2", "--n_embd=20"]
    assert main(flags_of(tmp_path / "sweep", *flags, "--max_iters=90")) == 0
    assert intervals == [18] * 4


def test_lines_of_one_setting_are_told_apart():
    heights = [0.0, 1.0, 0.0, 0.5, 0.0, 1.0]
    apart = _apart(heights)
    assert len(set(apart)) == 6 and apart[3] == 0.5 and apart[0] < apart[2] == 0.0 < apart[4]
    assert all(abs(a - b) <= 0.03 for a, b in zip(apart, heights, strict=True))


def test_resume_skips_what_is_done_and_goes_on_with_the_rest(
    in_process, tiny_flags, tmp_path, capsys
):
    folder = tmp_path / "sweep"
    flags = ["sweep", f"--out_dir={folder}", *tiny_flags, "--grid=n_embd=8,16"]
    assert main(flags) == 0
    results = {p.parent.name: p.read_text() for p in folder.glob("trials/*/result.json")}
    (folder / "trials" / "n_embd=8" / "result.json").unlink()
    metrics = folder / "trials" / "n_embd=16" / "metrics.jsonl"
    before = metrics.read_text()
    capsys.readouterr()
    assert main(flags) == 2
    assert "exists; add --resume" in capsys.readouterr().err
    assert main(["sweep", f"--out_dir={folder}", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "n_embd=8: validation loss" in out and "n_embd=16: validation loss" not in out
    assert metrics.read_text() == before
    result = json.loads((folder / "trials" / "n_embd=8" / "result.json").read_text())
    assert result["val_loss"] == json.loads(results["n_embd=8"])["val_loss"]
    # Extended by another value, it trains only that; with other settings it refuses.
    assert main([*flags[:-1], "--grid=n_embd=8,16,12", "--resume"]) == 0
    assert len(read_results(folder, {f"n_embd={c}": {} for c in (8, 12, 16)})) == 3
    assert "n_embd=8: validation loss" not in capsys.readouterr().out
    assert main([*flags, "--resume", "--batch_size=8"]) == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert main(["sweep", f"--out_dir={tmp_path}", "--resume", "--grid=n_embd=8"]) == 2
    assert "is not a sweep's" in capsys.readouterr().err


@pytest.mark.parametrize(
    "grid",
    [["n_embd=24"], ["n_embd=20"], ["n_embd=20,22", "dropout=0,0.1"]],
    ids=["other", "fewer", "finer"],
)
def test_resume_forgets_no_trial(grid, pretended, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert main(flags_of(folder, "--grid=n_embd=20,22", "--max_iters=9")) == 0
    kept = {path: path.read_text() for path in (folder / "sweep.json", folder / "results.csv")}
    pretended.clear()
    capsys.readouterr()
    flags = flags_of(folder, "--max_iters=9", "--resume", *(f"--grid={text}" for text in grid))
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "must include what" in error and error.count("\n") == 1
    assert not pretended and all(path.read_text() == text for path, text in kept.items())
    assert main(flags_of(folder, "--max_iters=9", "--resume", "--grid=n_embd=24,22,20")) == 0
    assert pretended == [(24, 9)]
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [row["n_embd"] for row in rows] == ["20", "22", "24"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_an_interrupted_sweep_is_saved_and_goes_on(tiny_flags, tmp_path, number):
    """Ctrl-C, a closed terminal: the trial under way keeps its last step, and the command to go on
    is shown. Also a sweep that is killed leaves no trial training."""
    folder = tmp_path / "sweep"
    command = [sys.executable, "-m", "gptcore", "sweep", f"--out_dir={folder}", *tiny_flags]
    command += ["--grid=n_embd=8", "--max_iters=100000", "--log_interval=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}

    def unlike_nohup():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    process = subprocess.Popen(command, preexec_fn=unlike_nohup, **how)
    metrics = folder / "trials" / "n_embd=8" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    with process:
        try:
            while not any(record["kind"] == "train" for record in read_metrics(metrics)):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            process.send_signal(number)
            out, error = process.communicate(timeout=60)
        finally:
            process.terminate()
    if number != signal.SIGKILL:
        assert process.returncode == 1 and "Traceback" not in error
        assert f"0 of 1 trials done; go on with: python -m gptcore sweep --out_dir {folder}" in out
    log = folder / "trials" / "n_embd=8.log"
    while "stopped at step" not in log.read_text():
        assert number == signal.SIGKILL and time.monotonic() < deadline
        time.sleep(0.05)
    steps = read_metrics(metrics)[-1]["step"]
    assert steps > 0 and (folder / "trials" / "n_embd=8" / "last" / "manifest.json").is_file()


def test_two_sweeps_in_one_folder_are_one_too_many(pretended, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl", reason="no locks")
    folder = tmp_path / "sweep"
    assert main(flags_of(folder, "--grid=n_embd=20", "--max_iters=9")) == 0
    kept, again = (folder / "sweep.json").read_text(), flags_of(folder, "--grid=n_embd=20,21")
    again += ["--max_iters=9", "--resume"]
    capsys.readouterr()
    with open_folder(folder) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main(again) == 2
    error = capsys.readouterr().err
    assert f"another sweep runs in {folder}; wait" in error and error.count("\n") == 1
    assert (folder / "sweep.json").read_text() == kept and pretended == [(20, 9)]
    assert main(again) == 0 and pretended == [(20, 9), (21, 9)]


@contextlib.contextmanager
def open_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_a_failed_trial_does_not_end_the_others(pretended, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert main(flags_of(folder, "--grid=n_embd=13,25,21", "--max_iters=9", "--jobs=2")) == 0
    out = capsys.readouterr().out
    assert "n_embd=13: failed: the loss is nan" in out
    table = [line.split() for line in out.splitlines() if line.strip()[:2].isdigit()]
    assert table == [
        ["21", "1.1111", "25.0%", "9", "1.0"],
        ["25", "5.1111", "25.0%", "9", "1.0"],
        ["13", "failed"],
    ]
    assert "--n_embd 21" in out.splitlines()[-1]
    pretended.clear()
    assert main(["sweep", f"--out_dir={folder}", "--resume"]) == 0
    assert pretended == [(13, 9)]  # it may have been killed, or the disk full
    assert main(flags_of(tmp_path / "bad", "--grid=n_embd=13", "--max_iters=9")) == 1
    assert "every trial failed; the first: the loss is nan" in capsys.readouterr().err


def test_a_failed_trial_is_tried_once_a_time(pretended, tmp_path):
    """Not again in the next rung of a halving, where all failed and one of them is the best."""
    grid = ["--grid=n_embd=13", "--grid=batch_size=4,8"]
    assert main(flags_of(tmp_path / "sweep", *grid, "--max_iters=40", "--halving=2")) == 1
    assert pretended == [(13, 20)] * 2


def test_what_a_sweep_cannot_open_is_said_first(tmp_path, capsys):
    folder = tmp_path / "sweep"
    argv = ["sweep", "--grid=n_embd=16", f"--data={tmp_path / 'none.txt'}", f"--out_dir={folder}"]
    assert main(argv) == 2
    assert "none.txt: no such file" in capsys.readouterr().err and not folder.exists()


def test_another_halving_is_not_gone_on_with(pretended, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert main(flags_of(folder, "--grid=n_embd=19,20", "--max_iters=9", "--halving=2")) == 0
    again = ["sweep", f"--out_dir={folder}", "--resume"]
    assert main([*again, "--halving=3"]) == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert main([*again, "--halving=2"]) == 0


def test_the_best_command_can_be_read():
    """A value that begins with a dash is no flag."""
    plan_ = plan({"operations": ["-+"]}, data="arithmetic")
    words = shlex.split(train_command(plan_, {"operations": "-+"}))
    assert words[:2] == ["python", "train.py"]
    assert parse_settings(words[2:]).given == {"data": "arithmetic", "operations": "-+"}


def test_halving_gives_the_promising_more_steps(pretended, tmp_path, capsys):
    folder = tmp_path / "sweep"
    grid = "--grid=n_embd=" + ",".join(map(str, range(16, 25)))
    assert main(flags_of(folder, grid, "--max_iters=90", "--halving", "--jobs=2")) == 0
    steps = {budget: sorted(c for c, b in pretended if b == budget) for budget in (10, 30, 90)}
    assert steps == {10: list(range(16, 25)), 30: [19, 20, 21], 90: [20]}
    assert len(pretended) == 13
    last = capsys.readouterr().out.splitlines()[-1]
    assert "--n_embd 20" in last and "--max_iters 90" in last
    pretended.clear()
    assert main(["sweep", f"--out_dir={folder}", "--resume"]) == 0
    assert not pretended


def test_halved_trials_keep_the_schedule_of_the_whole(in_process, tiny_flags, tmp_path):
    """A trial that goes on is bit for bit the trial that was never stopped."""
    folder = tmp_path / "sweep"
    flags = [*tiny_flags, "--grid=n_embd=8,16", "--schedule=cosine", "--halving=2"]
    assert main(["sweep", f"--out_dir={folder}", *flags]) == 0
    best = json.loads(next(iter(read_by_steps(folder, 12))).read_text())
    whole = trained(
        parse_settings(
            [*tiny_flags, f"--{best['trial']}", "--schedule=cosine"]
            + [f"--out_dir={tmp_path / 'whole'}"]
        )
    )
    assert whole["val_loss"] == best["val_loss"]


def read_by_steps(folder, steps):
    return [
        p for p in folder.glob("trials/*/result.json") if json.loads(p.read_text())["step"] == steps
    ]


def test_a_trial_with_bad_input_is_passed_by_and_tried_again(
    pretended, tmp_path, capsys, monkeypatch
):
    """It keeps no result, and a sweep that goes on may leave it out."""
    answer, run, folder = {"error": "too long", "bad_input": True}, Worker.run, tmp_path / "sweep"
    bad = {16, 32}
    monkeypatch.setattr(
        Worker,
        "run",
        lambda self, request: answer if request["given"]["n_embd"] in bad else run(self, request),
    )
    assert main(flags_of(folder, "--grid=n_embd=16,32")) == 1
    out, err = capsys.readouterr()
    assert out.count("not run: too long") == 2
    assert "could not run, as said above: n_embd=16, n_embd=32; mend that, then: python" in err
    bad.remove(32)
    assert main(["sweep", f"--out_dir={folder}", "--resume"]) == 1
    assert [n for n, _ in pretended] == [32]
    out, err = capsys.readouterr()
    assert "best " not in out and "n_embd=16; mend that" in err and err.count("\n") == 1
    assert main([*flags_of(folder, "--grid=n_embd=24,32"), "--resume"]) == 0
    assert [n for n, _ in pretended] == [32, 24]
    capsys.readouterr()
    assert main([*flags_of(folder, "--grid=n_embd=24"), "--resume"]) == 2
    assert "n_embd=32 is missing" in capsys.readouterr().err


def test_without_a_trial_no_rung_begins(pretended, tmp_path, capsys, monkeypatch):
    """It might be the best: another process trains it, say."""
    held, run, folder = {20}, Worker.run, tmp_path / "sweep"
    answer = {"error": "another process trains", "bad_input": True}
    monkeypatch.setattr(
        Worker,
        "run",
        lambda self, request: answer if request["given"]["n_embd"] in held else run(self, request),
    )
    assert main(flags_of(folder, "--grid=n_embd=20,24,28", "--max_iters=90", "--halving")) == 1
    assert pretended == [(24, 30), (28, 30)]
    assert f"n_embd=20; mend that, then: python -m gptcore sweep --out_dir {folder} --resume" in (
        capsys.readouterr().err
    )
    held.clear()
    assert main(["sweep", f"--out_dir={folder}", "--resume"]) == 0
    assert pretended[2:] == [(20, 30), (20, 90)]


def test_a_trial_without_a_finite_loss_has_failed(in_process, tiny_flags, tmp_path, capsys):
    """Also where a result of it lies already."""
    folder = tmp_path / "sweep"
    flags = [*tiny_flags, "--init=gpt2", "--grid=init_std=0.02,1e30", "--on_nonfinite=skip"]
    assert main(["sweep", f"--out_dir={folder}", *flags, "--max_iters=3"]) == 0
    out = capsys.readouterr().out
    assert "init_std=1e+30: failed: no finite validation loss" in out
    assert "--init_std 0.02" in out.splitlines()[-1]
    result = folder / "trials" / "init_std=1e+30" / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "error": None}))
    assert read_results(folder, {"init_std=1e+30": {}})[0]["error"] == "no finite validation loss"
    assert main(["sweep", f"--out_dir={folder}", "--resume"]) == 0
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [row["error"] for row in rows] == ["", "no finite validation loss"]


@pytest.mark.parametrize("name", ["results.csv", "curves.png"])
def test_a_report_that_cannot_be_written_is_one_line(pretended, tmp_path, capsys, name):
    folder = tmp_path / "sweep"
    assert main(flags_of(folder, "--grid=n_embd=20", "--max_iters=9")) == 0
    (folder / name).unlink()
    (folder / name).mkdir()
    capsys.readouterr()
    again = ["sweep", f"--out_dir={folder}", "--resume"]
    assert main(again) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: cannot write {folder / name}: Is a directory; mend that, then: python -m "
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["sweep", "lr_range"])
def test_a_folder_that_cannot_be_is_one_line(command, tmp_path, capsys):
    grid = ["--grid=n_embd=20"] * (command == "sweep")
    assert main([command, f"--out_dir={tmp_path / ('long' * 70)}", *grid]) == 2
    error = capsys.readouterr().err
    assert "File name too long" in error and error.count("\n") == 1


def test_a_missing_tracker_is_said_before_a_sweep(pretended, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(flags_of(tmp_path / "sweep", "--grid=n_embd=20", "--log=wandb")) == 2
    assert "--log wandb needs the package wandb" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_worker_that_dies_is_a_failed_trial(tmp_path):
    worker = Worker(1, tmp_path / "log")
    script = "import sys; sys.stdin.readline(); sys.exit(3)"
    worker.process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    result = worker.run({"preset": "baby-cpu"})
    assert "its process ended with status 3" in result["error"] and not result["bad_input"]
    assert worker.process is None
    worker.stop()
    with pytest.raises(KeyboardInterrupt):
        worker.run({})


def test_an_unexpected_error_is_a_failed_trial(capsys, monkeypatch):
    assert trained(Settings("no such preset", {}))["bad_input"]
    assert trained(Settings("baby-cpu", {"data": "/no/such"}))["bad_input"]
    monkeypatch.setattr("gptcore.worker.train", lambda settings: {}["folder"])
    result = trained(Settings("baby-cpu", {}))
    assert result["error"].startswith("KeyError") and not result["bad_input"]
    assert "Traceback" in capsys.readouterr().err


def test_threads_are_divided(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert [w.threads for w in Pool(3, tmp_path / "log").workers] == [2, 2, 2]
    assert Pool(16, tmp_path / "log").workers[0].threads == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("gptcore.machine.core_count", lambda: 12)
    assert Pool(3, tmp_path / "log").workers[0].threads == 4


def test_axes_of_the_plot():
    heights, ticks = _axis([1e-4, 1e-2, 1e-3])
    assert heights == pytest.approx([0, 1, 0.5])  # logarithmic, as the values are
    assert [label for _, label in ticks] == ["0.0001", "0.001", "0.01"]
    assert _axis([2.0, 3.0, 2.5])[0] == pytest.approx([0, 1, 0.5])
    assert _axis(["sgd", "adamw", "sgd"]) == ([1, 0, 1], [(0, "adamw"), (1, "sgd")])
    assert _axis([7, 7])[0] == [0, 0]


# ---- the range test --------------------------------------------------------------------------


def noisy(curve, seed=0) -> tuple[list[float], list[float]]:
    """200 rates from 1e-6 to 1, and losses: curve(log10 of the rate), with noise of 0.05."""
    noise = random.Random(seed)
    rates = [10 ** (-6 + 6 * i / 199) for i in range(200)]
    return rates, [curve(math.log10(rate)) + noise.gauss(0, 0.05) for rate in rates]


@pytest.fixture
def range_flags(tiny_flags) -> list[str]:
    """`tiny_flags` without what a range test refuses."""
    refused = (*lr_range.OWN, *lr_range.REFUSED)
    return [f for f in tiny_flags if f.partition("=")[0].removeprefix("--") not in refused]


@pytest.mark.parametrize("seed", range(5))
def test_the_limit_is_where_a_known_curve_stops_falling(seed):
    """At 1e-2, before a flat valley; neither its lowest place nor a single low loss is taken.

    The average lags by ten steps and more, here half a decade.
    """
    rates, losses = noisy(lambda x: 4 - 2 * min(1, max(0, x + 5) / 3) + max(0, x + 1) ** 2, seed)
    losses[60] -= 2
    limit = lr_range.limit_of(rates, losses, lr_range.smoothed(losses))
    assert 1e-2 < limit < 4e-2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("curve", [lambda x: 4.0, lambda x: 4 + max(0, x + 3)], ids=["flat", "up"])
def test_nothing_is_suggested_where_nothing_was_learnt(curve, seed):
    rates, losses = noisy(curve, seed)
    assert lr_range.limit_of(rates, losses, lr_range.smoothed(losses)) is None


def test_smoothing_is_the_corrected_exponential_average():
    assert lr_range.smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert lr_range.smoothed([1.0, 2.0])[1] == pytest.approx((0.9 * 1 + 2) / 1.9)


def test_range_test_from_end_to_end(range_flags, tmp_path, capsys):
    folder = tmp_path / "range"
    flags = [*range_flags, "--num_iter=60", "--start_lr=1e-5", "--end_lr=100"]
    flags += [f"--out_dir={folder}"]
    assert main(["lr_range", *flags]) == 0
    rows = list(csv.DictReader((folder / "lr_range.csv").read_text().splitlines()))
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[0] == 1e-5 and rates[1] / rates[0] == pytest.approx(1e7 ** (1 / 59))
    assert 20 < len(rows) < 60  # it stopped where the loss broke
    out = capsys.readouterr().out
    start, limit = re.search(r"--learning_rate (\S+), or up to (\S+) as", out).groups()
    assert 1e-3 < float(start) and float(limit) < 10
    assert float(start) == pytest.approx(float(limit) / 10)
    losses, smooth = ([float(row[name]) for row in rows] for name in ("loss", "smoothed_loss"))
    assert smooth == pytest.approx(lr_range.smoothed(losses)) and smooth != losses
    assert (folder / "lr_range.png").read_bytes().startswith(b"\x89PNG")
    assert main(["lr_range", *flags]) == 2
    assert f"folder {folder} exists; give another --out_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--start_lr=1", "--end_lr=0.1"], "--start_lr must be above 0 and below --end_lr"),
        (["--start_lr=0"], "--start_lr must be above 0"),
        (["--num_iter=5"], "--num_iter must be at least 10"),
        (["--learning_rate=1"], "lr_range sets learning_rate itself; leave --learning_rate out"),
        (["--max_iters=10"], "lr_range sets max_iters itself"),
        (["--profile"], "--profile says nothing to lr_range"),
        (["--log=tensorboard"], "--log says nothing to lr_range"),
        (["--log_interval=5"], "--log_interval says nothing to lr_range"),
        (["--eval_interval=5"], "--eval_interval says nothing to lr_range"),
        (["--eval_tokens=5"], "--eval_tokens says nothing to lr_range"),
        (["--sample_tokens=0"], "--sample_tokens says nothing to lr_range"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_range_tests(flags, message, tmp_path, capsys):
    assert main(["lr_range", f"--out_dir={tmp_path / 'range'}", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "range").exists()


def test_help_hides_what_a_range_test_refuses(capsys):
    with pytest.raises(SystemExit):
        main(["lr_range", "--help"])
    shown = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE)
    assert {"num_iter", "n_embd", "out_dir"} <= set(shown)
    assert not set(shown) & {*lr_range.OWN, *lr_range.REFUSED}


def test_a_range_test_that_learns_nothing(range_flags, tmp_path, capsys):
    flags = ["--num_iter=30", "--start_lr=1e-9", "--end_lr=1e-8", f"--out_dir={tmp_path / 'r'}"]
    assert main(["lr_range", *range_flags, *flags]) == 1
    out, error = capsys.readouterr()
    assert "suggestion" not in out and error.count("\n") == 1
    assert "never fell clearly below the first" in error and "a higher --end_lr" in error
    assert (tmp_path / "r" / "lr_range.png").is_file()


def test_a_range_test_that_ends_too_early(range_flags, tmp_path, capsys):
    """The loss still falls at its end: there is no limit to a tenth of."""
    flags = ["--num_iter=60", "--start_lr=1e-4", "--end_lr=1e-2", f"--out_dir={tmp_path / 'r'}"]
    assert main(["lr_range", *range_flags, *flags]) == 1
    out, error = capsys.readouterr()
    assert "suggestion" not in out and error.count("\n") == 1
    assert "still falling at the last learning rate, 0.01; give a higher --end_lr" in error


def test_a_range_test_that_is_terminated(range_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gptcore.trainer.training_step", lambda run: os.kill(os.getpid(), 15))
    assert main(["lr_range", *range_flags, f"--out_dir={tmp_path / 'r'}"]) == 1
    out, error = capsys.readouterr()
    assert out.splitlines()[-1].startswith("interrupted; nothing to go on with") and not error


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("gptcore.trainer.training_step", MemoryError(), "out of memory with batch_size 16: give"),
        ("gptcore.lr_range.plot", OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_a_range_test_that_lacks_something(
    where, error, message, range_flags, tmp_path, monkeypatch, capsys
):
    def refuse(*_):
        raise error

    monkeypatch.setattr(where, refuse)
    flags = [*range_flags, "--num_iter=10", f"--out_dir={tmp_path / 'r'}"]
    assert main(["lr_range", *flags]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said


def test_a_range_test_that_breaks_at_once(tiny_flags, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr("gptcore.trainer.training_step", lambda run: torch.tensor(math.nan))
    flags = [*tiny_flags, "--schedule=exponential", "--min_lr=1e-6", f"--out_dir={tmp_path / 'r'}"]
    with pytest.raises(RunError, match="the loss broke after 0 steps; give a lower --start_lr"):
        lr_range.measure(parse_settings(flags))


def test_bad_random_is_found_without_a_trial():
    with pytest.raises(ConfigError, match="--random learning_rate must be"):
        draw("learning_rate", "uniform:3:1", random.Random(0))
