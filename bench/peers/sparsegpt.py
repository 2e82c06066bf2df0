"""SparseGPT as its authors run it, written out from the paper (Frantar and Alistarh 2023, alg. 1).

Everything is float32 with TF32 off. The inverse Hessian's upper factor comes from three
factorisations, and the weights are swept column by column, all rows at once. A column takes twelve
launches on a GPU, one fewer than in the authors' code: a ratio to this is on the safe side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@torch.no_grad()
def add_batch(hessian: Tensor, samples_so_far: int, inputs: Tensor) -> int:
    """Update the running mean 2/n · Σ x·xᵀ in place with one more batch of a layer's inputs.

    hessian: (cols, cols) float32
    inputs:  (windows, tokens, cols), or (tokens, cols) as one window; any dtype, cast to float32
    returns: the number of windows with these
    """
    windows = inputs.shape[0] if inputs.dim() == 3 else 1
    together = samples_so_far + windows
    columns = inputs.reshape(-1, inputs.shape[-1]).t().float()
    columns = columns * (2 / together) ** 0.5
    with _without_tf32():
        hessian *= samples_so_far / together
        hessian += columns @ columns.t()
    return together


@torch.no_grad()
def prune(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
) -> Tensor:
    """Prune a weight with the Hessian of its inputs, and let what stays make up for what goes.

    As published, a block's threshold is the entry of rank int(n·sparsity), counted from 0, of its
    n sorted scores, and what is not above it goes: one weight a block more than the share says.

    weight:  (rows, cols), any float dtype; left as it is
    hessian: (cols, cols) float32, Σ x·xᵀ in any scale; left as it is (the authors overwrite it)
    pattern: (n, m) keeps n of every m neighbours in a row; m divides cols and block_size
    returns: (rows, cols) the pruned weight in the weight's dtype
    """
    weights, hessian = weight.float().clone(), hessian.clone()
    cols = weights.shape[1]
    loss = weights.new_zeros(weights.shape[0])
    with _without_tf32():
        factor = _inverse_factor(weights, hessian, damping)
        for start in range(0, cols, block_size):
            stop = min(start + block_size, cols)
            inside = factor[start:stop, start:stop]
            kept, errors, losses = _sweep(weights[:, start:stop], inside, sparsity, pattern)
            weights[:, start:stop] = kept
            loss += losses.sum(1) / 2
            weights[:, stop:] -= errors @ factor[start:stop, stop:]
    return weights.to(weight.dtype)


def _inverse_factor(weights: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular R with R^T·R = (hessian + damping)^-1; inputs never seen get weight 0.

    Both arguments are changed in place.
    """
    diagonal = hessian.diagonal()
    unseen = diagonal == 0
    diagonal.masked_fill_(unseen, 1)
    weights[:, unseen] = 0
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def _sweep(
    weights: Tensor, factor: Tensor, sparsity: float | None, pattern: tuple[int, int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One block of columns: what is kept of it, the errors to spread, and the squares they cost.

    weights: (rows, width), left as it is
    factor:  (width, width), the block on R's diagonal
    """
    weights, width = weights.clone(), weights.shape[1]
    kept, errors, losses = (torch.zeros_like(weights) for _ in range(3))
    pivots = factor.diagonal()
    if pattern is None:
        assert sparsity is not None
        scores = weights**2 / pivots**2
        threshold = scores.flatten().sort().values[int(scores.numel() * sparsity)]
        goes = scores <= threshold
    else:
        goes = torch.zeros_like(weights, dtype=torch.bool)
    for column in range(width):
        if pattern is not None and column % pattern[1] == 0:
            group = slice(column, column + pattern[1])
            scores = weights[:, group] ** 2 / pivots[group] ** 2
            smallest = scores.topk(pattern[1] - pattern[0], dim=1, largest=False).indices
            goes.scatter_(1, column + smallest, True)
        before, pivot = weights[:, column], factor[column, column]
        after = before.masked_fill(goes[:, column], 0)
        change = before - after
        error = change / pivot
        kept[:, column] = after
        losses[:, column] = change**2 / pivot**2
        weights[:, column:] -= error.unsqueeze(1) @ factor[column, column:].unsqueeze(0)
        errors[:, column] = error
    return kept, errors, losses


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Let float32 products keep all their digits on a GPU, as the authors' scripts do."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
