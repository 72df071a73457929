"""Two repairs of Triton's interpreter.

It cuts float32 off to bfloat16 where GPUs round. An element is then wrong by up to one unit in the
last place instead of half of one: enough to fail the 2x rule of `kernels.verify`, and no fault of
the kernel. And Triton 3.6 reads the bounds of a loop in a way that numpy 2.4 refuses.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bit patterns, uint16, of the bfloat16 nearest to float32 x; ties go to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    # Rounding would carry some NaN into infinity: keep the upper half and set the quiet bit.
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def repair() -> None:
    """Repair the interpreter of this process; done by `kernels.backend` when interpreting."""
    truncating = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(round_to_bfloat16(src.data), tl.bfloat16)
        return truncating(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index
