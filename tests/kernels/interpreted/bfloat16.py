"""bf16 for Triton's interpreter, which keeps such numbers as raw 16-bit integers: it multiplies the integers in ``tl.dot``, and cuts off
instead of rounding when it converts from float32. Hardware computes products exactly, sums in float32, and rounds to nearest even.

Needed up to Triton 3.9 at least. Other bf16 arithmetic stays wrong there; kernels convert to float32 right after a load.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widen(handle: TensorHandle) -> np.ndarray:
    bits = handle.data
    return (bits.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == tl.bfloat16 else bits


def _round(numbers: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), nearest)


def install() -> None:
    """Replaces three methods of the interpreter, for the life of the process."""
    dot, cast, convert = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def rounds(source, target) -> bool:
        return source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16

    def create_dot(self, a, b, d, *options):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, d, *options)
        return TensorHandle(np.matmul(_widen(a), _widen(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def cast_impl(self, source, target):
        return TensorHandle(_round(source.data), tl.bfloat16) if rounds(source, target) else cast(self, source, target)

    def create_fp_to_fp(self, source, target, mode):
        return TensorHandle(_round(source.data), tl.bfloat16) if rounds(source, target) else convert(self, source, target, mode)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
