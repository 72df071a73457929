"""Predictions: the arithmetic of FLOPs, bytes and rings, and the error stated against records."""

import dataclasses
import math

import pytest
import torch

from bench import models, predict
from bench import record as recording
from bench.__main__ import main
from gptcore.config import GPTConfig, TrainConfig
from gptcore.roofline import ATTENTION, OPTIMIZER, OTHER, PRODUCTS, work_of
from kernels.gpus import GPUS


@pytest.mark.parametrize(("gpus", "factor"), [(1, 0.0), (2, 1.0), (8, 1.75), (1000, 1.998)])
def test_a_ring_moves_two_times_n_minus_one_over_n(gpus, factor):
    seconds = predict.all_reduce(10**9, gpus, link=4e9)
    assert seconds == pytest.approx(factor + 2 * (gpus - 1) * predict.HOP_S)


# 1,616 weights in matrices, whose inputs and outputs sum to 274, and 298 other parameters.
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=10, dropout=0.5)
TRAIN = TrainConfig(batch_size=3, gradient_accumulation_steps=2)  # 24 tokens a step


def small_terms(kernels=None, train=TRAIN, **given):
    """Terms of SMALL on a machine whose rates are infinite, but for those given."""
    rates = {"matmul": math.inf, "bandwidth": math.inf, "call_s": 0.0, "dtype": torch.bfloat16}
    machine = predict.Machine(name="this", calls=(3, 5), **rates | given)
    return predict.terms(models.meta(SMALL), train, machine, kernels)


def test_bytes_of_a_step_by_hand():
    half = {
        PRODUCTS: 3 * 2 * (24 * 274 + 2 * 1616),  # the weights once a micro-batch
        ATTENTION: 12 * 2 * 24 * 2 * 8,
        OTHER: 2 * 24 * ((30 * 2 + 7) * 8 + 2 * 10),
        OPTIMIZER: 44 * 1914,
    }
    assert small_terms(bandwidth=1.0) == half
    single = {kind: 2 * moved for kind, moved in half.items()} | {OPTIMIZER: 32 * 1914}
    assert small_terms(bandwidth=1.0, dtype=torch.float32) == single
    slower = {ATTENTION: 2 * half[ATTENTION], OTHER: 2 * half[OTHER]}
    assert small_terms(bandwidth=1.0, efficiency=0.5) == half | slower


def test_flops_of_a_step_by_hand():
    found = small_terms(matmul=1.0)
    assert found[PRODUCTS] == 6 * 24 * 1616
    # Of 2 layers and 2 heads of 4: 2 products forward and 5 backward, of 10 pairs of 4 x 4.
    assert found[ATTENTION] == pytest.approx(6 * 2 * 2 * 7 * 2 * 10 * 4)


def test_calls_masks_and_kernels_of_a_step_by_hand():
    assert small_terms(call_s=1.0) == {"dispatch": 2 * (3 * 2 + 5)}
    muon = small_terms(train=TRAIN.replace(optimizer="muon"), call_s=1.0)
    assert muon == {"dispatch": 2 * (3 * 2 + 5) + 100}  # once a step
    masks = 2 * 2 * 6 * (2 * 10 + 2 * 4 * 8)  # both ways, of 2 layers, in 6 sequences
    assert small_terms(philox_s=1.0) == {"masks": masks}
    kernels = {ATTENTION: 1.25, OTHER: 0.5}  # instead of their floors, in each of 2 micro-batches
    found = small_terms(kernels, bandwidth=1.0, efficiency=0.5)
    assert (found[ATTENTION], found[OTHER]) == (2.5, 1.0)


