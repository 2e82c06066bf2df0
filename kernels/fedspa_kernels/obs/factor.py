"""The triangular factor of SparseGPT, by one Cholesky instead of Cholesky, inverse, Cholesky."""

import torch
from torch import Tensor


def damped_factor(hessian: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor]:
    """Factor H~ = hessian + d·I = L·Lᵀ, d = damping·mean of the non-zero diagonal.

    hessian: (cols, cols), the upper triangle is read and nothing is written
    name:    what an error calls it
    returns: L (cols, cols), upper triangular, and d, a scalar tensor
    raises:  ValueError where the diagonal is zero, or H~ is not positive definite
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if dead.all():
        raise ValueError(
            f"obs_prune: the diagonal of {name} is zero, no calibration samples were accumulated; "
            "call accumulate_hessian_ first"
        )
    _check_dead(hessian, dead, name)
    damp = damping * diagonal[~dead].mean()
    # Cholesky gives lower factors: flip both axes, factor, flip back. The flip is the copy that
    # may be written, and its lower triangle, which is read, is the upper one of the hessian.
    flipped = hessian.flip(0, 1)
    pivots = flipped.diagonal().add_(damp)
    pivots.masked_fill_(dead.flip(0) & (pivots == 0), 1)
    lower, info = torch.linalg.cholesky_ex(flipped)
    if info > 0:
        at = int(info) - 1
        raise ValueError(
            f"obs_prune: {name} is not positive definite after damping {damping} "
            f"(pivot {_pivot(flipped, at):.1e} at column {len(flipped) - 1 - at}); "
            "raise damping or add calibration samples"
        )
    return lower.flip(0, 1), damp


def inverse_blocks(factor: Tensor, block_size: int) -> Tensor:
    """Invert every diagonal block of an upper triangular factor, in one batched call.

    returns: (blocks, block_size, block_size); the last is padded with the identity
    """
    cols = len(factor)
    identity = torch.eye(block_size, dtype=factor.dtype, device=factor.device)
    blocks = identity.repeat(-(-cols // block_size), 1, 1)
    for block, i in zip(blocks, range(0, cols, block_size), strict=True):
        on_diagonal = factor[i : i + block_size, i : i + block_size]
        block[: len(on_diagonal), : len(on_diagonal)] = on_diagonal
    return torch.linalg.solve_triangular(blocks, identity, upper=True)


def _check_dead(hessian: Tensor, dead: Tensor, name: str) -> None:
    # No sum of x·xᵀ looks like this, and setting such a column to 0 would disturb the others.
    beside = hessian.triu().ne(0) & (dead | dead.unsqueeze(1))
    if beside.any():
        row, col = beside.nonzero()[0].tolist()
        raise ValueError(
            f"obs_prune: {name} is not positive semi-definite, its diagonal has a zero beside "
            f"{float(hessian[row, col]):.1e} at ({row}, {col}); accumulate it again"
        )


def _pivot(matrix: Tensor, at: int) -> float:
    """Return the pivot at which the Cholesky of a matrix stopped; its lower triangle is read."""
    leading = torch.linalg.cholesky(matrix[:at, :at])
    row = torch.linalg.solve_triangular(leading, matrix[at, :at].unsqueeze(1), upper=False)
    return float(matrix[at, at] - row.square().sum())
