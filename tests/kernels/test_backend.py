"""Which backend an op runs on."""

import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from kernels import backend


def tensor_on(device):
    """As much of a tensor as `resolve` looks at; no device need be there."""
    return SimpleNamespace(device=torch.device(device))


@pytest.fixture
def chosen(monkeypatch):
    """resolve("op", choice, tensors on `devices`) with triton or without it."""

    def resolve(choice, *devices, triton=True):
        monkeypatch.setattr(backend, "HAS_TRITON", triton)
        monkeypatch.setattr(backend, "interpreting", lambda: False)
        return backend.resolve("op", choice, None, *map(tensor_on, devices))

    return resolve


def test_auto_takes_triton_on_a_gpu_and_eager_elsewhere(chosen):
    assert chosen("auto", "cuda") == chosen("triton", "cuda") == "triton"
    assert chosen("auto", "cpu") == chosen("auto", "cpu", triton=False) == "eager"
    assert chosen("eager", "cuda") == chosen("eager", "cuda", triton=False) == "eager"


BAD_CHOICES = {
    "unknown": (
        ("cuda", "cpu"),
        {},
        ValueError,
        "op: backend must be one of auto, triton, eager; got 'cuda'",
    ),
    "devices": (
        ("auto", "cpu", "cuda:1"),
        {},
        ValueError,
        "op: all tensors must be on one device; got cpu, cuda:1",
    ),
    "triton on a cpu": (
        ("triton", "cpu"),
        {},
        RuntimeError,
        "op: backend 'triton' needs CUDA or ROCm tensors, or CPU tensors with TRITON_INTERPRET=1 "
        "set before Python starts; got tensors on cpu",
    ),
    "no silent fallback": (
        ("auto", "cuda"),
        {"triton": False},
        RuntimeError,
        "op: backend 'auto' needs the triton package on cuda; pip install triton, or take the "
        "backend 'eager'",
    ),
    "no triton": (
        ("triton", "cpu"),
        {"triton": False},
        RuntimeError,
        "op: backend 'triton' needs the triton package on cpu; pip install triton, or take the "
        "backend 'eager'",
    ),
}


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_a_choice_that_cannot_be_served_is_refused(chosen, case):
    arguments, options, error, message = BAD_CHOICES[case]
    with pytest.raises(error, match=re.escape(message)):
        chosen(*arguments, **options)


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None  # as where there is no wheel of it: Windows, macOS
import torch
from gptcore import GPT, GPTConfig
from kernels.rng import make_key

torch.manual_seed(0)
model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11, dropout=0.2))
idx = torch.arange(16).view(2, 8) % 11
_, loss = model(idx, idx, make_key(1, 2))
loss.backward()
print(loss.item(), sum(p.grad.abs().sum().item() for p in model.parameters()))
try:
    GPT(model.config.replace(backend="triton"))(idx)
except RuntimeError as error:
    print(error)
"""


def test_everything_but_the_kernels_is_there_without_triton():
    """Importing them failed for want of their random numbers."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    numbers, message = result.stdout.splitlines()
    loss, gradients = map(float, numbers.split())
    assert 1 < loss < 5 and 0 < gradients < math.inf
    assert "needs the triton package" in message
