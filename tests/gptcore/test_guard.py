"""Loss safety: what is not finite never reaches the weights, and what happens then."""

import dataclasses
import json
import math

import pytest
import torch

from gptcore import guard, recovery, trainer
from gptcore import log as logs
from gptcore.checkpoint import open_checkpoint
from gptcore.guard import Guard, Watch
from gptcore.log import read_metrics
from gptcore.optim import make_optimizer

NAN, INF = math.nan, math.inf


def everything(run):
    """Copies of weights and optimizer state."""
    state = [t for p in run.update.parameters for t in run.optimizer.state[p].values()]
    return [t.detach().clone() for t in (*run.model.parameters(), *state)]


def poison(run, what, value=NAN):
    """Make the loss and all gradients, or one element of one, `value` in the next update."""
    real = run.update.guard.inspect

    def inspect(parameters, loss, *rest):
        run.update.guard.inspect = real
        if what == "loss":
            for x in (loss, *(p.grad for p in parameters)):
                x.mul_(value)
        else:
            parameters[3].grad.view(-1)[0] = value
        return real(parameters, loss, *rest)

    run.update.guard.inspect = inspect


# ---- on the device ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--grad_clip=1"],
        [],
        ["--optimizer=sgd"],
        ["--optimizer=muon", "--grad_clip=1"],
        ["--dtype=bfloat16"],
        ["--batch_size=4", "--gradient_accumulation_steps=4"],
    ],
    ids=["adamw-clip", "adamw", "sgd", "muon", "bfloat16", "accumulated"],
)
def test_such_an_update_does_not_happen(prepared, flags, what, value):
    run = prepared(*flags)
    for _ in range(3):
        trainer.training_step(run)
    before = everything(run)
    poison(run, what, value)
    trainer.training_step(run)
    assert all(map(torch.equal, before, everything(run)))
    assert run.step == 4
    trainer.training_step(run)
    assert not any(map(torch.equal, before, everything(run)))  # and the next one does
    norms = dict(run.update.guard.look(run.step))
    assert list(norms) == [0, 1, 2, 3, 4]
    assert [math.isfinite(norm) for norm in norms.values()] == [True, True, True, False, True]


def test_the_first_update_of_all(prepared):
    run = prepared()
    before = [p.clone() for p in run.model.parameters()]
    poison(run, "loss")
    trainer.training_step(run)
    assert all(map(torch.equal, before, run.model.parameters()))
    assert all((t == 0).all() for t in everything(run)[len(before) :])


def test_without_a_guard_the_weights_are_gone(prepared, monkeypatch):
    """The damage that the tests above would see."""
    run = prepared()
    run.optimizer.found_inf = None
    poison(run, "loss")
    trainer.training_step(run)
    assert any(p.isnan().any() for p in run.model.parameters())


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_a_guard_changes_no_bit_of_a_good_update(prepared, clip):
    """Against the same steps by an optimizer nobody guards."""
    guarded, plain = prepared(f"--grad_clip={clip}"), prepared(f"--grad_clip={clip}")
    plain.optimizer.found_inf = None
    for run in (guarded, plain):
        for _ in range(4):
            trainer.training_step(run)
    assert all(map(torch.equal, everything(guarded), everything(plain)))


def test_norms_are_those_before_clipping(prepared):
    run = prepared("--grad_clip=1e-3")
    run.optimizer.zero_grad = lambda set_to_none: None
    trainer.training_step(run)
    clipped = torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm()
    assert clipped <= 1e-3 < run.update.guard.look(1)[0][1]


def test_nothing_waits_for_the_device():
    """The whole inspection works where tensors have no values."""
    with torch.device("meta"):
        parameter = torch.nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        inspector = Guard(torch.optim.SGD([parameter]), torch.device("meta"))
        inspector.inspect([parameter], torch.ones(()), torch.ones(1, dtype=torch.int64), 1.0)


