"""The triangular factor of SparseGPT, by one Cholesky instead of Cholesky, inverse, Cholesky."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedspa_kernels.checks import examine
from fedspa_kernels.obs.product import LOWER, product_on
from fedspa_kernels.obs.values import check_finite

# The compiled kernels of a CPU factor in panels of so many columns, as wide as the sweep's blocks.
PANEL = 128


class Factor(NamedTuple):
    """H~ = hessian + damp·I = L·Lᵀ of every matrix in a stack.

    upper:    (matrices, cols, cols), L, upper triangular; what is below the diagonal is nothing
    inverses: (panels, matrices, PANEL, PANEL), the inverse of L's diagonal blocks, the last one
              padded with the identity; None where the library factored the whole
    damp:     (matrices,)
    dead:     (matrices, cols) bool, where the hessian's diagonal is 0
    """

    upper: Tensor
    inverses: Tensor | None
    damp: Tensor
    dead: Tensor


# Factors what a stack of hessians, with damp on the diagonal, is: `whole`, or `by_panels`.
Method = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor]]


def damped_factor(
    hessians: Tensor, damping: float, names: list[str], method: Method | None = None
) -> Factor:
    """Factor H~ = hessian + d·I = L·Lᵀ, d = damping·mean of the non-zero diagonal.

    hessians: (matrices, cols, cols), the upper triangles are read and nothing is written
    names:    what an error calls each of them
    method:   `whole`, if none is given
    raises:   ValueError where a value is not finite, the diagonal is zero, or H~ is not positive
              definite
    """
    diagonals = hessians.diagonal(dim1=-2, dim2=-1)
    dead = (diagonals == 0).contiguous()
    live = (~dead).sum(-1)
    damp = damping * (diagonals.sum(-1) / live)
    upper, inverses, failed = (method or whole)(hessians, damp, dead)
    # NaN compares false, so a pivot must be positive to pass. An infinite damp makes infinite ones.
    pivots = upper.diagonal(dim1=-2, dim2=-1)
    passed = ((pivots > 0) & pivots.isfinite()).all(-1) & (failed == 0)
    # Dead columns are looked at more closely; most are harmless.
    examine(
        ~passed | (live < hessians.shape[-1]),
        lambda: _check(hessians, damp, dead, passed, damping, names),
    )
    return Factor(upper, inverses, damp, dead)


def whole(hessians: Tensor, damp: Tensor, dead: Tensor) -> tuple[Tensor, None, Tensor]:
    """Return L from the library's Cholesky, and what is not 0 where there is none."""
    # As column-major matrices, which the library would otherwise make of them.
    lower, failed = torch.linalg.cholesky_ex(_flipped(hessians, damp, dead).mT, upper=True)
    return _reversed(lower.mT), None, failed


