"""What the kernels of this family compute, and how the operator calls them.

The sum is symmetric: only what is on and above the diagonal is multiplied.

native, CPU: add_products_(hessian, inputs) -> None
    hessian: (matrices, cols, cols) float32, contiguous, += inputsᵀ·inputs in both triangles
    inputs:  (matrices, tokens, cols) float32, float16 or bfloat16, contiguous along the last axis;
             or both without the first axis

native, CUDA: mirror_upper_(hessian) -> None
    hessian: (matrices, cols, cols) float32, contiguous; the lower triangle := the upper one's
             transpose. The products are PyTorch's, panel by panel.

triton: accumulate_hessian_(hessian, inputs, precision) -> None
    hessian:   as above, += inputsᵀ·inputs in both triangles
    inputs:    (matrices, tokens, cols) float32, float16 or bfloat16
    precision: "ieee" or "tf32", for float32 inputs
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Narrow panels compute less below the diagonal, wide ones run at the product's full rate.
PANEL = {"cpu": 256, "cuda": 1024}
# So many tokens are converted to float32 at a time, where the product takes no halves.
TOKENS = 4096


def by_panels(kernels: Any, hessian: Tensor, inputs: Tensor) -> None:
    """Add the products of all panels with the columns up to them, and mirror the result."""
    if not hessian.numel() or not inputs.numel():
        return
    on_cpu = hessian.device.type == "cpu"
    # It is not there where tests run CUDA's kernels on a CPU.
    if on_cpu and hasattr(kernels, "add_products_"):
        by_strips(kernels, hessian, inputs)
        return
    with _stacked(hessian) as hessians:
        stack = inputs.reshape(len(hessians), *inputs.shape[-2:])
        # Products of two halves are exact in float32, so a GPU takes them as they are.
        for tokens in stack.split(TOKENS, dim=1) if on_cpu else [stack]:
            _add_upper_(hessians, tokens.float() if on_cpu else tokens)
        if hessian.shape[-1] > _panel(hessian):  # else the one panel is the whole
            kernels.mirror_upper_(hessians)


def by_strips(kernels: Any, hessian: Tensor, inputs: Tensor) -> None:
    """Add the products of all pairs of strips of columns, and mirror the result, in C++."""
    inputs = inputs if inputs.stride(-1) == 1 else inputs.contiguous()
    if hessian.dim() == 2 and hessian.is_contiguous():
        kernels.add_products_(hessian, inputs)
        return
    with _stacked(hessian) as hessians:
        kernels.add_products_(hessians, inputs.reshape(len(hessians), *inputs.shape[-2:]))


def by_tiles(kernels: Any, hessian: Tensor, inputs: Tensor) -> None:
    """Add the products of all tiles on and above the diagonal, and their mirror images."""
    if not hessian.numel() or not inputs.numel():
        return
    # PyTorch's setting is about its own float32 products; this one follows it.
    exact = torch.get_float32_matmul_precision() == "highest" or inputs.dtype != torch.float32
    precision = "ieee" if exact else "tf32"
    with _stacked(hessian) as hessians:
        stack = inputs.reshape(len(hessians), *inputs.shape[-2:]).contiguous()
        kernels.accumulate_hessian_(hessians, stack, precision)


def _add_upper_(hessians: Tensor, tokens: Tensor) -> None:
    """Add the panels' products: of each, the rows up to its end."""
    cols, width = hessians.shape[-1], _panel(hessians)
    for begin in range(0, cols, width):
        end = min(begin + width, cols)
        panel, left, right = hessians[:, :end, begin:end], tokens[..., :end], tokens[..., begin:end]
        if tokens.dtype != torch.float32:
            panel.add_(torch.bmm(left.mT, right, out_dtype=torch.float32))
        elif len(hessians) == 1:  # as matrices, which every device does best
            panel[0].addmm_(left[0].T, right[0])
        else:
            panel.baddbmm_(left.mT, right)


def _panel(hessian: Tensor) -> int:
    return PANEL["cpu" if hessian.device.type == "cpu" else "cuda"]


@contextmanager
def _stacked(hessian: Tensor) -> Iterator[Tensor]:
    """Lend a Hessian as one contiguous stack (matrices, cols, cols), and write a copy back."""
    cols = hessian.shape[-1]
    stack = hessian.contiguous().view(math.prod(hessian.shape[:-2]), cols, cols)
    yield stack
    if not hessian.is_contiguous():
        hessian.copy_(stack.view(hessian.shape))