def test_a_look_sees_each_update_once(prepared):
    run = prepared()
    looks = []
    for count in (2, 0, 3):
        for _ in range(count):
            trainer.training_step(run)
        looks.append([step for step, _ in run.update.guard.look(run.step)])
    assert looks == [[0, 1], [], [2, 3, 4]]


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_in_a_captured_update(tiny_flags, tmp_path, what):
    """The flag is read by the kernels of a graph: NaN weights of one group poison a replay."""
    from gptcore.flags import parse_settings

    flags = [*tiny_flags, "--device=cuda", "--dtype=bfloat16"]
    run = trainer.prepare(parse_settings([*flags, f"--out_dir={tmp_path / 'run'}"]))
    for _ in range(6):
        trainer.training_step(run)
    assert run.update.graph is not None
    bias = dict(run.model.named_parameters())["lm_head.bias"]
    half = dict(run.update.compute.named_parameters())["lm_head.bias"]
    good = half.detach().clone()
    half.data.fill_(NAN)
    before = everything(run)
    trainer.training_step(run)
    assert all(map(torch.equal, before, everything(run)))
    assert torch.equal(half, good)  # made again from the masters
    trainer.training_step(run)
    assert not torch.equal(bias, before[[p is bias for p in run.model.parameters()].index(True)])
    health = [math.isfinite(norm) for _, norm in run.update.guard.look(run.step)]
    assert health == [True] * 6 + [False, True]


# ---- on the host -----------------------------------------------------------------------------


def test_spikes_stand_out_of_the_running_median():
    watch = Watch()
    quiet = [(number, 1.0 + 0.1 * (number % 2)) for number in range(40)]
    assert watch.judge([(0, 1000.0), *quiet[1:]]) == ([], [])  # too early to say
    skipped, spikes = watch.judge([(40, 5.0), (41, 6.0), (42, NAN), (43, INF), (44, 1.0)])
    assert skipped == [43, 44] and watch.skipped_in_a_row == 0
    (spike,) = spikes
    assert (spike.step, spike.norm) == (42, 6.0) and spike.median == pytest.approx(1.05, abs=0.06)
    assert watch.judge([(45, 6.0)])[1][0].median == pytest.approx(spike.median, abs=0.06)
    watch.judge([(46, NAN), (47, NAN)])
    assert watch.skipped_in_a_row == 2


