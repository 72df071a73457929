"""Out of memory: the advice is one line, it fits, and following it changes nothing."""

import re
from math import inf

import pytest
import torch

from gptcore import memory, trainer
from gptcore.checkpoint import open_checkpoint
from gptcore.config import ConfigError, GPTConfig, RunError, TrainConfig
from gptcore.distributed import World
from gptcore.memory import Need, device_bytes, fitting, need, parameter_count
from gptcore.model import GPT, MODELS, build_model
from gptcore.optim import hidden_matrices

ADVICE = re.compile(r"--batch_size (\d+) --gradient_accumulation_steps (\d+)")


def advice(line):
    return [int(number) for number in ADVICE.search(line).groups()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_layer", [1, 2, 5])
def test_parameters_are_counted_without_building_every_layer(name, n_layer):
    shape = GPTConfig(vocab_size=11, block_size=8, n_layer=n_layer, n_head=2, n_embd=8)
    built = sum(parameter.numel() for parameter in build_model(name, shape).parameters())
    assert parameter_count(name, shape) == built


def peak_of_a_step(run):
    """Bytes that one more update needs at its peak, gradients included."""
    events = torch.profiler.ProfilerActivity.CPU
    options = {"profile_memory": True, "acc_events": True}
    with torch.profiler.profile(activities=[events], **options) as profiler:
        trainer.training_step(run)
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


SIZES = {
    "gelu": ["--activation=gelu"],
    "relu": ["--activation=relu"],
    "dropout": ["--dropout=0.2"],
    "long": ["--block_size=160"],
    "deep": ["--n_layer=8"],
    "vocabulary": ["--vocab_multiple=4096"],
    "naive": ["--model=naive", "--block_size=128"],
}


@pytest.mark.parametrize("flags", SIZES.values(), ids=SIZES)
def test_the_estimate_is_near_what_is_held(prepared, flags):
    """The part that grows with the batch, which is all that the advice is about."""
    small = ["--n_embd=128", "--n_head=4", "--n_layer=4", "--block_size=64", "--head_size=32"]
    small += ["--dropout=0", "--eval_iters=1", *flags]
    peaks = []
    for size in (2, 6):
        run = prepared(*small, f"--batch_size={size}")
        trainer.training_step(run)
        peaks.append(peak_of_a_step(run))
    measured = (peaks[1] - peaks[0]) / 4
    estimate = need(run.config, run.model.config, "cpu", torch.float32).sequence_bytes
    assert 0.7 < estimate / measured < 1.4


def test_logits_in_chunks_do_not_grow_with_the_batch(prepared):
    """They were counted as if all were held: 59 GB, where an update took half of one."""
    small = ["--n_embd=16", "--n_head=2", "--n_layer=1", "--block_size=128", "--eval_iters=1"]
    needs = []
    for size in (8, 16):
        run = prepared(*small, f"--batch_size={size}", "--vocab_multiple=30000", "--dropout=0")
        trainer.training_step(run)
        wanted = need(run.config, run.model.config, "cpu", torch.float32)
        needs.append((wanted.bytes(size), peak_of_a_step(run)))
    # Of the fixed part, weights and moments are there before the step.
    growth, measured = (b - a for a, b in zip(*needs, strict=True))
    assert 0 < growth < 10e6 and measured < 100e6  # all logits and their copies: 370 MB
    assert needs[0][0] < 5 * needs[0][1]


def test_what_does_not_depend_on_the_batch():
    config, shape = TrainConfig(), GPTConfig()
    P, tokens = parameter_count("gpt", shape), 16 * config.sequences * shape.block_size
    fixed = {
        (optimizer, kind): need(
            config.replace(optimizer=optimizer), shape, kind, torch.float32
        ).fixed_bytes
        - tokens
        for optimizer in ("adamw", "sgd")
        for kind in ("cpu", "cuda")
    }
    # Weights, gradients, moments; on the CPU the checkpoint's copies of all but the gradients.
    assert fixed[("adamw", "cuda")] == 16 * P and fixed[("adamw", "cpu")] == 28 * P
    assert fixed[("sgd", "cuda")] == 12 * P and fixed[("sgd", "cpu")] == 20 * P
    assert need(config, shape, "cuda", torch.bfloat16).fixed_bytes == 20 * P + tokens
    M = sum(p.numel() for p, _ in hidden_matrices(GPT(shape)))
    muon = need(config.replace(optimizer="muon"), shape, "cpu", torch.float32)
    assert muon.fixed_bytes == 28 * P - 8 * M + tokens and muon.update_bytes == 20 * M


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_of_many_weights_is_foreseen(prepared, optimizer):
    """Moments, weights and their copies for the checkpoint are not among what it needs anew."""
    small = ["--block_size=4", "--batch_size=1", "--n_embd=256", "--n_head=2", "--n_layer=3"]
    run = prepared(*small, f"--optimizer={optimizer}")
    trainer.training_step(run)
    wanted = need(run.config, run.model.config, "cpu", torch.float32).bytes(1)
    kept = sum(w.nbytes for w in run.model.parameters())
    kept += sum(t.nbytes for s in run.optimizer.state.values() for t in s.values())
    anew = wanted - 2 * kept
    assert 0.7 * anew < peak_of_a_step(run) < 1.1 * anew


def test_fitting_keeps_the_whole_batch():
    needed = Need(100, 10, 48)
    assert fitting(48, 48, needed, inf) == 48
    assert fitting(48, 48, needed, 100 + 10 * 17) == 16
    assert fitting(48, 7, needed, inf) == 6
    assert fitting(48, 48, needed, 110) == 1
    assert fitting(48, 48, needed, 109) is None
    assert fitting(48, 0, needed, inf) is None
    assert fitting(48, 48, Need(100, 10, 4), 140) == 48  # cut into fours anyway
    assert fitting(48, 48, Need(100, 10, 4), 139) == 3
    assert Need(100, 10, 4).bytes(48) == 140
    # An update needs its own when the sequences' is free.
    assert Need(100, 10, 4, 35).bytes(3) == 135 and Need(100, 10, 4, 35).bytes(48) == 140
    assert fitting(48, 48, Need(100, 10, 4, 35), 134) is None
    assert fitting(48, 48, Need(100, 10, 4, 35), 135) == 3


def test_free_memory_is_known_here(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    free, total = device_bytes(torch.device("cpu"))
    assert 0 < free < total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # processes of torchrun here
    assert device_bytes(torch.device("cpu"))[1] == total / 4


HUGE = {
    "wide": ["--n_embd=1000000"],
    "deep": ["--n_layer=1000000000"],
    "impossible": ["--n_embd=10000000000"],
    "heads": ["--n_head=1000000", "--head_size=256"],
    "long": ["--block_size=512", "--n_embd=300000"],
}


@pytest.mark.parametrize("flags", HUGE.values(), ids=HUGE)
def test_a_huge_model_is_refused_before_anything_is_allocated(
    train_main, tiny_flags, tmp_path, capsys, flags
):
    assert train_main([*tiny_flags, *flags, f"--out_dir={tmp_path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not even one sequence at a time fits" in line or "no machine has memory" in line
    assert not (tmp_path / "run").exists()


def test_a_huge_batch_is_cut(train_main, tiny_flags, tmp_path, capsys, monkeypatch):
    flags = [*tiny_flags, "--batch_size=3000000", "--gradient_accumulation_steps=2"]
    monkeypatch.setattr(memory, "device_bytes", lambda device: (4e9, 8e9))
    monkeypatch.setattr(memory, "largest_micro_batch", lambda config, *_: config.batch_size)
    assert train_main([*flags, f"--out_dir={tmp_path / 'run'}"]) == 2
    line = capsys.readouterr().err
    size, steps = advice(line)
    assert size * steps == 6_000_000 and size < 3_000_000
    config = TrainConfig(batch_size=size)
    shape = GPTConfig(vocab_size=30, block_size=8, n_layer=2, n_head=2, n_embd=16, head_size=4)
    assert need(config, shape, "cpu", torch.float32).bytes(size) < 4e9
    assert "GB needed, 4.0 GB free" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_following_the_advice_gives_the_same_run(
    train_main, tiny_flags, trained_run, tmp_path, monkeypatch, capsys, error
):
    """16 sequences at once do not fit in step 7; 8 twice give the same losses to rounding."""
    folder, real = tmp_path / "run", trainer.training_step

    def too_large(run):
        if run.step == 6:
            raise error
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", too_large)
        assert train_main([*tiny_flags, f"--out_dir={folder}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory with batch_size 16" in line and advice(line) == [8, 2]
    command = line.split("add that to: python train.py ")[1].split()
    assert train_main([*command, "--batch_size=8", "--gradient_accumulation_steps=2"]) == 0
    runs = [open_checkpoint(run, "last").read_weights() for run in (trained_run, folder)]
    for name, weight in runs[0].items():
        torch.testing.assert_close(runs[1][name], weight, atol=1e-3, rtol=0)


def test_also_before_the_first_step(train_main, tiny_flags, tmp_path, monkeypatch, capsys):
    def too_large(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "make_optimizer", too_large)
    assert train_main([*tiny_flags, f"--out_dir={tmp_path / 'run'}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory with batch_size 16" in line and advice(line) == [8, 2]
    assert line.endswith("add that to: the same command") and not (tmp_path / "run").exists()


def test_one_sequence_that_does_not_fit(train_main, tiny_flags, tmp_path, monkeypatch, capsys):
    def too_large(run):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "training_step", too_large)
    assert train_main([*tiny_flags, "--batch_size=1", f"--out_dir={tmp_path / 'run'}"]) == 1
    assert "not even one sequence at a time fits" in capsys.readouterr().err


def test_other_errors_stay_what_they_are(train_main, tiny_flags, tmp_path, monkeypatch):
    def broken(run):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(trainer, "training_step", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train_main([*tiny_flags, f"--out_dir={tmp_path / 'run'}"])


def test_a_rank_is_measured_by_its_own_part_of_the_batch(monkeypatch):
    """512 sequences are 64 for each of 8; what is left over is for the first ones."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(memory, "device_bytes", lambda device: (60e9, 60e9))
    monkeypatch.setattr(memory, "may_be_half", lambda device: True)
    shape = GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304)
    config = TrainConfig(batch_size=512)
    with pytest.raises(ConfigError, match="GB needed"):
        memory.check(config, shape, cuda)
    eight = World(3, 8, "ddp", cuda)
    memory.check(config, shape, cuda, eight)
    with pytest.raises(ConfigError) as refused:
        memory.check(config.replace(batch_size=2048), shape, cuda, eight)
    size, steps = advice(str(refused.value))
    assert size < 2048 // 8 and size * steps == 2048


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_out_of_memory_on_many_gpus_halves_what_one_of_them_holds(parallel, monkeypatch):
    """batch_size 128, of 256 by 8 ranks, would be the same 32 sequences for each of them."""
    fixed, cuda = 100 * 10**9, torch.device("cuda")
    total = fixed / (8 if parallel == "fsdp" else 1) + 10**9
    monkeypatch.setattr(memory, "need", lambda *_: Need(fixed, 10**6, 10**9))
    monkeypatch.setattr(memory, "device_bytes", lambda device: (0, total))
    world, error = World(0, 8, parallel, cuda), torch.OutOfMemoryError("CUDA out of memory.")
    arguments = TrainConfig(batch_size=256), GPTConfig(), cuda, torch.bfloat16, "train.py", world
    with pytest.raises(RunError) as said, memory.advised(*arguments):
        raise error
    assert advice(str(said.value)) == [16, 16]


def test_refused_means_config_error():
    with pytest.raises(ConfigError, match="GB needed"):
        memory.check(TrainConfig(batch_size=10**12), GPTConfig(), torch.device("cpu"))
