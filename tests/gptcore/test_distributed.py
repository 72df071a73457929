"""Several processes compute what one computes, and end together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from gptcore import machine, step
from gptcore.__main__ import main
from gptcore.checkpoint import open_checkpoint
from gptcore.config import ConfigError, GPTConfig, RunError, TrainConfig
from gptcore.distributed import ALONE, Rounded, Vote, World, _device_of_rank, join
from gptcore.flags import parse_settings
from gptcore.log import read_metrics
from gptcore.step import HalfCopy, Step, eager_reason
from gptcore.trainer import prepare

ROOT = Path(__file__).parents[2]
STEPS = 4
FLAGS = [
    *f"--preset=baby-cpu --max_iters={STEPS} --eval_interval=2 --log_interval=1".split(),
    *"--eval_iters=3 --sample_tokens=4 --device=cpu --dtype=float32".split(),
    *"--dropout=0.2 --grad_clip=0.3 --batch_size=4 --gradient_accumulation_steps=4".split(),
]
ROTARY = ["--position=rotary", "--qk_norm", "--token_shift", "--tied_head"]
SUM = ["--data=arithmetic", "--operations=+/", "--digits=1", "--block_size=12"]
# AdamW divides a gradient by its size: what rounds differently moves a weight by a small part of
# the learning rate, 5e-3. Each damage below moves one by a hundred times more.
WEIGHT_TOLERANCE = 2e-5
# name: processes (0: without torchrun), engine, other flags
RUNS = {
    "alone": (0, "auto", []),
    "ddp of 1": (1, "ddp", []),
    "ddp of 2": (2, "auto", []),
    "ddp of 4": (4, "ddp", []),
    "fsdp of 1": (1, "fsdp", []),
    "fsdp of 2": (2, "fsdp", []),
    "fsdp of 3": (3, "fsdp", []),
    "fsdp of 4": (4, "fsdp", []),
    "sums, alone": (0, "auto", SUM),
    "sums, ddp of 3": (3, "ddp", SUM),
    "sums, fsdp of 2": (2, "fsdp", SUM),
    "naive, alone": (0, "auto", ["--model=naive"]),
    "naive, fsdp of 2": (2, "fsdp", ["--model=naive"]),
    "rotary, alone": (0, "auto", ROTARY),
    "rotary, ddp of 2": (2, "ddp", ROTARY),
    "rotary, fsdp of 2": (2, "fsdp", ROTARY),
    "muon, alone": (0, "auto", ["--optimizer=muon"]),
    "muon, ddp of 2": (2, "ddp", ["--optimizer=muon"]),
    "bfloat16, alone": (0, "auto", ["--dtype=bfloat16"]),
    "bfloat16, ddp": (2, "ddp", ["--dtype=bfloat16"]),
    "bfloat16, fsdp": (2, "fsdp", ["--dtype=bfloat16"]),
}
SLOW = {
    *("ddp of 1", "fsdp of 1", "fsdp of 3", "naive, alone", "naive, fsdp of 2"),
    *("rotary, alone", "rotary, ddp of 2", "rotary, fsdp of 2"),
}
# damage, of tests/gptcore/ranks.py: processes, engine, other flags, the run it is compared with
DAMAGES = {
    "offset forgotten": (2, "ddp", [], "alone"),
    "dropout offset forgotten": (2, "ddp", [], "alone"),
    "mean of means": (3, "ddp", SUM, "sums, alone"),
    "never synchronised": (2, "ddp", [], "alone"),
    "clipped locally": (2, "fsdp", [], "alone"),
    "shard dropped": (2, "fsdp", [], "alone"),
    "evaluation not summed": (2, "ddp", [], "alone"),
}
OTHERS = {
    "always synchronised": (2, "ddp", []),
    "SIGTERM to rank 1": (2, "ddp", []),
    "SIGKILL to rank 1": (2, "ddp", []),
    "exception on rank 1": (2, "fsdp", []),
    "another text on rank 1": (2, "ddp", []),
}
# --on_nonfinite, with an infinite gradient on the last rank alone
POLICIES = {
    "skip": ("infinite gradient at first", ["--on_nonfinite=skip", "--grad_clip=0"]),
    "skip, clipped": ("infinite gradient", ["--on_nonfinite=skip"]),
    "rollback": ("infinite gradient", ["--on_nonfinite=rollback"]),
    "stop": ("infinite gradient", ["--on_nonfinite=stop"]),
}
WORLDS = {"alone": (0, "auto"), "ddp of 2": (2, "ddp"), "fsdp of 2": (2, "fsdp")}
REFUSED = ("last refused by rank 0", "all refused by rank 0")
RESUMED = [("alone", "fsdp of 2"), ("fsdp of 2", "sums, ddp of 3"), ("ddp of 2", "alone")]


def environment(**more) -> dict[str, str]:
    """Of a process that runs this checkout, on one thread a rank."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        **more,
    }


