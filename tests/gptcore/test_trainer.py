"""Training: what is learned, what is written, and that resuming changes nothing."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from gptcore import checkpoint, evaluation, machine, trainer
from gptcore import log as logs
from gptcore.checkpoint import open_checkpoint
from gptcore.config import ConfigError, GPTConfig, RunError, TrainConfig
from gptcore.data import BatchStream
from gptcore.evaluation import Evaluation, evaluate, evaluate_exactly
from gptcore.flags import Settings, parse_settings
from gptcore.guard import Guard
from gptcore.log import Log, read_metrics
from gptcore.model import GPT
from gptcore.optim import learning_rate, parameter_groups
from gptcore.trainer import prepare, training_step


def weights_of(folder, name="last"):
    return load_file(folder / name / "model.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def stream_of(run):
    return BatchStream(
        run.corpus, run.config.seed, run.config.sequences, run.model.config.block_size
    )


# ---- schedules and groups --------------------------------------------------------------------


def test_constant_and_warmup():
    config = TrainConfig(learning_rate=1.0, warmup_iters=3)
    assert [learning_rate(step, config) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_is_nanogpts():
    config = TrainConfig(
        learning_rate=1e-3, min_lr=1e-4, schedule="cosine", warmup_iters=100, max_iters=5000
    )
    assert learning_rate(0, config) == pytest.approx(1e-3 / 101)
    assert learning_rate(100, config) == 1e-3
    assert learning_rate(2550, config) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(5000, config) == learning_rate(9999, config) == 1e-4
    halfway = config.replace(lr_decay_iters=200)
    assert learning_rate(150, halfway) == pytest.approx((1e-3 + 1e-4) / 2)


@pytest.mark.parametrize(("decay_params", "vectors_decay"), [("matrices", 0.0), ("all", 0.3)])
def test_weight_decay_groups(prepared, decay_params, vectors_decay):
    run = prepared("--weight_decay=0.3", f"--decay_params={decay_params}")
    decay_of = {
        id(parameter): group["weight_decay"]
        for group in parameter_groups(run.model, run.config)
        for parameter in group["params"]
    }
    assert len(decay_of) == len(list(run.model.parameters()))
    for parameter in run.model.parameters():
        assert decay_of[id(parameter)] == (0.3 if parameter.ndim >= 2 else vectors_decay)


# ---- one step --------------------------------------------------------------------------------


def test_a_step_is_the_notebooks_step(prepared):
    """Against plain PyTorch: forward, backward, clip, AdamW."""
    run = prepared("--dropout=0", "--grad_clip=0.1", "--model=naive")
    other = prepared("--dropout=0", "--model=naive").model
    optimizer = torch.optim.AdamW(other.parameters(), lr=run.config.learning_rate)
    batches = stream_of(run)
    for step in range(3):
        idx, targets = batches.batch(step, 0, run.config.batch_size)
        expected = cross_entropy(other(idx)[0].flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        optimizer.step()
        torch.testing.assert_close(training_step(run), expected)
    for a, b in zip(run.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


@pytest.mark.parametrize("model", ["gpt", "naive"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_accumulation_changes_nothing(prepared, model, dropout):
    """1 x 16 and 4 x 4 sequences: the same batch, the same masks, the same gradient."""
    flags = [f"--model={model}", f"--dropout={dropout}"]
    runs = prepared(*flags), prepared(*flags, "--batch_size=4", "--gradient_accumulation_steps=4")
    losses = []
    for run in runs:
        run.optimizer.step = lambda: None
        run.optimizer.zero_grad = lambda set_to_none: None
        losses.append(training_step(run))
    torch.testing.assert_close(*losses)
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


def test_batched_and_naive_learn_the_same(prepared):
    """The same weights, batches and masks: the same losses, with dropout."""
    fast, slow = prepared("--model=gpt"), prepared("--model=naive")
    slow.model.load_state_dict(fast.model.to_naive().state_dict())
    losses = [[training_step(run).item() for _ in range(8)] for run in (fast, slow)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] != pytest.approx([losses[0][0]] * 8, abs=1e-2)  # it does learn


def test_gradients_are_clipped(prepared):
    run = prepared("--grad_clip=1e-3")
    run.optimizer.step = lambda: None
    run.optimizer.zero_grad = lambda set_to_none: None
    training_step(run)
    norm = torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-2)


# ---- evaluation ------------------------------------------------------------------------------


def test_exact_evaluation_is_the_mean_over_all_windows(prepared):
    run = prepared()
    run.model.eval()
    val, block = run.corpus.val.long(), run.model.config.block_size
    losses, right = [], 0
    for start in range(0, len(val) - 1, block):
        idx = val[start : min(start + block, len(val) - 1)][None]
        targets = val[start + 1 : start + 1 + idx.shape[1]]
        logits = run.model(idx)[0][0]
        losses += cross_entropy(logits, targets, reduction="none").tolist()
        right += (logits.argmax(-1) == targets).sum().item()
    run.model.train()
    result = evaluate_exactly(run)
    assert len(losses) == len(val) - 1
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.accuracy == pytest.approx(right / len(losses), abs=1e-9)
    assert run.model.training  # as it was


def test_ignored_targets_do_not_count(prepared):
    run = prepared()
    batches = list(run.corpus.validation(4, 8))[:2]
    masked = [(idx, targets.clone()) for idx, targets in batches]
    masked[0][1][:, ::2] = -100
    half, whole = evaluate(run.model, masked), evaluate(run.model, batches)
    logits = torch.cat([run.model.eval()(idx)[0] for idx, _ in masked]).flatten(0, 1)
    targets = torch.cat([targets for _, targets in masked]).flatten()
    assert half.loss == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-5)
    counted = targets != -100
    right = (logits.argmax(-1) == targets)[counted].float().mean().item()
    assert half.accuracy == pytest.approx(right) and half != whole


def test_each_split_is_sampled_from_itself(prepared):
    """Of a corpus whose training tokens are all 0 and whose validation tokens are all 1."""
    run = prepared("--eval_mode=sampled")
    zeros, ones = torch.zeros_like(run.corpus.train), torch.ones_like(run.corpus.val)
    run.corpus = dataclasses.replace(run.corpus, train=zeros, val=ones)
    seen = []
    run.update.compute.register_forward_hook(
        lambda module, args, y: seen.append([x.unique().tolist() for x in args])
    )
    evaluation.evaluate_splits(run)
    count = run.config.eval_iters
    assert seen == [[[0], [0]]] * count + [[[1], [1]]] * count


def test_sampled_evaluation_is_repeatable_and_near(prepared):
    run = prepared("--eval_mode=sampled", "--eval_iters=40")
    first, second = evaluation.evaluate_splits(run), evaluation.evaluate_splits(run)
    assert first == second
    assert first[1].loss == pytest.approx(evaluate_exactly(run).loss, rel=0.05)
    run.update.step = 1
    assert evaluation.evaluate_splits(run) != first


@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_logits_of_an_evaluation_are_bounded(prepared, monkeypatch, mode):
    """Three sequences at a time give what sixteen and more do."""
    run = prepared(f"--eval_mode={mode}")
    expected = *evaluation.evaluate_splits(run), evaluate_exactly(run)
    elements = []
    run.model.register_forward_hook(lambda *args: elements.append(args[-1][0].numel()))
    sequence = run.model.config.block_size * run.model.config.vocab_size
    monkeypatch.setattr(evaluation, "EVALUATION_LOGITS", 3 * sequence + 1)
    found = *evaluation.evaluate_splits(run), evaluate_exactly(run)
    assert max(elements) == 3 * sequence
    for a, b in zip(found, expected, strict=True):
        assert dataclasses.astuple(a) == pytest.approx(dataclasses.astuple(b), rel=1e-6)


def test_what_is_evaluated_at_once():
    """Of a small model all; of GPT-2, with its 50,304 tokens, five sequences; at least one."""
    batch = torch.zeros(2, 12, 1024, dtype=torch.int64).unbind()
    for vocab_size, rows in ((65, [12]), (50_304, [5, 5, 2]), (2**20, [1] * 12)):
        config = GPTConfig(vocab_size=vocab_size, block_size=1024)
        pieces = list(evaluation.in_pieces(config, [batch]))
        assert [len(idx) for idx, _ in pieces] == [len(targets) for _, targets in pieces] == rows


# ---- a whole run -----------------------------------------------------------------------------


def test_the_run_folder(trained_run):
    assert {path.name for path in trained_run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "best",
        "last",
    }
    assert (trained_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((trained_run / "config.json").read_text())
    assert content["preset"] == "baby-cpu" and content["model"]["n_embd"] == 16
    assert len(content["data"]["sha256"]) == 64


def test_metrics_have_exactly_these_keys(trained_run):
    lines = (trained_run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    keys = {
        "eval": ["kind", "step", "train_loss", "val_loss", "val_accuracy", "elapsed_s"],
        "train": ["kind", "step", "loss", "lr", "step_ms", "tokens_per_s", "mfu"],
    }
    for record in records[:-1]:
        assert list(record) == keys[record["kind"]]
        assert all(isinstance(record[key], (int, float)) for key in list(record)[1:])
    steps = {
        kind: [record["step"] for record in records if record["kind"] == kind]
        for kind in ("eval", "train", "end")
    }
    assert steps == {"eval": [0, 4, 8, 12], "train": [2, 4, 6, 8, 10, 12], "end": [12]}
    evaluations = [record["val_loss"] for record in records if record["kind"] == "eval"]
    assert evaluations[-1] < evaluations[0]
    assert records[-1]["val_loss"] == evaluations[-1]
    assert records[-1]["val_bits_per_character"] == pytest.approx(evaluations[-1] / math.log(2))


def test_the_log_says_what_the_clock_says(prepared, tmp_path, monkeypatch):
    """Two steps of 2.5 s, of 0.5 s at the machine's rate, on bytes: four of three characters."""
    (tmp_path / "text.txt").write_text("né " * 2000, encoding="utf-8")
    run = prepared("--tokenizer=bytes", f"--data={tmp_path / 'text.txt'}")
    now = [100.0]
    monkeypatch.setattr(logs, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    log = Log(run, step_seconds_at_rate=0.5)
    with log.progress_bar():
        for run.update.step in (1, 2):
            now[0] += 2.5
            log.stepped(torch.tensor(3.0))
    (record,) = read_metrics(log.path)
    tokens = run.config.sequences * run.model.config.block_size
    assert [record[name] for name in ("step", "loss", "step_ms", "tokens_per_s", "mfu")] == [
        *(2, 3.0, 2500.0, tokens / 2.5, 0.2)
    ]
    shown = f"loss 3.000, {tokens / 2.5:,.0f} tokens/s, MFU 20%"
    assert re.fullmatch(shown + r"(, [\d,]+ MiB)?", log.bar.postfix)
    one_bit = Evaluation(loss=math.log(2), accuracy=0.5, exact_match=0.0, targets=2, rows=1)
    assert log.bits_per_character(one_bit) == pytest.approx(4 / 3, rel=1e-2)


def test_best_is_the_best_and_last_the_last(trained_run):
    evaluations = [r for r in read_metrics(trained_run / "metrics.jsonl") if r["kind"] == "eval"]
    best = min(evaluations, key=lambda record: record["val_loss"])
    assert open_checkpoint(trained_run, "best").progress.step == best["step"]
    last = open_checkpoint(trained_run, "last").progress
    assert (last.step, last.evaluated_step, last.best_step) == (12, 12, best["step"])
    assert last.best_val_loss == best["val_loss"]


def comparable(folder):
    """metrics.jsonl without what a clock measured."""
    timed = {"elapsed_s", "step_ms", "tokens_per_s", "mfu", "peak_memory_bytes"}
    return [
        {name: value for name, value in record.items() if name not in timed}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def test_the_same_seed_gives_the_same_run(train_main, tiny_flags, trained_run, tmp_path):
    assert train_main([*tiny_flags, f"--out_dir={tmp_path / 'a'}"]) == 0
    assert_same_weights(weights_of(trained_run), weights_of(tmp_path / "a"))
    assert comparable(trained_run) == comparable(tmp_path / "a")
    assert train_main([*tiny_flags, f"--out_dir={tmp_path / 'b'}", "--seed=1"]) == 0
    assert comparable(trained_run) != comparable(tmp_path / "b")


@pytest.mark.parametrize(
    "asked",
    [torch.no_grad, torch.inference_mode, lambda: default_dtype(torch.float64)],
    ids=["no_grad", "inference_mode", "float64"],
)
def test_what_the_caller_asked_of_torch_changes_nothing(
    train_main, tiny_flags, trained_run, tmp_path, asked
):
    """Float64 was refused in the optimizer's kernel, once there was a run folder."""
    with asked():
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        before = torch.get_default_dtype()
        assert train_main([*tiny_flags, f"--out_dir={tmp_path / 'run'}"]) == 0
        assert state == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        assert torch.get_default_dtype() == before
    assert_same_weights(weights_of(trained_run), weights_of(tmp_path / "run"))


@contextlib.contextmanager
def default_dtype(dtype):
    """As torch.set_default_dtype, for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("preset", "given", "message"),
    [
        ("nosuch", {}, "unknown preset 'nosuch'"),
        ("cpu", {"n_heads": 4}, "unknown setting 'n_heads'; did you mean n_head?"),
        ("cpu", {"n_head": "4"}, "n_head must be a whole number"),
    ],
)
def test_settings_are_checked_whoever_makes_them(preset, given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        trainer.train(Settings(preset, given))


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


def test_a_checkpoint_is_no_run_folder(train_main, trained_run, capsys):
    for name in ("best", "last"):
        before = (trained_run / name / "config.json").read_bytes()
        assert train_main([f"--out_dir={trained_run / name}", "--resume"]) == 2
        message = f"is a checkpoint, not a run folder; give --out_dir {trained_run}\n"
        assert capsys.readouterr().err.endswith(message)
        assert (trained_run / name / "config.json").read_bytes() == before


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "r+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


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


def test_a_sample_that_cannot_fit_is_refused_at_the_start(train_main, tiny_flags, tmp_path, capsys):
    argv = [*tiny_flags, f"--out_dir={tmp_path / 'run'}", "--sample_tokens=100000000000"]
    assert train_main(argv) == 2
    assert "free: give a smaller --sample_tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


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


def test_a_full_disk_is_one_line(prepared, monkeypatch):
    run = prepared()
    trainer.save(run, "last")
    run.writer.wait()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    trainer.save(run, "last")
    with pytest.raises(RunError, match="No space left.*the checkpoint before is untouched"):
        run.writer.wait()
    assert open_checkpoint(run.folder, "last")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_has_the_losses_of_an_uncompiled_one(
    train_main, tiny_flags, trained_run, tmp_path, monkeypatch, backend
):
    if backend == "inductor" and not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler")
    compiled, compile = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model: compiled.append(model) or compile(model, backend=backend)
    )
    assert train_main([*tiny_flags, f"--out_dir={tmp_path / 'run'}", "--compile"]) == 0
    assert [type(model) for model in compiled] == [GPT]
    plain, found = (
        [record.get("loss", record.get("val_loss")) for record in comparable(folder)]
        for folder in (trained_run, tmp_path / "run")
    )
    assert found == pytest.approx(plain, rel=1e-4) and len(plain) == 11


@pytest.mark.parametrize("model", ["multihead", "head", "bigram-embedding", "bigram"])
def test_every_rung_trains(train_main, tiny_flags, tmp_path, model):
    folder = tmp_path / model
    assert train_main([*tiny_flags, f"--model={model}", f"--out_dir={folder}"]) == 0
    losses = [r["val_loss"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "eval"]
    assert losses[-1] < losses[0]


def test_a_padded_vocabulary_is_never_sampled(prepared):
    run = prepared("--vocab_multiple=64")
    assert run.model.config.vocab_size == 64 > run.corpus.tokenizer.vocab_size
    with torch.no_grad():
        run.model.lm_head.bias[run.corpus.tokenizer.vocab_size :] = 1e4
    trainer.show_sample(run)  # decoding one of them would raise


def test_flops_at_the_notebooks_size():
    """ANCHORS of the design: 1.046 TFLOP dense and 0.058 in attention for 64 x 256 tokens."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert trainer.flops_per_step(model, 64) == pytest.approx(1.046e12 + 0.058e12, rel=2e-3)


def test_losses_are_read_where_lines_are_written_and_nowhere_else(prepared, monkeypatch):
    """In between nothing asks a loss or the guard for a number: a GPU would be waited for."""
    run = prepared("--max_iters=24", "--eval_interval=24", "--log_interval=8")
    loss_read, norms_read = [], []
    readers = ("item", "tolist", "numpy", "cpu", "__float__", "__bool__", "__format__", "__repr__")

    class Counted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") in readers:
                loss_read.append(run.step)
            return super().__torch_function__(function, types, args, kwargs)

    step, look = trainer.training_step, Guard.look
    monkeypatch.setattr(trainer, "training_step", lambda run: step(run).as_subclass(Counted))
    monkeypatch.setattr(
        Guard, "look", lambda self, step: norms_read.append(step) or look(self, step)
    )
    trainer._train(run)
    assert loss_read == [8, 16, 24]
    assert norms_read == [0, 8, 16, 24]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_does_not_wait_for_the_gpu(prepared):
    run = prepared("--device=cuda")
    for _ in range(6):  # eager, captured, replayed
        trainer.training_step(run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            trainer.training_step(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_plot_takes_the_place_of_the_last_one_whole(tmp_path):
    """It was written in place: whoever looked meanwhile, or after a crash, saw half of it."""
    metrics, image = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    metrics.write_text("")
    logs.plot_losses(metrics, image)
    os.link(image, tmp_path / "before")
    first = image.read_bytes()
    metrics.write_text('{"kind": "eval", "step": 1, "train_loss": 1, "val_loss": 2}\n')
    logs.plot_losses(metrics, image)
    assert first.startswith(b"\x89PNG") and image.read_bytes() != first
    assert (tmp_path / "before").read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png", "before"}


def test_a_plot_holds_no_more_points_for_a_longer_run(tmp_path, monkeypatch):
    """The first and the last among them, whatever their number."""
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(logs, "PLOTTED", 10)
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **how: drawn.append(list(x)) or plot(self, x, y, **how)
    )
    for count in (9, 10, 35, 101):
        records = [
            {"kind": "eval", "step": s, "train_loss": 1, "val_loss": 2} for s in range(count)
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        logs.plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
        steps = drawn[-1]
        assert (steps[0], steps[-1]) == (0, count - 1) and steps == sorted(set(steps))
        assert len(steps) == count if count <= 10 else 9 <= len(steps) <= 11
