"""Whole runs, of gptcore and of nanoGPT: seconds to a loss, and the ablation."""

import collections
import dataclasses
import functools

import pytest
import torch

from bench import ablation, time_to_loss
from bench.ablation import BATCHES, RATES, STEPS, VARIANTS, WHOLE, table, variants
from bench.harness import OURS, Options, Skip
from bench.run import broken
from bench.time_to_loss import NANOGPT_COMMANDS
from gptcore.config import ConfigError, GPTConfig, RunError
from gptcore.flags import parse_settings

OPTIONS = Options(
    device=torch.device("cpu"), dtype=torch.float32, seconds=1.0, quick=True, data="my.txt"
)

TRAINER = """
import json, os, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out_dir") + 1])
seed = int(sys.argv[sys.argv.index("--seed") + 1])
out.mkdir(parents=True)
(out / "config.json").write_text('{"train": {"dtype": "bfloat16"}}')
with open(out / "metrics.jsonl", "a") as file:
    for step in range(0, 1000, 100):
        loss = 4 - step / 200 - (seed - 1337) / 10
        record = {"kind": "eval", "step": step, "val_loss": loss, "elapsed_s": 2 + step / 10}
        file.write(json.dumps(record) + "\\n")
        file.flush()
        time.sleep(0.01)
time.sleep(60)
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(TRAINER)
    monkeypatch.setattr(time_to_loss, "ROOT", tmp_path)


def test_a_run_ends_with_the_first_evaluation_at_the_target(trainer):
    options = dataclasses.replace(OPTIONS, target=2.5, seeds=2)
    content = time_to_loss.answer(options, None, None, None)
    wanted = {1337: (300, 30.0, 2.5), 1338: (300, 30.0, 2.4)}
    runs = {run["seed"]: (run["steps"], run["seconds"], run["val_loss"]) for run in content["runs"]}
    assert runs == {seed: pytest.approx(run) for seed, run in wanted.items()}
    assert all(run["reached"] and run["dtype"] == "bfloat16" for run in content["runs"])
    assert content["absent"] == {"nanogpt": "no folder named: --nanogpt DIR"}


def test_no_other_text_is_trained_on_unasked(trainer, monkeypatch):
    """train.py takes Python's own where Tiny Shakespeare cannot be had; its losses say nothing."""

    def missing(name):
        raise ConfigError(f"{name} cannot be had")

    monkeypatch.setattr("gptcore.data.load_text", missing)
    options = dataclasses.replace(OPTIONS, data="auto")
    content = time_to_loss.answer(options, None, None, None)
    assert content["runs"] == [] and content["absent"][OURS] == "tinyshakespeare cannot be had"
    monkeypatch.setattr("gptcore.data.load_text", lambda name: None)
    for given, taken in (("auto", "tinyshakespeare"), ("my.txt", "my.txt")):
        options = dataclasses.replace(OPTIONS, data=given)
        command = time_to_loss.train_command(options, 1, "out")
        assert command[command.index("--data") + 1] == taken


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_caches_are_filled_by_a_step_that_does_not_count(device, monkeypatch):
    """17 kernels of a training step would be compiled within the time of the first run."""
    asked = []

    def runner(who):
        def run(options, seed, flags=()):
            asked.append((who, seed, *flags))
            row = {"who": who, "seed": seed, "seconds": 1.0, "steps": 2, "val_loss": 3.0}
            return row | {"reached": False, "curve": []}

        return run

    monkeypatch.setattr(time_to_loss, "gptcore_run", runner(OURS))
    monkeypatch.setattr(time_to_loss, "nanogpt_run", runner("nanogpt"))
    options = dataclasses.replace(OPTIONS, device=torch.device(device), seeds=2)
    content = time_to_loss.answer(options, None, None, None)
    counted = [(who, seed) for seed in (1337, 1338) for who in (OURS, "nanogpt")]
    assert [(run["who"], run["seed"]) for run in content["runs"]] == counted
    if device == "cuda":
        first = [(OURS, 1337, "--max_iters", "1"), ("nanogpt", 1337, "--max_iters=1")]
        counted = [first[0], counted[0], first[1], *counted[1:]]
    assert asked == counted


def test_nanogpt_s_recipe_is_its_readmes_and_targets_are_those_on_record():
    readme = (
        "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
        "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
        "--lr_decay_iters=2000 --dropout=0.0"
    )
    assert {*readme.replace("interval=1", "interval=100").split()} == {*NANOGPT_COMMANDS["cpu"]}
    gpu = dataclasses.replace(OPTIONS, device=torch.device("cuda"))
    assert [time_to_loss.target_of(o) for o in (OPTIONS, gpu)] == [1.8857, 1.4804]


def test_a_run_out_of_time_has_not_reached_the_target(trainer):
    options = dataclasses.replace(OPTIONS, target=-9.0, run_seconds=1.0)
    run = time_to_loss.gptcore_run(options, 1337)
    assert not run["reached"] and run["val_loss"] > -9