@pytest.fixture(scope="module")
def folders(request, tmp_path_factory, text_file) -> dict[str, Path]:
    """Of each run above, all forked from one process; tests/gptcore/ranks.py fills them."""
    base, scenarios = tmp_path_factory.mktemp("ranks"), {}

    def add(name, processes, engine, flags, **more):
        data = [] if flags is SUM else [f"--data={text_file}"]
        flags = [*FLAGS, *data, f"--parallel={engine}", *flags]
        folder = str(base / str(len(scenarios)))
        scenarios[name] = {"folder": folder, "flags": flags, "processes": processes, **more}

    slow = "slow" in (request.config.option.markexpr or "")
    for name, run in RUNS.items():
        if slow or name not in SLOW:
            add(name, *run)
    for name, run in (DAMAGES | OTHERS).items():
        add(name, *run[:3], damage=name)
    for policy, (damage, flags) in POLICIES.items():
        for world, run in WORLDS.items():
            add(f"{policy}: {world}", *run, flags, damage=damage)
    add("judged locally", 2, "fsdp", POLICIES["skip"][1], damage="judged locally")
    for first, then in RESUMED:
        name = f"{first}, {then}"
        half = scenarios[first]["folder"] + "/half"
        add(name, *RUNS[then][:2], ["--resume"], goes_on_from=half)
    half = scenarios["ddp of 2"]["folder"] + "/half"
    for damage in REFUSED:
        add(damage, 2, "ddp", ["--resume"], goes_on_from=half, damage=damage)
    (base / "scenarios.json").write_text(json.dumps(list(scenarios.values())))
    command = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
    subprocess.run(
        [*command, str(base / "scenarios.json")], env=environment(), check=True, timeout=3600
    )
    return {name: Path(scenario["folder"]) for name, scenario in scenarios.items()}


def said(folder: Path, rank=0, stream="err") -> str:
    return (folder / f"{rank}.{stream}").read_text()


def seen(folder: Path, rank: int) -> dict:
    return torch.load(folder / f"{rank}.pt", weights_only=False)


def codes(folder: Path) -> list[int]:
    return json.loads((folder / "codes.json").read_text())


def curve(folder: Path, kind: str) -> list[list[float]]:
    names = {"train": ["loss"], "eval": ["train_loss", "val_loss", "val_accuracy"]}[kind]
    records = read_metrics(folder / "run" / "metrics.jsonl")
    return [[r[name] for name in names] for r in records if r["kind"] == kind]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    last = folder / "run" / "last"
    return load_file(last / "model.safetensors") | load_file(last / "optimizer.safetensors")


def weight_difference(a: Path, b: Path) -> float:
    """The largest, over all weights and what AdamW keeps of them."""
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_same_run(folder: Path, alone: Path):
    """Loss curves, evaluations, weights and optimizer state are those of one process."""
    assert set(codes(folder)) == {0}, said(folder)
    for kind, rel in (("train", 2e-6), ("eval", 2e-6)):
        ours, theirs = curve(folder, kind), curve(alone, kind)
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, rel=rel)
    assert weight_difference(folder, alone) < WEIGHT_TOLERANCE


def union(folder: Path, what: str) -> dict:
    """What the ranks saw together; no batch twice."""
    found = {}
    for rank in range(len(codes(folder))):
        part = seen(folder, rank)[what]
        assert what == "masks" or not found.keys() & part.keys()
        found |= part
    return found


