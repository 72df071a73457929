"""What tests of runs compare."""

import torch
from safetensors.torch import load_file

from gptcore.log import read_metrics


def weights_of(folder, name="last"):
    return load_file(folder / name / "model.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def comparable(folder):
    """metrics.jsonl without what a clock measured."""
    timed = {"elapsed_s", "step_ms", "tokens_per_s", "mfu", "peak_memory_bytes"}
    return [
        {name: value for name, value in record.items() if name not in timed}
        for record in read_metrics(folder / "metrics.jsonl")
    ]
