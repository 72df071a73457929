"""What tests of several ops share."""

import pytest
import torch


@pytest.fixture(params=[(2**30 + 128, 3), (2**31 + 64, 2)], ids=["indices", "strides"])
def far_apart(request, device):
    """(count, place): place(x, number, axis) is x with its `count` slices along an axis far apart.

    An index times the stride, or the stride itself, does not fit 32 bits. An offset that wraps
    there still lies in the storage, of which a CPU has but the pages touched.
    """
    stride, count = request.param
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 10e9:
        pytest.skip("needs 10 GB of the GPU's memory")
    size = 2**32 + 2**18
    storage = torch.zeros(0, dtype=torch.float16, device=device).new_empty(size)

    def place(x: torch.Tensor, number: int, axis: int = 0) -> torch.Tensor:
        assert x.shape[axis] == count and x.numel() <= 2**15
        strides = list(torch.empty(x.shape, device="meta").stride())
        strides[axis] = stride
        return storage.as_strided(x.shape, strides, 2**31 + 2**15 * number).copy_(x)

    return count, place