def names(prefix="", without="alone"):
    """Of the runs with that prefix, as parameters."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in RUNS
        if name.startswith(prefix) and without not in name
    ]


def alone_of(name: str) -> str:
    """The run of one process with the flags of run `name`."""
    kind, comma, _ = name.rpartition(", ")
    return f"{kind}{comma}alone"


EXACT = ("ddp", "fsdp", "sums", "naive", "rotary", "muon")


# ---- the same run ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for kind in EXACT for name in names(kind)])
def test_processes_compute_what_one_computes(folders, name):
    """The sums' rows have unequally many targets, and 3 ranks unequally many rows."""
    assert_same_run(folders[name], folders[alone_of(name)])
    assert f"shared by {RUNS[name][0]} processes" in said(folders[name], stream="out")


@pytest.mark.parametrize("name", [*names("ddp"), *names("fsdp"), *names("sums")])
def test_batches_and_masks_are_bit_equal(folders, name):
    """Each row of the global batch on one rank, and every mask as one process draws it."""
    alone = folders[alone_of(name)]
    for what in ("batches", "masks"):
        assert union(folders[name], what) == union(alone, what)
    assert len(union(alone, "batches")) == 16 * STEPS and len(union(alone, "masks")) > 1000


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_comparison_sees(folders, damage):
    alone = folders[DAMAGES[damage][3]]
    assert set(codes(folders[damage])) == {0}, said(folders[damage])
    with pytest.raises(AssertionError):
        assert_same_run(folders[damage], alone)
    if damage != "evaluation not summed":
        assert weight_difference(folders[damage], alone) > 20 * WEIGHT_TOLERANCE


def test_gradients_go_round_once_a_step(folders):
    """Of 2 micro-batches a rank; FSDP has a collective for each block and for the rest."""
    assert World(0, 2).rounds(TrainConfig(batch_size=4, gradient_accumulation_steps=4)) == 2
    for name, collectives in (("ddp of 2", 1), ("fsdp of 2", 3)):
        for rank in range(2):
            assert seen(folders[name], rank)["gradient_collectives"] == collectives * STEPS
    assert seen(folders["always synchronised"], 0)["gradient_collectives"] == 2 * STEPS


@pytest.mark.parametrize("name", names("fsdp"))
def test_a_block_is_whole_only_while_it_runs(folders, name):
    """When the last block runs, every rank has but its own shards of the first."""
    for rank in range(RUNS[name][0]):
        assert seen(folders[name], rank)["left_whole"] == set()


@pytest.mark.parametrize("name", names("bfloat16"))
def test_bfloat16_on_two_processes(folders, name):
    """Parts of gradients are rounded before they are added: near, not equal."""
    assert set(codes(folders[name])) == {0}, said(folders[name])
    assert "step    bfloat16" in said(folders[name], stream="out")
    ours, theirs = curve(folders[name], "train"), curve(folders["bfloat16, alone"], "train")
    assert [x for (x,) in ours] == pytest.approx([x for (x,) in theirs], rel=1e-3)
    assert {t.dtype for t in tensors_of(folders[name]).values()} == {torch.float32}
    weights = load_file(folders[name] / "run" / "last" / "model.safetensors")
    assert any((w != w.bfloat16()).any() for w in weights.values())


@pytest.mark.parametrize("name", [*names("ddp"), *names("fsdp")])
def test_only_rank_0_prints_and_writes(folders, name):
    assert said(folders[name], stream="out").count("exact validation loss") == 1
    for rank in range(1, RUNS[name][0]):
        assert said(folders[name], rank, "out") == said(folders[name], rank) == ""
    records = read_metrics(folders[name] / "run" / "metrics.jsonl")
    assert [r["kind"] for r in records].count("end") == 1


# ---- checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*names("ddp"), *names("fsdp")])
def test_a_checkpoint_is_the_same_whoever_writes_it(folders, name):
    """Names, shapes, dtypes; nothing sharded, no engine in it."""
    ours, theirs = (
        {name: (t.shape, t.dtype) for name, t in tensors_of(folders[run]).items()}
        for run in (name, "alone")
    )
    assert ours == theirs
    assert open_checkpoint(folders[name] / "run").train.parallel == "auto"


@pytest.mark.parametrize(("first", "then"), RESUMED)
def test_any_number_of_processes_resumes_what_any_other_saved(folders, first, then):
    assert_same_run(folders[f"{first}, {then}"], folders["alone"])
    assert open_checkpoint(folders[first] / "half", "last").progress.step == 2


# ---- loss safety -----------------------------------------------------------------------------


