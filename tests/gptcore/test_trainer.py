"""Training: what is learned, what is written."""

import contextlib
import json
import math
import os
import re
import shutil
import time
import types

import pytest
import torch
from torch.nn.functional import cross_entropy

from gptcore import checkpoint, machine, tasks, trainer
from gptcore import log as logs
from gptcore.checkpoint import open_checkpoint
from gptcore.config import ConfigError, RunError, TrainConfig
from gptcore.data import BatchStream
from gptcore.evaluation import Evaluation, evaluate_exactly
from gptcore.flags import Settings
from gptcore.generation import generate
from gptcore.log import Log, read_metrics
from gptcore.model import GPT
from gptcore.optim import learning_rate, parameter_groups
from gptcore.trainer import training_step
from tests.gptcore.runs import assert_same_weights, comparable, weights_of


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
    for module in (logs, machine):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    log = Log(run, step_seconds_at_rate=0.5)
    with log.progress_bar():
        for run.update.step in (1, 2):
            now[0] += 2.5
            log.stepped(torch.tensor(3.0))
            log.look(wait=False)
    (record,) = read_metrics(log.path)
    tokens = run.config.sequences * run.model.config.block_size
    assert [record[name] for name in ("step", "loss", "step_ms", "tokens_per_s", "mfu")] == [
        *(2, 3.0, 2500.0, tokens / 2.5, 0.2)
    ]
    shown = f"loss 3.000, {tokens / 2.5:,.0f} tokens/s, MFU 20%"
    assert re.fullmatch(shown + r"(, [\d,]+ MiB)?", log.bar.postfix)
    one_bit = Evaluation(loss=math.log(2), accuracy=0.5, exact_match=0.0, targets=2, rows=1)
    assert log.bits_per_character(one_bit) == pytest.approx(4 / 3, rel=1e-2)


def test_a_run_says_what_its_evaluations_found(prepared, monkeypatch, capsys):
    """The best of them before the last; and the learning rate of each step, 0.001 more a step."""
    run = prepared("--schedule=constant", "--learning_rate=0.024", "--warmup_iters=23")
    losses = {0: (4.1, 4.2), 4: (3.1, 3.2), 8: (2.1, 2.2), 12: (1.9, 2.3)}
    monkeypatch.setattr(
        trainer,
        "evaluate_splits",
        lambda run: [Evaluation(x, x / 10, 0.0, targets=599, rows=75) for x in losses[run.step]],
    )
    trainer._train(run)
    *records, end = read_metrics(run.folder / "metrics.jsonl")
    found = {
        record["step"]: [record[name] for name in ("train_loss", "val_loss", "val_accuracy")]
        for record in records
        if record["kind"] == "eval"
    }
    assert found == {step: [train, val, val / 10] for step, (train, val) in losses.items()}
    rates = {record["step"]: record["lr"] for record in records if record["kind"] == "train"}
    assert rates == pytest.approx({step: 0.001 * step for step in range(2, 13, 2)})
    assert run.optimizer.param_groups[0]["lr"] == rates[12]
    assert (end["val_loss"], end["best_val_loss"], end["best_step"]) == (2.3, 2.2, 8)
    out = capsys.readouterr().out
    assert "5,400 training and 600 validation tokens" in out
    said = "val loss 2.2000 (3.174 bits per character), accuracy 22.0%"
    assert f"step 8: train loss 2.1000, {said}" in out
    said = "2.3000 over 599 targets (3.318 bits per character, accuracy 23.0%)"
    assert f"exact validation loss {said} after 12 steps" in out


def test_best_is_the_best_and_last_the_last(trained_run):
    evaluations = [r for r in read_metrics(trained_run / "metrics.jsonl") if r["kind"] == "eval"]
    best = min(evaluations, key=lambda record: record["val_loss"])
    assert open_checkpoint(trained_run, "best").progress.step == best["step"]
    last = open_checkpoint(trained_run, "last").progress
    assert (last.step, last.evaluated_step, last.best_step) == (12, 12, best["step"])
    assert last.best_val_loss == best["val_loss"]


