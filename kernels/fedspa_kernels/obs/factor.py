"""The triangular factor of SparseGPT, by one Cholesky instead of Cholesky, inverse, Cholesky."""

from typing import NamedTuple

import torch
from torch import Tensor

from fedspa_kernels.obs.values import check_finite


class Factor(NamedTuple):
    """H~ = hessian + damp·I = L·Lᵀ of every matrix in a stack.

    upper: (matrices, cols, cols), L, upper triangular
    damp:  (matrices,)
    dead:  (matrices, cols) bool, where the hessian's diagonal is 0
    """

    upper: Tensor
    damp: Tensor
    dead: Tensor


def damped_factor(hessians: Tensor, damping: float, names: list[str]) -> Factor:
    """Factor H~ = hessian + d·I = L·Lᵀ, d = damping·mean of the non-zero diagonal.

    hessians: (matrices, cols, cols), the upper triangles are read and nothing is written
    names:    what an error calls each of them
    raises:   ValueError where a value is not finite, the diagonal is zero, or H~ is not positive
              definite
    """
    diagonals = hessians.diagonal(dim1=-2, dim2=-1)
    dead = diagonals == 0
    live = (~dead).sum(-1)
    for hessian, name, count in zip(hessians, names, live.tolist(), strict=True):
        if not count:
            raise ValueError(
                f"obs_prune: the diagonal of {name} is zero, no calibration samples were "
                "accumulated; call accumulate_hessian_ first"
            )
        if count < hessian.shape[-1]:
            _check_dead(hessian, name)
    damp = damping * (diagonals.sum(-1) / live)
    # As column-major matrices, which the library would otherwise make of them.
    lower, info = torch.linalg.cholesky_ex(_flipped(hessians, damp, dead).mT, upper=True)
    lower = lower.mT
    # NaN compares false, so a pivot must be positive to pass.
    passed = (lower.diagonal(dim1=-2, dim2=-1) > 0).all(-1) & (info == 0)
    for index, good in enumerate(passed.tolist()):
        if not good:
            _explain(hessians, damp, dead, index, int(info[index]), damping, names[index])
    return Factor(_reversed(lower), damp, dead)


def inverse_blocks(upper: Tensor, blocks: list[slice]) -> Tensor:
    """Invert diagonal blocks of upper triangular factors, in one batched call.

    upper:   (matrices, cols, cols)
    blocks:  columns, of at most so many as the first one
    returns: (blocks, matrices, width, width); narrower blocks are padded with the identity
    """
    width = blocks[0].stop - blocks[0].start
    identity = torch.eye(width, dtype=upper.dtype, device=upper.device)
    triangles = identity.repeat(len(blocks), len(upper), 1, 1)
    for triangle, block in zip(triangles, blocks, strict=True):
        size = block.stop - block.start
        triangle[:, :size, :size] = upper[:, block, block]
    return torch.linalg.solve_triangular(triangles, identity, upper=True)


def _flipped(hessians: Tensor, damp: Tensor, dead: Tensor) -> Tensor:
    """Return H~ with both axes reversed, to be written: its lower triangle is valid.

    Cholesky gives lower factors: flip both axes, factor, flip back.
    """
    flipped = _reversed(hessians)
    pivots = flipped.diagonal(dim1=-2, dim2=-1).add_(damp.unsqueeze(-1))
    pivots.masked_fill_(dead.flip(-1) & (pivots == 0), 1)
    return flipped


def _reversed(matrices: Tensor) -> Tensor:
    """Return copies with both axes reversed, which is the row-major order reversed."""
    return matrices.reshape(len(matrices), -1).flip(-1).view(matrices.shape)


def _check_dead(hessian: Tensor, name: str) -> None:
    # No sum of x·xᵀ looks like this, and setting such a column to 0 would disturb the others.
    dead = hessian.diagonal() == 0
    beside = hessian.triu().ne(0) & (dead | dead.unsqueeze(1))
    if beside.any():
        row, col = beside.nonzero()[0].tolist()
        raise ValueError(
            f"obs_prune: {name} is not positive semi-definite, its diagonal has a zero beside "
            f"{float(hessian[row, col]):.1e} at ({row}, {col}); accumulate it again"
        )


def _explain(
    hessians: Tensor,
    damp: Tensor,
    dead: Tensor,
    index: int,
    info: int,
    damping: float,
    name: str,
) -> None:
    """Raise for a matrix whose Cholesky stopped at the pivot `info`, counted from 1."""
    one = slice(index, index + 1)
    check_finite(name, hessians[index].triu())
    flipped = _flipped(hessians[one], damp[one], dead[one])[0]
    at = max(info, 1) - 1
    raise ValueError(
        f"obs_prune: {name} is not positive definite after damping {damping} "
        f"(pivot {_pivot(flipped, at):.1e} at column {len(flipped) - 1 - at}); "
        "raise damping or add calibration samples"
    )


def _pivot(matrix: Tensor, at: int) -> float:
    """Return the pivot at which the Cholesky of a matrix stopped; its lower triangle is read."""
    leading = torch.linalg.cholesky(matrix[:at, :at])
    row = torch.linalg.solve_triangular(leading, matrix[at, :at].unsqueeze(1), upper=False)
    return float(matrix[at, at] - row.square().sum())