@pytest.mark.parametrize("world", [world for world in WORLDS if world != "alone"])
@pytest.mark.parametrize("policy", ["skip", "skip, clipped", "rollback"])
def test_all_ranks_decide_alike_about_what_one_of_them_met(folders, policy, world):
    folder, alone = folders[f"{policy}: {world}"], folders[f"{policy}: alone"]
    assert_same_run(folder, alone)
    back = policy == "rollback"
    for rank in range(len(codes(folder))):
        found, expected = seen(folder, rank), seen(alone, 0)
        for name in ("step", "rolled_back", "learning_rate", "updates"):
            assert found[name] == expected[name]
        assert found["updates"] == {STEPS if back else STEPS - 1}
        assert found["rolled_back"] == ([2] if back else [])
        if "ddp" in world:
            assert all(map(torch.equal, found["weights"], seen(folder, 0)["weights"]))
    assert weight_difference(alone, folders["alone"]) > 20 * WEIGHT_TOLERANCE
    records = read_metrics(folder / "run" / "metrics.jsonl")
    kind = "rollback" if back else "skipped"
    assert [r["kind"] for r in records].count(kind) == 1


def test_the_comparison_of_decisions_sees(folders):
    """Ranks that judge by their own shards: some skip the update, some do not."""
    folder = folders["judged locally"]
    assert [seen(folder, rank)["updates"] for rank in range(2)] != [{STEPS - 1}] * 2
    with pytest.raises(AssertionError):
        assert_same_run(folder, folders["skip: alone"])


@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_stop_with_one_line(folders, world):
    folder = folders[f"stop: {world}"]
    assert set(codes(folder)) == {1}
    assert {seen(folder, rank)["step"] for rank in range(len(codes(folder)))} == {4}
    assert re.fullmatch(r"error: .* not finite in step 4, .* --resume\n", said(folder))
    assert open_checkpoint(folder / "run", "last").progress.step == 2


def test_rank_0_says_which_checkpoint_is_whole(folders):
    """What it cannot read, the others do not open."""
    folder = folders["last refused by rank 0"]
    assert_same_run(folder, folders["alone"])
    assert said(folder, stream="out").count("going on from") == 1
    assert open_checkpoint(folder / "run" / "last.damaged").progress.step == 2
    folder = folders["all refused by rank 0"]
    assert codes(folder) == [2, 2]
    assert said(folder) == "error: last: damaged; best: damaged; copy it again from where it came\n"


# ---- the end ---------------------------------------------------------------------------------


def test_one_signal_ends_all_ranks_at_the_same_step(folders):
    folder = folders["SIGTERM to rank 1"]
    assert codes(folder) == [1, 1]
    steps = {seen(folder, rank)["step"] for rank in range(2)}
    assert len(steps) == 1 and steps <= {3, 4}
    last = open_checkpoint(folder / "run", "last")
    assert {last.progress.step} == steps
    assert f"stopped at step {last.progress.step}" in said(folder, stream="out")


def test_a_killed_rank_ends_the_others(folders):
    folder = folders["SIGKILL to rank 1"]
    assert codes(folder) == [1, -signal.SIGKILL]
    assert re.fullmatch(
        r"error: another process of the job is gone; .* --resume .*\n", said(folder)
    )
    assert open_checkpoint(folder / "run", "last").progress.step == 2


def test_a_bug_on_one_rank_is_shown_and_ends_the_others(folders):
    folder = folders["exception on rank 1"]
    assert codes(folder) == [1, 70]
    assert "ZeroDivisionError: a bug" in said(folder, 1)
    assert said(folder).startswith("error: another process of the job is gone")


def test_all_ranks_refuse_texts_that_differ(folders):
    folder = folders["another text on rank 1"]
    assert codes(folder) == [2, 2] and not (folder / "run").exists()
    for rank in range(2):
        assert said(folder, rank).count("\n") == 1
        assert "1 of 2 processes have another text than the first one" in said(folder, rank)


# ---- under torchrun itself -------------------------------------------------------------------