def test_no_run_is_begun_that_gets_nowhere(trainer, capsys):
    options = dataclasses.replace(OPTIONS, run_seconds=5.0)
    content = time_to_loss.answer(options, None, None, None)
    assert content["runs"] == [] and set(content["absent"]) == {"gptcore", "nanogpt"}
    out = capsys.readouterr().out
    assert "gptcore skipped: 5 s are left; alone: python -m bench" in out
    assert "val loss" not in out


def test_a_trainer_that_breaks_ends_the_question_with_its_words(tmp_path, monkeypatch):

    (tmp_path / "train.py").write_text("raise SystemExit('error: no such thing')")
    monkeypatch.setattr(time_to_loss, "ROOT", tmp_path)
    with pytest.raises(RunError, match="no such thing"):
        time_to_loss.gptcore_run(OPTIONS, 1337)


def edited_trainer(tmp_path, monkeypatch, old, new):
    assert old in TRAINER
    (tmp_path / "train.py").write_text(TRAINER.replace(old, new))
    monkeypatch.setattr(time_to_loss, "ROOT", tmp_path)


@pytest.mark.parametrize("death", ["sys.exit('error: disk full')", "os.kill(os.getpid(), 9)"])
def test_a_trainer_that_breaks_after_an_evaluation_has_not_just_missed_the_target(
    death, tmp_path, monkeypatch
):

    edited_trainer(tmp_path, monkeypatch, "        time.sleep(0.01)", f"        {death}")
    said = "disk full" if "disk" in death else "exit code -9"
    with pytest.raises(RunError, match=said):
        time_to_loss.gptcore_run(OPTIONS, 1337)


def test_a_loss_that_is_no_number_reaches_nothing(tmp_path, monkeypatch):
    edited_trainer(tmp_path, monkeypatch, '"val_loss": loss', '"val_loss": loss if step else None')
    run = time_to_loss.gptcore_run(dataclasses.replace(OPTIONS, target=3.2), 1337)
    assert (run["steps"], run["seconds"], run["val_loss"]) == (200, 20.0, 3.0)