@pytest.mark.parametrize(
    ("changes", "more"),
    [({}, 0), ({"qkv_bias": True}, 1), ({"position": "rotary"}, 2), ({"activation": "gelu"}, 0)],
    ids=["notebook", "qkv_bias", "rotary", "gelu"],
)
def test_kernels_of_a_layer_by_hand(changes, more):
    """Products, attention, LayerNorm, activation, and what sums gradients of rows: 12+3+4+1+3."""
    pytest.importorskip("triton", reason="launches are recorded as Triton sees them")
    config = predict.preset("notebook")[1].replace(**changes)
    layer, rest = predict.kernels_of(config, 64, "sm_90")
    assert layer == 4 + 8 + 3 + 2 * 2 + 1 + 3 + more
    assert predict.kernels_of(config.replace(n_layer=12, dropout=0.0), 64, "sm_90")[0] == layer
    if not changes:  # embedding, a LayerNorm, head and loss, three scaled gradients, and autograd
        assert rest == 4 + 3 + 6 + 3 + 2


@pytest.mark.parametrize("name", ["notebook", "gpt2-124m", "speedrun"])
def test_fused_cases_move_the_bytes_of_other_kernels(name):
    """Each kernel once and none left out: but for partial sums, the bytes of `work_of`."""
    pytest.importorskip("triton", reason="launches are recorded as Triton sees them")
    from kernels.codegen import record as launches

    train, config = predict.preset(name)
    train = train.replace(gradient_accumulation_steps=1)
    moved = sum(
        times * launch.bytes
        for kind, times, case in predict.fused_cases(
            config, train.batch_size, config.block_size, GPUS["H200"]
        )
        for launch in launches(case, "sm_90")
        if kind == OTHER and launch.name not in predict.NOT_OTHER
    )
    floor = work_of(models.meta(config), train, torch.bfloat16)[OTHER].bytes
    assert moved == pytest.approx(floor, rel=0.05)


def test_measured_kernels_count_as_they_are_and_bounds_over_an_efficiency(monkeypatch):
    from kernels import backend, codegen

    rows = [
        {"kernel": "timed", "bound_us": 70.0, "floor_us": 1.0, "measured_us": 3.0},
        {"kernel": "bound", "bound_us": 7.0, "floor_us": 1.0, "measured_us": None},
        {"kernel": "_scale_kernel", "bound_us": 70.0, "floor_us": 1.0, "measured_us": 70.0},
    ]
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    monkeypatch.setattr(codegen, "examine", lambda *_: rows)
    seconds, _ = predict.static_kernels(SMALL, 64, 4, GPUS["H200"])
    # 3 + 7 / 0.7 us: attention in 2 layers; 2 norms, 1 activation in each, and 3 more.
    assert seconds == pytest.approx({ATTENTION: 2 * 13e-6, OTHER: 9 * 13e-6})


@pytest.fixture
def floors(monkeypatch):
    """No kernel is compiled."""
    monkeypatch.setattr(predict, "static_kernels", lambda *_: ({}, "floors"))


