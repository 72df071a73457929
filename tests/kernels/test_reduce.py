"""Column sums of partial sums."""

import pytest
import torch

from kernels.reduce import sum_partials


@pytest.mark.parametrize("P", [1, 128, 129, 528, 1100])  # 528: four programs on each of 132
def test_every_partial_counts_once(P, device):
    pytest.importorskip("triton", reason="needs triton")
    partials = torch.randint(-9, 10, (3, P, 37)).float().to(device)
    for n in (1, 2, 3):
        sums = sum_partials(partials[:n], *[torch.float32] * n)
        assert all(map(torch.equal, sums, partials.sum(1)))