def test_checkpoints_have_an_interval_of_their_own(prepared, monkeypatch):
    run, saved, save = prepared("--checkpoint_interval=3"), [], trainer.save
    monkeypatch.setattr(
        trainer, "save", lambda run, *names: saved.append(run.step) or save(run, *names)
    )
    trainer._train(run)
    assert saved == [0, 3, 4, 6, 8, 9, 12]


def test_the_last_loss_is_exact_also_where_the_others_are_sampled(prepared):
    run = prepared("--eval_mode=sampled", "--max_iters=4")
    trainer._train(run)
    *_, sampled, end = read_metrics(run.folder / "metrics.jsonl")
    assert end["val_loss"] == evaluate_exactly(run).loss != sampled["val_loss"]


def test_so_much_is_held_out_as_asked(prepared):
    sizes = prepared("--val_fraction=0.2").corpus.sizes
    assert tuple(sizes.values()) == (4800, 1200)


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


def test_a_sample_that_cannot_fit_is_refused_at_the_start(train_main, tiny_flags, tmp_path, capsys):
    argv = [*tiny_flags, f"--out_dir={tmp_path / 'run'}", "--sample_tokens=100000000000"]
    assert train_main(argv) == 2
    assert "free: give a smaller --sample_tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("gpt", "2 layers, 2 heads of 4, 16 wide, block 8"),
        ("multihead", "2 heads of 4, 16 wide, block 8"),
        ("head", "a head of 4, 16 wide, block 8"),
        ("bigram", "parameters: block 8"),
    ],
)
def test_a_rung_is_announced_with_what_it_has(prepared, capsys, model, words):
    logs.announce(prepared(f"--model={model}"), rate=1e9)
    line = next(line for line in capsys.readouterr().out.splitlines() if "parameters" in line)
    assert line.endswith(f" {words}")


def test_a_padded_vocabulary_is_never_sampled(prepared):
    run = prepared("--vocab_multiple=64")
    assert run.model.config.vocab_size == 64 > run.corpus.tokenizer.vocab_size
    with torch.no_grad():
        run.model.lm_head.bias[run.corpus.tokenizer.vocab_size :] = 1e4
    trainer.show_sample(run)  # decoding one of them would raise


@pytest.mark.parametrize("left", [0, 1])
def test_losses_are_read_at_looks_and_nowhere_else(prepared, monkeypatch, left):
    """Elsewhere nothing asks a loss or the guard for a number: a GPU would be waited for.

    And there, but at evaluations, only for what was sent for one look before.
    """
    run = prepared("--max_iters=48", "--eval_interval=24", "--log_interval=8", "--eval_iters=1")
    monkeypatch.setitem(logs.LEFT, "cpu", left)
    loss_read, norms_read = [], []
    readers = ("item", "tolist", "numpy", "cpu", "to")
    readers += ("__float__", "__bool__", "__format__", "__repr__")

    class Counted(torch.Tensor):
        def __new__(cls, x, read):
            counted = x.as_subclass(cls)
            counted.read = read
            return counted

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            (first,) = (x for x in args[:1] if isinstance(x, cls))
            if getattr(function, "__name__", "") in readers:
                first.read.append(run.step)
            result = super().__torch_function__(function, types, args, kwargs)
            if type(result) is cls:
                result.read = first.read
            return result

    step = trainer.training_step
    monkeypatch.setattr(trainer, "training_step", lambda run: Counted(step(run), loss_read))
    run.update.guard.norms = Counted(run.update.guard.norms, norms_read)
    trainer._train(run)
    assert loss_read == ([16, 24, 24, 40, 48, 48] if left else [8, 16, 24, 32, 40, 48])
    assert norms_read == loss_read
    lines = read_metrics(run.folder / "metrics.jsonl")
    order = [(line["kind"], line["step"]) for line in lines if line["kind"] != "end"]
    assert order == [
        *(("eval", 0), ("train", 8), ("train", 16), ("train", 24), ("eval", 24)),
        *(("train", 32), ("train", 40), ("train", 48), ("eval", 48)),
    ]


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("data", ["text", "add"])
def test_samples_are_as_long_as_asked_and_captured_only_if_updates_are(
    prepared, monkeypatch, capsys, data, cuda_graph
):
    asked = []

    def noted(*arguments, **options):
        asked.append((options["max_new_tokens"], options["cuda_graph"]))
        return generate(*arguments, **options)

    for module in (trainer, tasks):
        monkeypatch.setattr(module, "generate", noted)
    task = ["--data=add", "--digits=1"] if data == "add" else []
    flags = [f"--cuda_graph={str(cuda_graph).lower()}", "--sample_tokens=9", *task]
    trainer.show_sample(prepared(*flags))
    assert asked == [(3 if task else 9, cuda_graph)] and "  | " in capsys.readouterr().out


