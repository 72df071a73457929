"""Where metrics also go: what is sent, when that ends, and what a user must have for it."""

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from gptcore import trackers, trainer
from gptcore.config import RunError
from gptcore.flags import parse_settings
from gptcore.log import read_metrics
from gptcore.trainer import train


def test_tensorboard_gets_what_metrics_get(tiny_flags, tmp_path, monkeypatch):
    """Also where a run broke after its last checkpoint, and went through some steps again."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    flags = [*tiny_flags, f"--out_dir={folder}", "--log=tensorboard"]
    step = trainer.training_step

    def breaks(run):
        if run.step == 10:
            raise RunError("broke")
        return step(run)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="broke"):
        patch.setattr(trainer, "training_step", breaks)
        train(parse_settings(flags))
    train(parse_settings([*flags, "--resume"]))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    records = read_metrics(folder / "metrics.jsonl")
    for kind, name in (("train", "loss"), ("train", "lr"), ("eval", "val_loss")):
        expected = [(r["step"], r[name]) for r in records if r["kind"] == kind]
        found = [(e.step, e.value) for e in events.Scalars(f"{kind}/{name}")]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6)


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that notes the calls."""
    module = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None, origin="wandb/__init__.py")
    module.calls, module.axes = [], {}

    class Run:
        def define_metric(self, name, step_metric=None):
            module.axes[name] = step_metric

        def log(self, values):
            module.calls.append((values.pop("step"), values))

        def finish(self, exit_code=None):
            module.calls.append(f"finished with {exit_code}")

    module.login = lambda: None
    module.init = lambda **options: module.calls.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_what_metrics_get(tiny_flags, tmp_path, wandb):
    folder = tmp_path / "run"
    train(parse_settings([*tiny_flags, f"--out_dir={folder}", "--log=wandb"]))
    options, *logged, last = wandb.calls
    assert options["config"]["n_embd"] == 16 and options["name"] == "run"
    assert options["reinit"] == "finish_previous"
    assert last == "finished with 0"
    assert wandb.axes == {"step": None, "*": "step"}  # a spike may come after later steps
    records = read_metrics(folder / "metrics.jsonl")
    assert [step for step, _ in logged] == [record["step"] for record in records]
    assert logged[0][1]["eval/val_loss"] == records[0]["val_loss"]
    assert logged[0][1].keys() >= {"eval/train_loss", "eval/val_accuracy"}
    json.dumps(options["config"])


def test_wandb_goes_on_where_a_folder_did(tmp_path, wandb, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "a", tmp_path / "b", Path("a")):
        trackers.open_tracker("wandb", folder, {}, 0)
    a, b, again = (options["id"] for options in wandb.calls)
    assert a == again != b and wandb.calls[0]["resume"] == "allow"


def test_a_run_that_breaks_ends_its_tracker(tiny_flags, tmp_path, wandb, monkeypatch):
    """A trial after it, in the same process, would log into it."""

    def broken(run):
        raise RunError("broke")

    monkeypatch.setattr("gptcore.trainer.training_step", broken)
    with pytest.raises(RunError, match="broke"):
        train(parse_settings([*tiny_flags, f"--out_dir={tmp_path / 'run'}", "--log=wandb"]))
    assert wandb.calls[-1] == "finished with 1"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.parametrize("there", ["nothing", "a folder"])
def test_a_missing_tracker_is_one_clear_line(
    tiny_flags, tmp_path, monkeypatch, train_main, capsys, name, there
):
    """A folder of that name, such as wandb leaves, is not the package."""
    spec = None if there == "nothing" else ModuleSpec(name, None, is_package=True)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: spec)
    assert train_main([*tiny_flags, f"--out_dir={tmp_path / 'run'}", f"--log={name}"]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: --log {name} needs the package {name}; pip install -e '.[{name}]', or leave "
        "--log out\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("call", "left"), [("login", False), ("init", True)])
def test_what_wandb_refuses_is_one_line(
    tiny_flags, tmp_path, train_main, capsys, wandb, call, left
):
    """Without a login nothing is left behind; later a run folder, and how to go on in it."""

    def refuse(**_):
        raise RuntimeError("No API key configured.\nUse `wandb login`")

    setattr(wandb, call, refuse)
    folder = tmp_path / "run"
    assert train_main([*tiny_flags, f"--out_dir={folder}", "--log=wandb"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --log wandb: No API key configured") and error.count("\n") == 1
    assert (f"--out_dir {folder} --resume" if left else "WANDB_MODE=offline") in error
    assert folder.exists() == left
