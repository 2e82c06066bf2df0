"""One triangle of a symmetric matrix, packed: what travels of a Hessian, and what is added up.

The layout is that of LAPACK's rectangular full packed format (Gustavson et al. 2010): the lower
trapezoid of the left half, and in the gap above it the upper triangle of the lower right quarter.
Packing is copies of blocks, and no gathering of single numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are put in place at a time, so that nothing of the matrix's size is written beside it.
PANEL = 256


def triangle_size(cols: int) -> int:
    """The numbers in one triangle, its diagonal included."""
    return cols * (cols + 1) // 2


def pack_triangle(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """One triangle of a symmetric matrix as one run of numbers.

    matrix:  (cols, cols), both triangles valid
    dtype:   of the result, None: the matrix's
    returns: (cols * (cols + 1) / 2,)
    """
    cols = matrix.shape[0]
    left, odd = (cols + 1) // 2, cols % 2
    packed = matrix.new_empty(triangle_size(cols), dtype=dtype or matrix.dtype)
    folded = packed.view(-1, max(1, left))
    # The trapezoid lies a row lower, or the folded triangle a column further right.
    folded[1 - odd :].copy_(matrix[:, :left])
    rest = matrix[left:, left:]
    for begin in range(0, len(rest), PANEL):
        end = min(begin + PANEL, len(rest))
        folded[begin:end, end + odd :].copy_(rest[begin:end, end:])
        square = folded[begin:end, begin + odd : end + odd]
        square.copy_(square.tril(-1) + rest[begin:end, begin:end].to(packed.dtype).triu())
    return packed


def unpack_triangle(packed: Tensor, cols: int) -> Tensor:
    """The symmetric matrix of a packed triangle, both triangles valid.

    packed:  (cols * (cols + 1) / 2,) as `pack_triangle` made it, finite
    returns: (cols, cols) float32
    raises:  ValueError where the numbers are not those of a triangle
    """
    if packed.shape != (triangle_size(cols),):
        raise ValueError(
            f"a triangle of {cols} columns has {triangle_size(cols)} numbers, not the shape "
            f"{tuple(packed.shape)}"
        )
    left, odd = (cols + 1) // 2, cols % 2
    matrix = packed.new_empty(cols, cols, dtype=torch.float32)
    folded = packed.view(-1, max(1, left))
    matrix[:, :left].copy_(folded[1 - odd :])
    rest = matrix[left:, left:]
    rest.copy_(folded[: len(rest), odd:])
    _mirror_(matrix[:left, :left])
    _mirror_(rest.mT)
    matrix[:left, left:].copy_(matrix[left:, :left].mT)
    return matrix


def _mirror_(matrix: Tensor) -> None:
    """Make the upper triangle of a square matrix that of its lower one, in place."""
    for begin in range(0, len(matrix), PANEL):
        end = min(begin + PANEL, len(matrix))
        square = matrix[begin:end, begin:end]
        square.copy_(square.tril() + square.tril(-1).mT)
        matrix[begin:end, end:].copy_(matrix[end:, begin:end].mT)


def triangle_diagonal(packed: Tensor, cols: int) -> Tensor:
    """The diagonal within a packed triangle, (cols,) in its dtype; a copy."""
    left, odd = (cols + 1) // 2, cols % 2
    folded = packed.view(-1, max(1, left))
    first = folded[1 - odd :].diagonal()[:left]
    return torch.cat([first, folded[:, odd:].diagonal()[: cols - left]])