def by_panels(
    kernels: Any, hessians: Tensor, damp: Tensor, dead: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return L, the inverses of its diagonal blocks, and what is not 0 where there is no L.

    From right to left: with what lies right of a panel [b, e) done, its columns of H~ less
    L[:, e:]·L[b:e, e:]ᵀ are L[:, b:e]·L_BBᵀ, where L_BB comes from the diagonal block, and the rest
    from a product with its inverse. So nearly all work is in products, which run at more than twice
    the rate of a CPU library's Cholesky.

    kernels: with factor_block_(block, damp, dead, upper, inverse, failed) of obs/factor.cpp
    """
    multiply = product_on(hessians.device, kernels)
    matrices, cols = hessians.shape[:2]
    panels = _panels(cols)
    width = panels[0].stop
    hessians = hessians.contiguous()
    upper = torch.empty_like(hessians)
    identity = torch.eye(width, dtype=upper.dtype, device=upper.device)
    inverses = identity.repeat(len(panels), matrices, 1, 1)
    failed = upper.new_zeros(matrices, dtype=torch.int32)
    for panel, inverse in reversed(list(zip(panels, inverses, strict=True))):
        begin, end = panel.start, panel.stop
        inverse = inverse[:, : end - begin, : end - begin]
        rest = hessians[:, :end, panel]
        if end < cols:
            rest = multiply(upper[:, :end, end:], upper[:, panel, end:].mT, less_than=rest)
        block = rest[:, begin:]
        kernels.factor_block_(block, damp, dead[:, panel], upper[:, panel, panel], inverse, failed)
        if begin:
            upper[:, :begin, panel] = multiply(rest[:, :begin], inverse.mT, triangle=LOWER)
    return upper, inverses, failed


def inverse_blocks(factor: Factor, blocks: list[slice]) -> Tensor:
    """Invert diagonal blocks of upper triangular factors, in one batched call.

    blocks:  columns, of at most so many as the first one
    returns: (blocks, matrices, width, width); narrower blocks are padded with the identity
    """
    upper, width = factor.upper, blocks[0].stop - blocks[0].start
    if factor.inverses is not None and blocks == _panels(upper.shape[-1]):
        return factor.inverses
    identity = torch.eye(width, dtype=upper.dtype, device=upper.device)
    triangles = identity.repeat(len(blocks), len(upper), 1, 1)
    for triangle, block in zip(triangles, blocks, strict=True):
        size = block.stop - block.start
        triangle[:, :size, :size] = upper[:, block, block]
    return torch.linalg.solve_triangular(triangles, identity, upper=True)


def _panels(cols: int) -> list[slice]:
    return [slice(begin, min(begin + PANEL, cols)) for begin in range(0, cols, PANEL)]


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


def _check(
    hessians: Tensor,
    damp: Tensor,
    dead: Tensor,
    passed: Tensor,
    damping: float,
    names: list[str],
) -> None:
    """Raise for the first matrix with a fault; one with dead columns may have none."""
    for index, name in enumerate(names):
        live = int((~dead[index]).sum())
        if not live:
            raise ValueError(
                f"obs_prune: the diagonal of {name} is zero, no calibration samples were "
                "accumulated; call accumulate_hessian_ first"
            )
        if live < hessians.shape[-1]:
            _check_dead(hessians[index], name)
        if not passed[index]:
            one = slice(index, index + 1)
            _explain(hessians[one], damp[one], dead[one], damping, name)


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


def _explain(hessian: Tensor, damp: Tensor, dead: Tensor, damping: float, name: str) -> None:
    """Raise for a matrix (1, cols, cols) that has no Cholesky factor, naming the pivot."""
    check_finite(name, hessian.triu())
    if not damp.isfinite():
        largest = float(hessian.diagonal(dim1=-2, dim2=-1).max())
        raise ValueError(
            f"obs_prune: damping {damping} times the mean of the diagonal of {name} is beyond "
            f"{hessian.dtype} (its largest entry is {largest:.1e}); "
            "divide the hessian, which changes no result but the loss"
        )
    flipped = _flipped(hessian, damp, dead)[0]
    lower, info = torch.linalg.cholesky_ex(flipped.mT, upper=True)
    # Rounding may let the whole pass where the panels did not: then the smallest pivot is to blame.
    at = int(info) - 1 if int(info) else int(lower.diagonal().argmin())
    at, pivot = _pivot(flipped.double(), at)
    raise ValueError(
        f"obs_prune: {name} is not positive definite after damping {damping} "
        f"(pivot {pivot:.1e} at column {len(flipped) - 1 - at}); "
        "raise damping or add calibration samples"
    )


def _pivot(matrix: Tensor, at: int) -> tuple[int, float]:
    """Return the pivot at which the Cholesky of a matrix stopped, or an earlier one.

    What float32 took for positive may not be so in float64. The lower triangle is read.
    """
    leading, info = torch.linalg.cholesky_ex(matrix[:at, :at])
    if int(info):
        return _pivot(matrix, int(info) - 1)
    row = torch.linalg.solve_triangular(leading, matrix[at, :at].unsqueeze(1), upper=False)
    return at, float(matrix[at, at] - row.square().sum())