def test_a_new_level_is_no_spike_for_long():
    watch = Watch()
    watch.judge([(number, 1.0) for number in range(300)])
    _, spikes = watch.judge([(number, 10.0) for number in range(300, 600)])
    assert len(spikes) == guard.MEDIAN_OVER // 2


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(how): the updates whose number and learning rate `how` wants have a NaN loss."""
    real = trainer.training_step

    def install(how):
        def step(run):
            if how(run.step, run.config.learning_rate):
                poison(run, "loss")
            return real(run)

        monkeypatch.setattr(trainer, "training_step", step)

    return install


def kinds(folder, *names):
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] in names]


def test_stop_is_the_default(train_main, tiny_flags, tmp_path, poisoned, capsys):
    poisoned(lambda step, lr: step == 5)
    folder = tmp_path / "run"
    assert train_main([*tiny_flags, f"--out_dir={folder}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "not finite in step 6, not applied to the weights" in line and "--resume" in line
    assert kinds(folder, "train")[-1]["loss"] is None
    assert kinds(folder, "skipped") == [{"kind": "skipped", "step": 6}]
    assert open_checkpoint(folder, "last").progress.step == 4


def test_skip_goes_on(train_main, tiny_flags, tmp_path, poisoned, capsys):
    poisoned(lambda step, lr: step in (4, 5, 8))
    folder = tmp_path / "run"
    assert train_main([*tiny_flags, f"--out_dir={folder}", "--on_nonfinite=skip"]) == 0
    assert [record["step"] for record in kinds(folder, "skipped")] == [5, 6, 9]
    out = capsys.readouterr().out
    assert "not finite in 2 steps from 5 to 6" in out and "in step 9," in out
    assert kinds(folder, "end")[0]["step"] == 12
    assert kinds(folder, "eval")[-1]["val_loss"] < kinds(folder, "eval")[0]["val_loss"]


def test_skip_gives_up_in_the_end(train_main, tiny_flags, tmp_path, poisoned, capsys, monkeypatch):
    monkeypatch.setattr(recovery, "SKIPPED_AT_MOST", 3)
    poisoned(lambda step, lr: step >= 5)
    folder = tmp_path / "run"
    assert train_main([*tiny_flags, f"--out_dir={folder}", "--on_nonfinite=skip"]) == 1
    assert "3 in a row" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rollback_halves_the_learning_rate(
    train_main, tiny_flags, tmp_path, poisoned, capsys, dtype
):
    """As if the run had been resumed by hand from its last checkpoint, with half the rate."""
    poisoned(lambda step, lr: step == 5 and lr == 5e-3)
    folder, other = tmp_path / "run", tmp_path / "other"
    flags = [*tiny_flags, f"--dtype={dtype}", "--min_lr=1e-3"]
    assert train_main([*flags, f"--out_dir={folder}", "--on_nonfinite=rollback"]) == 0
    assert "back from step 6 to 4, learning rate now 0.0025" in capsys.readouterr().out
    (record,) = kinds(folder, "rollback")
    assert record == {"kind": "rollback", "step": 4, "came_from": 6, "learning_rate": 2.5e-3}
    assert [r["lr"] for r in kinds(folder, "train")] == [5e-3] * 2 + [2.5e-3] * 4
    assert [r["step"] for r in kinds(folder, "train", "eval")] == [
        *(0, 2, 4, 4, 6, 8, 8, 10, 12, 12)
    ]
    assert not kinds(folder, "skipped")  # it did not happen, after all

    assert train_main([*flags, f"--out_dir={other}", "--max_iters=4"]) == 0
    by_hand = [f"--out_dir={other}", "--resume", "--max_iters=12", "--learning_rate=2.5e-3"]
    assert train_main(by_hand) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = ((run / "last" / name).read_bytes() for run in (folder, other))
        assert a == b
    saved = json.loads((folder / "last" / "config.json").read_text())
    rates = saved["train"]["learning_rate"], saved["train"]["min_lr"]
    assert rates == (2.5e-3, 5e-4)  # so that resuming keeps them


def test_rollback_gives_up_in_the_end(train_main, tiny_flags, tmp_path, poisoned, capsys):
    poisoned(lambda step, lr: step == 5)
    folder = tmp_path / "run"
    assert train_main([*tiny_flags, f"--out_dir={folder}", "--on_nonfinite=rollback"]) == 1
    assert "5 times going back to step 4" in capsys.readouterr().err
    rates = [record["learning_rate"] for record in kinds(folder, "rollback")]
    assert rates == [5e-3 / 2**n for n in range(1, 6)]


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_validation_loss_that_is_not_finite(
    train_main, tiny_flags, tmp_path, monkeypatch, capsys, policy
):
    real, losses = trainer.evaluate_splits, iter([False, True, False, False, False])

    def evaluate_splits(run):
        training, evaluation = real(run)
        loss = INF if next(losses) else evaluation.loss
        return training, dataclasses.replace(evaluation, loss=loss)

    monkeypatch.setattr(trainer, "evaluate_splits", evaluate_splits)
    folder = tmp_path / "run"
    code = train_main([*tiny_flags, f"--out_dir={folder}", f"--on_nonfinite={policy}"])
    output = capsys.readouterr()
    assert "the validation loss is inf at step 4" in (output.err if code else output.out)
    assert code == (policy == "stop")
    assert len(kinds(folder, "rollback")) == (policy == "rollback")


def test_a_spike_is_logged(train_main, tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guard, "MEDIAN_FROM", 4)
    real = trainer.training_step

    def step(run):
        if run.step == 7:
            with torch.no_grad():
                run.model.lm_head.weight.mul_(100)
        return real(run)

    monkeypatch.setattr(trainer, "training_step", step)
    folder = tmp_path / "run"
    assert train_main([*tiny_flags, f"--out_dir={folder}"]) == 0
    records = kinds(folder, "spike")
    assert records[0]["step"] == 8 and records[0]["grad_norm"] > 5 * records[0]["median"]
    assert "step 8: gradient norm" in capsys.readouterr().out


def test_every_optimizer_heeds_the_guard(prepared):
    """A new one that does not would lose its weights to the first NaN."""
    for name in ("adamw", "sgd", "muon"):
        run = prepared(f"--optimizer={name}")
        assert make_optimizer(run.model, run.config)._step_supports_amp_scaling


def test_looks_come_between_distant_lines(prepared, poisoned, monkeypatch):
    """The guard keeps so many norms and no more; a look there writes no line."""
    monkeypatch.setattr(logs, "LOOK_EVERY", 2)
    poisoned(lambda step, lr: step == 2)
    run = prepared("--log_interval=5", "--eval_interval=12", "--on_nonfinite=skip")
    trainer._train(run)
    order = [(line["kind"], line["step"]) for line in kinds(run.folder, "train", "skipped")]
    assert order == [("skipped", 3), ("train", 5), ("train", 10)]
