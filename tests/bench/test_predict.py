"""Predictions: the arithmetic of FLOPs, bytes and rings, and the error stated against records."""

import dataclasses

import pytest
import torch

from bench import predict, work
from bench import record as recording
from bench.__main__ import main
from gptcore.config import GPTConfig
from gptcore.model import GPT
from gptcore.trainer import flops_per_step
from kernels.gpus import GPUS

CONFIGS = {
    "notebook": GPTConfig(),
    "gpt2": GPTConfig(
        vocab_size=100, n_layer=2, n_head=2, n_embd=32, block_size=16, tied_head=True,
        head_bias=False, qkv_bias=True, activation="gelu",
    ),
    "odd": GPTConfig(n_layer=1, n_head=3, n_embd=20, block_size=8, bias=False, head_bias=False),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_agree_with_the_model(name):
    config = CONFIGS[name]
    model = GPT(config)
    assert work.parameters(config) == model.num_parameters()
    B, T = 4, config.block_size
    assert work.step_flops(config, B, T) == pytest.approx(flops_per_step(model, B))


def test_the_notebooks_step_has_the_flops_on_record():
    assert work.step_flops(GPTConfig(), 64, 256) == pytest.approx(1.10e12, rel=0.01)


def test_products_have_the_flops_of_the_weights():
    config = CONFIGS["odd"]
    flops = sum(2 * n * rows * a * b for n, rows, a, b in predict.products(config, 4, 8))
    assert flops == 2 * work.matrix_weights(config) * 4 * 8


@pytest.mark.parametrize(("gpus", "factor"), [(1, 0.0), (2, 1.0), (8, 1.75), (1000, 1.998)])
def test_a_ring_moves_two_times_n_minus_one_over_n(gpus, factor):
    seconds = predict.all_reduce(10**9, gpus, link=4e9)
    assert seconds == pytest.approx(factor + 2 * (gpus - 1) * predict.HOP_S)


def test_terms_scale_as_their_resource():
    config = GPTConfig(dropout=0.0)
    machine = predict.machine_of(GPUS["H200"])
    base = predict.terms(config, 64, 256, machine)
    slow_memory = dataclasses.replace(machine, bandwidth=machine.bandwidth / 2)
    slower = predict.terms(config, 64, 256, slow_memory)
    assert slower["optimizer"] == pytest.approx(2 * base["optimizer"])
    assert slower["dispatch"] == base["dispatch"]
    slow_products = dataclasses.replace(machine, matmul=machine.matmul / 100)
    assert predict.terms(config, 64, 256, slow_products)["products"] == pytest.approx(
        3 * 2 * work.matrix_weights(config) * 64 * 256 / slow_products.matmul
    )
    known = predict.terms(config, 64, 256, machine, {"attention": 1.25})
    assert known["attention"] == 1.25


def test_activations_grow_with_batch_and_weights_do_not():
    small, large = (predict.memory_bytes(GPTConfig(), B, 256, 2) for B in (8, 16))
    assert large["activations"] == 2 * small["activations"]
    key = "weights, gradients, moments"
    assert large[key] == small[key] == 20 * work.parameters(GPTConfig())


def step_record(tmp_path, measured_ms):
    record = recording.new(["step"], torch.device("cpu"))
    ceilings = {"copy_gbps": 10.0, "matmul_tflops": 0.1, "dispatch_us": 5.0}
    ours = {"name": "gptcore", "status": "timed", "median_ms": measured_ms}
    case = {
        "case": "tiny",
        "dtype": "float32",
        "shape": {"B": 4, "T": 8},
        "config": dataclasses.asdict(CONFIGS["odd"]),
        "results": [ours],
    }
    record["questions"]["step"] = {"cases": [case], "ceilings": ceilings}
    recording.write(record, tmp_path / "cpu.json")


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


def test_eight_gpus_share_the_step(tmp_path, capsys):
    def tokens(gpus):
        arguments = ["predict", "--gpu", "h100", "--gpus", str(gpus), "--results", str(tmp_path)]
        assert main(arguments) == 0
        out = capsys.readouterr().out
        return float(out.split(" tokens/s")[0].rsplit("\n", 1)[1].replace(",", ""))

    assert 6 < tokens(8) / tokens(1) <= 8
