"""The products around a sweep: PyTorch's, or on a CPU with AVX-512 the compiled kernel's.

multiply_(out, left, right, plus, subtract, triangle) -> None, in C++ for the CPU (product.cpp)
    out = plus + left·right, or with `subtract` plus - left·right; stacks (matrices, rows, cols) of
    float32; triangle: UPPER or LOWER, where all else of `right` is zero, or FULL
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

FULL, UPPER, LOWER = 0, 1, -1


def product(
    left: Tensor,
    right: Tensor,
    *,
    plus: Tensor | None = None,
    less_than: Tensor | None = None,
    triangle: int = FULL,
) -> Tensor:
    """Return left·right, plus + left·right, or less_than - left·right, by PyTorch.

    left: (matrices, rows, inner); right: (matrices, inner, cols); triangle: where right is not zero
    """
    start = plus if less_than is None else less_than
    if start is None:
        # A stack of one as matrices, which every device does best.
        return torch.mm(left[0], right[0])[None] if len(left) == 1 else torch.bmm(left, right)
    sign = 1 if less_than is None else -1
    if len(left) == 1:
        return torch.addmm(start[0], left[0], right[0], alpha=sign).unsqueeze(0)
    return torch.baddbmm(start, left, right, alpha=sign)


def product_on(device: torch.device, kernels: Any) -> Callable[..., Tensor]:
    """Return `product`, or what does the same and is faster with these kernels on this device.

    The library that PyTorch multiplies with uses AVX-512 on some processors that have it and not
    on others; the kernel reaches the same rate on the former, and more than twice it on the latter.
    """
    if (
        device.type == "cpu"
        and hasattr(kernels, "multiply_")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    ):
        return partial(_multiply, kernels)
    return product


def _multiply(
    kernels: Any,
    left: Tensor,
    right: Tensor,
    *,
    plus: Tensor | None = None,
    less_than: Tensor | None = None,
    triangle: int = FULL,
) -> Tensor:
    start = plus if less_than is None else less_than
    out = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    kernels.multiply_(out, left, right, start, less_than is not None, triangle)
    return out
