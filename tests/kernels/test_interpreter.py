"""The repair of Triton's interpreter."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="repairs Triton's interpreter")

from kernels import backend
from kernels.backend import jit, tl
from kernels.interpreter import round_to_bfloat16


@jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(tl.bfloat16))


def awkward_floats():
    x = torch.randn(4087, generator=torch.Generator().manual_seed(0))
    x[::2] *= 1e30
    ties = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.3895314e38, 3.4e38, 1e-40, 0.0, -0.0]
    return torch.cat((x, torch.tensor([*ties, float("-inf")])))


def test_rounding_equals_torch():
    x = awkward_floats()
    expected = x.bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(round_to_bfloat16(x.numpy()), expected)
    nan = round_to_bfloat16(np.array([0x7FFFFFFF, 0xFF800001], np.uint32).view(np.float32))
    assert torch.from_numpy(nan.view(np.int16)).view(torch.bfloat16).isnan().all()


def test_kernels_round_to_bfloat16(device):
    x = awkward_floats().to(device)
    y = torch.empty_like(x, dtype=torch.bfloat16)
    backend.launch(_cast_kernel, (1,), x, y, N=4096)
    assert torch.equal(y, x.bfloat16())
