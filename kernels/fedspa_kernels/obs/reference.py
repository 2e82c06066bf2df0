"""SparseGPT's OBS update in PyTorch, left-looking.

With E = W - Ŵ over the columns already done, a block B = [i, j) starts from

    W_B + (E[:, :i] · L[:i, B]) · L_BB⁻¹

and inside it runs SparseGPT's own loop with R_BB = L_BB⁻¹. Everything is held transposed, (cols,
rows), so that a column of the weight is contiguous.
"""

from itertools import product

import torch
from torch import Tensor

from fedspa_kernels.counts import at_most
from fedspa_kernels.obs.factor import Factor, damped_factor, inverse_blocks
from fedspa_kernels.selection.reference import smallest_mask


def obs_prune(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    mask: Tensor | None,
    block_size: int,
    damping: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune every matrix of a batch on its own."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    pruned = weight.new_empty(weight.shape)
    kept = weight.new_empty(weight.shape, dtype=torch.bool)
    loss = weight.new_zeros(weight.shape[:-1], dtype=exact)
    if weight.shape[-1] == 0:
        return pruned, kept, loss
    for index in product(*map(range, weight.shape[:-2])):
        name = f"hessian {list(index)}" if index else "hessian"
        factor = damped_factor(hessian[index].to(exact).unsqueeze(0), damping, [name])
        damp, dead = factor.damp[0], factor.dead[0]
        given = None if mask is None else mask[index]
        # A clone, since a transposed single row or column would still be the caller's tensor.
        columns = weight[index].to(exact).T.clone(memory_format=torch.contiguous_format)
        loss[index] = damp * columns[dead].square().sum(0)
        columns[dead] = 0
        loss[index] += _sweep(columns, kept[index], factor, sparsity, pattern, given, block_size)
        pruned[index] = columns.T
    return pruned, kept, loss


def _sweep(
    columns: Tensor,
    kept: Tensor,
    factor: Factor,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    mask: Tensor | None,
    block_size: int,
) -> Tensor:
    """Prune `columns` (cols, rows) in place, fill `kept` (rows, cols), return the loss (rows,)."""
    cols, rows = columns.shape
    block_size = min(block_size, cols)
    blocks = [slice(i, min(i + block_size, cols)) for i in range(0, cols, block_size)]
    inverses = inverse_blocks(factor, blocks)
    upper = factor.upper[0]
    pivots = upper.diagonal().unsqueeze(1)
    change = torch.zeros_like(columns)
    loss = columns.new_zeros(rows)
    for (inverse,), block in zip(inverses, blocks, strict=True):
        done, width = slice(block.start), block.stop - block.start
        weights, scale, inverse = columns[block], pivots[block], inverse[:width, :width]
        before = weights.clone()
        weights.addmm_(inverse.T, upper[done, block].T @ change[done])
        if mask is not None:
            pruned = ~mask[:, block].T
        elif sparsity is not None:
            scores = (weights * scale).abs_().T.reshape(1, -1)
            count = at_most(rows * width, sparsity)
            pruned = smallest_mask(scores, count).view(rows, width).T
        else:
            pruned = torch.zeros_like(weights, dtype=torch.bool)
        errors = _compensate(weights, pruned, inverse, scale, pattern)
        loss += errors.square_().sum(0)
        weights.masked_fill_(pruned, 0)
        torch.sub(before, weights, out=change[block])
        kept[:, block] = ~pruned.T
    return loss


def _compensate(
    weights: Tensor,
    pruned: Tensor,
    inverse: Tensor,
    scale: Tensor,
    pattern: tuple[int, int] | None,
) -> Tensor:
    """SparseGPT's loop in one block: w_j -= e_k·R_kj for j > k, e_k = w_k/R_kk where w_k goes.

    With a pattern, `pruned` is filled on the way. The errors e (cols, rows) are returned: the
    squares of a row's are its loss, because (E·L)_k = e_k.
    """
    errors = torch.empty_like(weights)
    goes = pruned * scale
    for k in range(len(weights)):
        if pattern is not None and k % pattern[1] == 0:
            keep, of = pattern
            group = slice(k, k + of)
            scores = (weights[group] * scale[group]).abs_().T
            pruned[group] = smallest_mask(scores, of - keep).T
            torch.mul(pruned[group], scale[group], out=goes[group])
        torch.mul(weights[k], goes[k], out=errors[k])
        weights[k + 1 :].addr_(inverse[k, k + 1 :], errors[k], alpha=-1)
    return errors
