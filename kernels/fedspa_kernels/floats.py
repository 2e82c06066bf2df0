"""Conversions of weights in Triton kernels, to float32 and back to the nearest, ties to even.

bfloat16 is the upper half of a float32, and is written out here: Triton's interpreter (3.7) cuts it
off instead of rounding, and makes other numbers of subnormal ones.
"""

import triton
import triton.language as tl


@triton.jit
def to_float32(value):
    """Return the same number."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def from_float32(value, dtype: tl.constexpr):
    """Return the nearest number of a dtype; NaN stays NaN."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        upper = tl.where(value == value, nearest_even, 0x7FC0)
        return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)