@pytest.mark.parametrize("stopped", [False, True])
def test_what_is_read_later_is_what_was_read_at_once(
    train_main, tiny_flags, tmp_path, monkeypatch, stopped
):
    """Losses and rates of each step, to the last one before a signal; and times that add up."""
    step, flags = trainer.training_step, [*tiny_flags, "--eval_interval=12", "--sample_tokens=0"]

    def slow(run):
        time.sleep(0.02)
        if stopped and run.step == 6:
            run.stop.set()
        return step(run)

    monkeypatch.setattr(trainer, "training_step", slow)
    lines = []
    for left in (0, 1):
        monkeypatch.setitem(logs.LEFT, "cpu", left)
        assert train_main([*flags, f"--out_dir={tmp_path / str(left)}"]) == stopped
        metrics = read_metrics(tmp_path / str(left) / "metrics.jsonl")
        lines.append([line for line in metrics if line["kind"] == "train"])
    at_once, later = lines
    assert [line["step"] for line in later] == ([2, 4, 6] if stopped else [2, 4, 6, 8, 10, 12])
    for a, b in zip(at_once, later, strict=True):
        assert (a["step"], a["loss"], a["lr"]) == (b["step"], b["loss"], b["lr"])
        assert b["step_ms"] >= 20 and b["mfu"] > 0


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_does_not_wait_for_the_gpu(prepared):
    run = prepared("--device=cuda")
    log = Log(run, step_seconds_at_rate=1e-3)
    with log.progress_bar():
        for _ in range(6):  # eager, captured, replayed
            log.stepped(trainer.training_step(run))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(6):
                log.stepped(trainer.training_step(run))
                log.look(wait=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        log.look(wait=True)
    lines = [line for line in read_metrics(log.path) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert all(line["loss"] > 0 and line["step_ms"] > 0 for line in lines)


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
        Axes, "plot", lambda *to, **how: drawn.append((how["label"], *to[1:])) or plot(*to, **how)
    )
    for count in (9, 10, 35, 101):
        records = [
            {"kind": "eval", "step": s, "train_loss": 1, "val_loss": 2} for s in range(count)
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        logs.plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
        losses = {label: {*y} for label, _, y in drawn[-2:]}
        assert losses == {"training": {1}, "validation": {2}}
        steps = list(drawn[-1][1])
        assert (steps[0], steps[-1]) == (0, count - 1) and steps == sorted(set(steps))
        assert len(steps) == count if count <= 10 else 9 <= len(steps) <= 11


@pytest.mark.parametrize(
    ("losses", "limits"),
    [
        ([26, 1.5, 1.3], (1.28, 1.52)),
        ([26, 1.5, math.nan, 1.3], (1.28, 1.52)),
        ([26, 1.5, 1.5], (1.4, 1.6)),
        ([4, 2], (1.9, 4.1)),  # matplotlib's own
        ([4, math.nan, math.nan], (3.78, 4.22)),
    ],
    ids=["learning", "not a number", "flat", "two", "nothing finite"],
)
def test_a_plot_shows_what_was_learnt(tmp_path, monkeypatch, losses, limits):
    """An untrained model's 26 had made one line of all that came after."""
    from matplotlib.figure import Figure

    seen, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *to, **how: seen.append(self.axes[0].get_ylim()) or savefig(self, *to, **how),
    )
    lines = [
        {"kind": "eval", "step": step, "train_loss": loss, "val_loss": loss}
        for step, loss in enumerate(losses)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    logs.plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert seen == [pytest.approx(limits)]