NANOGPT_BIGRAMS = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: 0.00M")
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets=None):
        logits, loss = self.table(idx), nn.functional.cross_entropy
        return logits, loss(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""
NANOGPT_TRAINER = """
import pickle, shutil, time
from pathlib import Path
import torch
from model import GPT, GPTConfig

data = Path("data/shakespeare_char")
shutil.copytree(data, SEEN)
args = {"block_size": 8, **pickle.loads((data / "meta.pkl").read_bytes())}
model = GPT(GPTConfig(**args))
print("step 0: train loss 4.2000, val loss 4.3000")
print("iter 0: loss 4.2000, time 1.00ms, mfu -100.00%")
time.sleep(0.6)
print("step 250: train loss 2.1000, val loss 2.2000")
print("saving checkpoint to out-shakespeare-char")
time.sleep(0.2)  # stopped now, it would leave half a file
weights = {"_orig_mod." + name: w for name, w in model.state_dict().items()}
Path("out-shakespeare-char").mkdir()
torch.save({"model": weights, "model_args": args}, "out-shakespeare-char/ckpt.pt")
torch.save(model.table.weight.detach(), SEEN + "/table")
print("iter 250: loss 2.1000, time 1.00ms, mfu -100.00%")
time.sleep(60)
"""


def test_nanogpt_is_timed_from_its_first_evaluation_and_judged_on_the_whole_split(tmp_path):
    """A stand-in, whose loss of a character follows from the one before: no window matters."""
    seen, folder, text = tmp_path / "seen", tmp_path / "nanogpt", "held out is what is last" * 30
    (folder / "config").mkdir(parents=True)
    for name in ("config/train_shakespeare_char.py", "configurator.py"):
        (folder / name).touch()
    (folder / "model.py").write_text(NANOGPT_BIGRAMS)
    (folder / "train.py").write_text(NANOGPT_TRAINER.replace("SEEN", repr(str(seen))))
    (tmp_path / "text").write_text(text)
    given = {"nanogpt": folder, "data": str(tmp_path / "text"), "target": 2.2}
    run = time_to_loss.nanogpt_run(dataclasses.replace(OPTIONS, **given), 1)
    assert run["curve"] == [[0.0, 4.3], [run["seconds"], 2.2]]
    assert run["seconds"] > 0.3  # of 0.6, the first line may be read late
    assert (run["steps"], run["val_loss"], run["reached"]) == (250, 2.2, True)

    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = [ids[character] for character in text]
    train, val = (memoryview((seen / f"{n}.bin").read_bytes()).cast("H") for n in ("train", "val"))
    assert (train.tolist(), val.tolist()) == (tokens[:648], tokens[648:])
    log_p = torch.load(seen / "table").double().log_softmax(-1)
    losses = [-log_p[pair].item() for pair in zip(val, val[1:], strict=False)]
    assert len(losses) % 8 and run["exact_val_loss"] == pytest.approx(sum(losses) / len(losses))


def test_a_nanogpt_that_breaks_is_told_in_its_words(tmp_path):
    (tmp_path / "config").mkdir()
    for name in ("config/train_shakespeare_char.py", "configurator.py", "model.py"):
        (tmp_path / name).touch()
    (tmp_path / "train.py").write_text("raise SystemExit('no C++ compiler')")
    (tmp_path / "text").write_text("held out is what is last" * 30)
    given = {"nanogpt": tmp_path, "data": str(tmp_path / "text"), "target": 2.2}
    with pytest.raises(RunError, match="must print losses; got no C"):
        time_to_loss.nanogpt_run(dataclasses.replace(OPTIONS, **given), 1)


@pytest.mark.parametrize("who", [OURS, "nanogpt"])
def test_whoever_breaks_costs_the_other_no_runs(who, monkeypatch):
    """Of ours it is told as a failure, besides."""

    def run(name, options, seed, flags=()):
        if name == who and seed > 1337:
            raise RunError("no C++ compiler")
        return {"who": name, "seed": seed, "seconds": 1.0, "steps": 1, "val_loss": 1.0,
                "reached": True, "curve": []}  # fmt: skip

    monkeypatch.setattr(time_to_loss, "gptcore_run", functools.partial(run, OURS))
    monkeypatch.setattr(time_to_loss, "nanogpt_run", functools.partial(run, "nanogpt"))
    options = dataclasses.replace(OPTIONS, seeds=3)
    content = time_to_loss.answer(options, None, None, None)
    assert content["absent"] == {who: "no C++ compiler"}
    counts = collections.Counter(run["who"] for run in content["runs"])
    assert counts == {name: 1 if name == who else 3 for name in (OURS, "nanogpt")}
    failures = ["time_to_loss: gptcore: no C++ compiler"] if who == OURS else []
    assert broken({"questions": {"time_to_loss": content}}) == failures


def test_the_ablation_pairs_runs_by_seed():
    def run(variant, seed, loss):
        return {"variant": variant, "seed": seed, "val_loss": loss}

    losses = {WHOLE: (1.5, 1.7)} | {name: (1.6, 1.9) for name in VARIANTS if name != WHOLE}
    runs = [
        run(name, seed, loss) for name, pair in losses.items() for seed, loss in enumerate(pair)
    ]
    rows = table(runs)
    assert rows[1] == [WHOLE, "2", "1.6000", "", "0.1414"]
    assert [row[3:] for row in rows[2:]] == [["+0.1500", "0.0707"]] * (len(VARIANTS) - 1)
    assert table([run(WHOLE, 0, 1.5), run("GELU", 0, 1.6), run("GELU", 1, 1.9)])[1:] == [
        [WHOLE, "1", "1.5000", "", "-"],
        ["GELU", "1", "1.6000", "+0.1000", "-"],
    ]


def test_only_whole_runs_enter_the_ablation(monkeypatch):
    """One is cut short by the time, one has no evaluation, one breaks."""

    def ended(options, seed, target, flags):
        if "--activation=relu" in flags:
            raise RunError("the loss is nan")
        if "--token_shift=false" in flags:
            raise Skip("no evaluation within 1 s")
        (steps,) = (int(flag.split("=")[1]) for flag in flags if flag.startswith("--max_iters"))
        steps = 0 if "--init_std=0.02" in flags else steps
        return {"seed": seed, "steps": steps, "val_loss": 2.0, "seconds": 1.0}

    monkeypatch.setattr(ablation, "gptcore_run", ended)
    content = ablation.answer(OPTIONS, None, None, None)
    assert content["absent"] == {
        "no token shift, seed 0": "no evaluation within 1 s",
        "ReLU, seed 0": "the loss is nan",
        "initial weights of 0.02, seed 0": "out of time after its evaluation at step 0",
    }
    whole = len(variants("speedrun-cpu")) - 3
    assert len(content["variants"]) == len(content["tables"][0]["rows"]) - 1 == whole
    assert broken({"questions": {"ablation": content}}) == [
        "ablation: ReLU, seed 0: the loss is nan"
    ]


@pytest.mark.parametrize("preset", ["speedrun-cpu", "cpu", "speedrun", "best"])
def test_every_variant_of_the_ablation_is_a_setting_the_preset_has_not(preset):
    def settings(flags):
        config, fields = parse_settings([f"--preset={preset}", *flags]).merged()
        return config, GPTConfig(**fields)

    whole = settings(variants(preset)[WHOLE][1])
    assert {*RATES, *BATCHES, "cosine to a tenth"} < set(variants(preset))
    for name, (steps, flags) in variants(preset).items():
        config, model = settings(flags)
        assert ((config, model) == whole) == (name == WHOLE), name
        assert config.max_iters == config.eval_interval == steps
        assert steps * config.batch_size == STEPS * whole[0].batch_size
        if name in BATCHES:
            assert config.warmup_iters * STEPS == whole[0].warmup_iters * steps
