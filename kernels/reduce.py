"""Column sums without atomics: programs leave partial sums, one more kernel adds them in order."""

import torch

from kernels import backend
from kernels.backend import jit, tl


@jit
def _sum_partials_kernel(
    partials_ptr,  # (n, P, C) float32, contiguous
    first_ptr,  # (C,)
    second_ptr,  # (C,) or None
    third_ptr,  # (C,) or None
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (j, n) sums the P partials of column tile j of output n, always in one order."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < C
    base = partials_ptr + tl.program_id(1).to(tl.int64) * P * C
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < P)[:, None] & mask_c[None, :]
        total += tl.load(base + rows.to(tl.int64)[:, None] * C + cols[None, :], mask, other=0.0)
    column_sum = tl.sum(total, 0)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + cols, column_sum.to(first_ptr.dtype.element_ty), mask_c)
    elif tl.program_id(1) == 1:
        if second_ptr is not None:
            tl.store(second_ptr + cols, column_sum.to(second_ptr.dtype.element_ty), mask_c)
    elif third_ptr is not None:
        tl.store(third_ptr + cols, column_sum.to(third_ptr.dtype.element_ty), mask_c)


def sum_partials(partials: torch.Tensor, *dtypes: torch.dtype) -> list[torch.Tensor]:
    """Sums over the middle axis of partials (n, P, C), float32, as n (C,) tensors; n is 1 to 3."""
    n, P, C = partials.shape
    outputs = [torch.empty(C, dtype=dtype, device=partials.device) for dtype in dtypes]
    # The kernel is bound by latency. A narrow tile gives even C = 384 some fifty programs, and all
    # that 132 multiprocessors left in three or four programs each is loaded at once.
    BLOCK_P, BLOCK_C = 512 if P > 128 else 128, 16
    backend.launch(
        _sum_partials_kernel,
        (-(-C // BLOCK_C), n),
        partials,
        *outputs,
        *(None,) * (3 - n),
        P,
        C,
        BLOCK_P=BLOCK_P,
        BLOCK_C=BLOCK_C,
        num_warps=BLOCK_P // 32,
    )
    return outputs