def torchrun(*arguments, processes=2) -> subprocess.Popen:
    """Start `torchrun` on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*command, f"--nproc_per_node={processes}", *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_says_a_mistake_once(text_file, tmp_path):
    flags = [*FLAGS, f"--data={text_file}", "--batch_size=1", "--gradient_accumulation_steps=1"]
    job = torchrun(ROOT / "train.py", *flags, f"--out_dir={tmp_path / 'run'}")
    _, error = job.communicate(timeout=600)
    assert job.returncode != 0 and re.search(r"exitcode\s*: 2 ", error)
    assert [line for line in error.splitlines() if line.startswith("error: ")] == [
        "error: 2 processes cannot share 1 sequences a step (batch_size 1 x "
        "gradient_accumulation_steps 1); give --batch_size 2 or more"
    ]
    assert not (tmp_path / "run").exists()


DYING = """
import os, signal, sys
import train
from gptcore import trainer
real = trainer.training_step
def training_step(run):
    if run.step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run)
trainer.training_step = training_step
sys.exit(train.main())
"""


def test_torchrun_ends_a_job_whose_rank_was_killed(text_file, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    flags = [*FLAGS, f"--data={text_file}", f"--out_dir={tmp_path / 'run'}"]
    job = torchrun(script, *flags)
    _, error = job.communicate(timeout=600)
    assert job.returncode != 0
    assert "error: another process of the job is gone" in error
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", error)
    assert open_checkpoint(tmp_path / "run", "last").progress.step == 2


@pytest.mark.slow
def test_torchrun_hands_on_a_signal_and_the_job_goes_on_later(text_file, tmp_path):
    flags = [*FLAGS, f"--data={text_file}", f"--out_dir={tmp_path / 'run'}", "--max_iters=100000"]
    job = torchrun(ROOT / "train.py", *flags, "--sample_tokens=0", "--eval_interval=100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not [r for r in read_metrics(metrics) if r["kind"] == "train"]:
        assert job.poll() is None, job.communicate()
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=600)
    step = open_checkpoint(tmp_path / "run", "last").progress.step
    assert job.returncode != 0 and f"stopped at step {step};" in out
    more = [f"--out_dir={tmp_path / 'run'}", "--resume", f"--max_iters={step + 2}"]
    job = torchrun(ROOT / "train.py", *more, "--device=cpu", "--parallel=fsdp")
    assert job.communicate(timeout=600) and job.returncode == 0
    assert open_checkpoint(tmp_path / "run", "last").progress.step == step + 2


# ---- without processes -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (3, 5), (8, 1), (2, 40), (64, 1)])
def test_every_row_has_one_rank(size, batch_size, accumulation):
    config = TrainConfig(batch_size=batch_size, gradient_accumulation_steps=accumulation)
    worlds = [World(rank, size, "ddp") for rank in range(size)]
    if batch_size == 1 and config.sequences % size:
        with pytest.raises(ConfigError, match="cannot share 8 sequences .* give --batch_size 2"):
            worlds[0].check(config)
        return
    worlds[0].check(config)
    pieces = [piece for world in worlds for piece in world.micro_batches(config)]
    rows = [row for first, count in pieces for row in range(first, first + count)]
    assert rows == list(range(config.sequences))
    assert all(1 <= count <= batch_size for _, count in pieces)
    assert max(count for _, count in pieces) == worlds[0].rows(config)
    assert len({len(world.micro_batches(config)) for world in worlds}) == 1


def test_alone_micro_batches_are_batch_size():
    config = TrainConfig(batch_size=4, gradient_accumulation_steps=3)
    assert ALONE.micro_batches(config) == [(0, 4), (4, 4), (8, 4)]


@pytest.mark.parametrize("count", [1, 5, 6, 7])
def test_shards_are_equally_long_and_cover_all(count):
    shards = [list(World(rank, 3).shard(range(count))) for rank in range(3)]
    assert len({len(shard) for shard in shards}) == 1
    counted = [batch for shard in shards for batch, counts in shard if counts]
    assert sorted(counted) == list(range(count))


def test_alone_a_vote_is_the_own_opinion():
    vote = Vote(ALONE)
    assert [vote(False), vote(True), vote(False)] == [False, True, False]


def test_rounded_computes_what_the_half_copy_computes(prepared):
    """The same loss and the same float32 gradients, over two micro-batches, bit for bit."""
    run = prepared("--dropout=0.2", "--tied_head", "--bias=false")
    other = prepared("--dropout=0.2", "--tied_head", "--bias=false").model
    half, rounded = HalfCopy(run.model, torch.bfloat16), Rounded(other, torch.bfloat16)
    for row in (0, 8):
        key = torch.tensor([1, 2, row])
        idx, targets = run.corpus.batch(key, 8, 8)
        losses = half.model(idx, targets, key)[1], rounded(idx, targets, key)[1]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        half.move_gradients()
    for a, b in zip(run.model.parameters(), other.parameters(), strict=True):
        assert a.grad.dtype == torch.float32 and torch.equal(a.grad, b.grad)


def test_what_is_sampled_under_ddp_is_one_model_with_the_weights_of_now(prepared, monkeypatch):
    """A new model for each sample would have its graph captured anew."""
    run = prepared("--dropout=0.2")
    monkeypatch.setattr(step, "engine", lambda module, world: module)
    world = World(0, 2, "ddp", torch.device("cpu"))
    where = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "world": world}
    update = Step(run.model, run.optimizer, run.corpus, run.config, **where)
    first = update.whole_model()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1 / 3)
    assert update.whole_model() is first
    for mine, now in zip(first.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(mine, now.bfloat16())


@pytest.mark.parametrize("local", [0, 1])
def test_every_rank_sees_that_there_are_too_few_gpus(local, monkeypatch):
    """One that went on would wait for those that were refused."""
    monkeypatch.setattr(machine, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes for 1 GPUs; give it --nproc_per_node=1"):
        _device_of_rank("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _device_of_rank("cuda") == torch.device("cuda", local)


@pytest.fixture
def one_of_torchrun(monkeypatch):
    """This process is all that torchrun started."""
    start, store = dist.init_process_group, dist.HashStore()
    ours = {"store": store, "rank": 0, "world_size": 1}
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: start(*a, **k, **ours))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    yield {"parallel": "ddp", "device": "cpu"}
    if dist.is_initialized():
        dist.destroy_process_group()


NO_SPACE = "NCCL error in: x.cpp:1\nncclSystemError\nLast error:\nshm: No space left on device"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (dist.DistBackendError(NO_SPACE), "cannot talk .* No space left on device"),
        (dist.DistBackendError("remote process exited\nLast error"), "another process .* is gone"),
        (dist.DistNetworkError("no one answers"), "another process .* is gone"),
        (RuntimeError("Connection closed by peer [127.0.0.1]"), "another process .* is gone"),
    ],
)
def test_an_error_of_nccl_itself_is_told_whole_and_blames_nobody(error, said, one_of_torchrun):
    with pytest.raises(RunError, match=f"(?s){said}"), join(one_of_torchrun):
        raise error


def test_a_run_on_the_cpu_does_not_move_to_the_gpus_of_torchrun(trained_run):
    settings = parse_settings([f"--out_dir={trained_run}", "--resume"])
    world = World(0, 1, "ddp", torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="trains on the CPU; give --device cpu again"):
        prepare(settings, world)


def test_what_does_not_go_together(prepared):
    with pytest.raises(ConfigError, match="--parallel fsdp needs the processes of torchrun"):
        prepared("--parallel=fsdp")
    with pytest.raises(ConfigError, match="--compile does not go with --parallel fsdp"):
        World(0, 2, "fsdp").check(TrainConfig(compile=True))
    for name in ("sgd", "muon"):
        with pytest.raises(ConfigError, match=f"--optimizer {name} does not go with --parallel"):
            World(0, 2, "fsdp").check(TrainConfig(optimizer=name))
    arguments = TrainConfig(), GPTConfig(), torch.device("cuda")
    assert "--parallel ddp" in eager_reason(*arguments, world=World(0, 2, "ddp"))


def test_other_commands_are_one_process(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sample", "nowhere"]) == 2
    assert "is one process; leave torchrun out" in capsys.readouterr().err


def test_alone_nothing_is_waited_for(tiny_flags, tmp_path):
    """World() takes part in nothing: its methods work without a process group."""
    run = prepare_alone(tiny_flags, tmp_path)
    assert run.world is ALONE and not torch.distributed.is_initialized()
    assert ALONE.from_rank_0(lambda: 7) == 7
    assert ALONE.sum(torch.tensor(3)) == 3


def prepare_alone(tiny_flags, tmp_path):
    return prepare(parse_settings([*tiny_flags, f"--out_dir={tmp_path / 'run'}"]))