def test_a_printed_step_by_hand(floors, monkeypatch, tmp_path, capsys):
    """Two GPUs of 1 MB/s, each with one of the two micro-batches, on a link of 100 kB/s."""
    gpu = dataclasses.replace(
        GPUS["H200"], name="toy", bandwidth=1e6 / predict.COPY_FRACTION, link=1e5
    )
    monkeypatch.setattr(predict, "GPUS", {"toy": gpu})
    monkeypatch.setattr(predict, "preset", lambda _: (TRAIN, SMALL))
    flags = ["--gpu", "toy", "--model", "notebook", "--gpus", "2", "--results", str(tmp_path)]
    assert main(["predict", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == "notebook (1,914 parameters) on 2 x toy: 1 x 3 x 4 tokens a GPU and step, bf16"
    )
    printed = {line[:21].strip(): line[21:].split()[0] for line in lines[2:9]}
    assert printed == {
        PRODUCTS: "29.4",  # 3 * 2 * (12 * 274 + 1616) bytes
        ATTENTION: "6.58",  # 4,608 over 0.7
        OTHER: "19.1",  # 13,344 over 0.7
        "dispatch": "0.0900",  # (23 * 2 + 18 + 26) us
        OPTIMIZER: "84.2",
        "all-reduce not hidden": "39.8",  # 4 * 1,914 / 100 + 0.01 less 2/3 of the first four
        "all": "179",
    }
    assert lines[9].startswith("134 tokens/s")


def test_memory_is_what_a_run_is_held_against(floors, tmp_path, capsys):
    flags = ["--gpu", "h200", "--model", "gpt2-124m", "--results", str(tmp_path)]
    assert main(["predict", *flags]) == 0
    fixed = 20 * 124_475_904 + 16 * 480 * 1024
    activations = 12 * 1024 * 2 * (12 * (11 + 4 + 4) * 768 + 50304 // 3)
    assert (
        f"memory {(fixed + activations) / 1e9:.2f} GB a GPU (weights, gradients, moments "
        f"{fixed / 1e9:.2f}, activations {activations / 1e9:.2f}): fits in 141 GB"
    ) in capsys.readouterr().out


def step_record(tmp_path, measured_ms):
    record = recording.new(["step"], torch.device("cpu"))
    ceilings = {"copy_gbps": 10.0, "matmul_tflops": 0.1, "dispatch_us": 5.0}
    ours = {"name": "gptcore", "status": "timed", "median_ms": measured_ms}
    case = {
        "case": "tiny",
        "dtype": "float32",
        "shape": {"B": 4, "T": 8},
        "config": dataclasses.asdict(
            GPTConfig(n_layer=1, n_head=3, n_embd=20, block_size=8, bias=False)
        ),
        "results": [ours],
    }
    record["questions"]["step"] = {"cases": [case], "ceilings": ceilings}
    recording.write(record, tmp_path / "cpu.json")


def test_kernels_of_a_gpu_s_record_are_counted_for_that_gpu(monkeypatch):
    counted = []
    monkeypatch.setattr(predict, "kernels_of", lambda c, B, arch: counted.append(arch) or (1, 1))
    environment = {"device": "NVIDIA A100", "device_type": "cuda", "capability": "8.0"}
    ceilings = {"copy_gbps": 1.0, "matmul_tflops": 1.0, "dispatch_us": 1.0}
    record = {"environment": environment, "questions": {"step": {"ceilings": ceilings}}}
    config = dataclasses.asdict(GPTConfig(n_layer=1, n_head=3, n_embd=20, block_size=8))
    case = {"config": config, "shape": {"B": 4}, "dtype": "bfloat16"}
    predict.measured_machine(record, "step", case)
    assert counted == ["sm_80"]


def test_validation_states_the_error_against_what_was_measured(tmp_path, capsys):
    step_record(tmp_path, measured_ms=10.0)
    ((_, case, predicted, measured),) = predict.validation(tmp_path)
    assert (case, measured) == ("tiny", 10.0) and predicted > 0
    step_record(tmp_path, measured_ms=predicted / 2)
    assert (
        main(["predict", "--gpu", "A100", "--model", "notebook", "--results", str(tmp_path)]) == 0
    )
    out = capsys.readouterr().out
    assert "+100%" in out and "median error 100%, worst 100% over 1 steps" in out
    assert "assumed" in out and "tokens/s" in out and "fits in 80 GB" in out


@pytest.mark.parametrize(
    ("model", "each"), [("gpt2-124m", "5 x 12 x 1024"), ("notebook", "1 x 8 x 256")]
)
def test_eight_gpus_share_the_step(model, each, floors, tmp_path, capsys):
    def step(gpus):
        flags = ["--gpu", "h100", "--gpus", str(gpus), "--model", model]
        assert main(["predict", *flags, "--results", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        return out, float(out.split(" tokens/s")[0].rsplit("\n", 1)[1].replace(",", ""))

    (_, one), (out, eight) = step(1), step(8)
    assert f"on 8 x H100: {each} tokens a GPU" in out.splitlines()[0]
    assert 4 < eight / one <= 8
