"""A repair of Triton's interpreter, which cuts float32 off to bfloat16 where GPUs round.

An element is then wrong by up to one unit in the last place instead of half of one: enough to
fail the 2x rule of `kernels.verify`, and no fault of the kernel.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bit patterns, uint16, of the bfloat16 nearest to float32 x; ties go to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    # Rounding would carry some NaN into infinity: keep the upper half and set the quiet bit.
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def repair() -> None:
    """Have the interpreter of this process round; done by `kernels.backend` when interpreting."""
    truncating = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(round_to_bfloat16(src.data), tl.bfloat16)
        return truncating(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl
