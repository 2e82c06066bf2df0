"""What the kernel of this family computes, and how the operator calls it.

obs_prune_block_(weight, update, scale, dead, damp, inverse, count, keep, of,
                 pruned, kept, change, loss, invalid) -> None
    One block of cols <= WIDEST columns of every matrix in a stack, rows in parallel:
    start = (dead ? 0 : weight) + update, and then, column by column, w_j -= w_k·L_kk·R_kj for
    j > k where w_k goes. What goes is decided by |w|·L_kk, the lower row-major index first:
    count >= 0: exactly count of each matrix's block, from the start values;
    of > 0:     all but `keep` of every `of` neighbours, when the sweep reaches them;
    else:       what `kept` says.
    weight:  (matrices, rows, cols) float32, float16 or bfloat16, a view with contiguous rows; so
             are pruned (of its dtype), kept (bool) and change (float32), which are filled, the
             last with (dead ? 0 : weight) - w
    update:  (matrices, rows, cols) float32, contiguous, as are all below; None: 0
    scale:   (matrices, cols) float32, the diagonal L_kk
    dead:    (matrices, cols) bool
    damp:    (matrices,) float32
    inverse: (matrices, cols, cols) float32, R = L⁻¹ of this block, upper triangular
    loss:    (matrices, rows) float32, += Σ_k (w_k·L_kk)² over what goes, + damp·weight² where dead
    invalid: (1,) int32, set to 1 where a weight is not finite; the rest is then nothing
"""

import math
from functools import partial
from itertools import product as indices
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedspa_kernels.counts import at_most
from fedspa_kernels.dispatch import takes_no_float64
from fedspa_kernels.obs.factor import Factor, damped_factor, inverse_blocks
from fedspa_kernels.obs.values import check_finite

WIDEST = 128
# Errors reach the columns beyond so many in one fat product, instead of one for each block.
PANEL = 512


class Choice(NamedTuple):
    """What goes: a share of each block of `block_size` columns, all but n of every m, or neither.

    Neither: the mask is given.
    """

    sparsity: float | None
    pattern: tuple[int, int] | None
    block_size: int


class Sweep(NamedTuple):
    """The matrices (matrices, rows, cols) of one call: what is read and what is written."""

    weight: Tensor
    factor: Factor
    pruned: Tensor
    kept: Tensor
    change: Tensor
    loss: Tensor
    invalid: Tensor


def refuses(*arguments: Any) -> str:
    """Why the kernel does not take a call, or ""."""
    pattern = arguments[3]
    if pattern is not None and pattern[1] > WIDEST:
        return f"its kernel holds {WIDEST} columns, and the pattern has groups of {pattern[1]}"
    return takes_no_float64(*arguments)


def obs_prune(
    kernels: Any,
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    mask: Tensor | None,
    block_size: int,
    damping: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Factor every hessian, and sweep over the columns, block by block."""
    rows, cols = weight.shape[-2:]
    matrices = math.prod(weight.shape[:-2])
    shape = (matrices, rows, cols)
    pruned = weight.new_empty(shape)
    kept = pruned.new_empty(shape, dtype=torch.bool)
    loss = pruned.new_zeros(shape[:-1], dtype=torch.float32)
    if mask is not None:
        kept.copy_(mask.reshape(shape))
    if hessian.numel():
        factor = damped_factor(hessian.reshape(matrices, cols, cols), damping, _names(hessian))
    if pruned.numel():
        sweep = Sweep(
            weight.reshape(shape).contiguous(),
            factor,
            pruned,
            kept,
            torch.empty_like(pruned, dtype=torch.float32),
            loss,
            pruned.new_zeros(1, dtype=torch.int32),
        )
        _run(kernels, sweep, Choice(sparsity, pattern, block_size))
        if sweep.invalid.item():
            check_finite("weight", weight)
    return pruned.view(weight.shape), kept.view(weight.shape), loss.view(weight.shape[:-1])


def _run(kernels: Any, sweep: Sweep, choice: Choice) -> None:
    """Sweep over the panels, and inside them over the blocks.

    With E = W - Ŵ a block B = [i, j) starts from W_B + (E[:, :i] · L[:i, B]) · L_BB⁻¹.
    """
    rows, cols = sweep.weight.shape[-2:]
    upper, change = sweep.factor.upper, sweep.change
    panels = _panels(cols, choice)
    inverses = iter(inverse_blocks(upper, [block for panel in panels for block in panel]))
    for panel in panels:
        begin, end = panel[0].start, panel[-1].stop
        far = None
        if begin:
            far = _product(change[..., :begin], upper[:, :begin, begin:end])
        if _is_wide(choice):
            _select(kernels, sweep, slice(begin, end), far, choice)
        for block in panel:
            inverse = next(inverses)[:, : block.stop - block.start, : block.stop - block.start]
            update = None if far is None else far[..., block.start - begin : block.stop - begin]
            if block.start > begin:
                near = slice(begin, block.start)
                update = _product(change[..., near], upper[:, near, block], plus=update)
            if update is not None:
                update = _product(update, inverse)
            count = -1
            if choice.sparsity is not None and not _is_wide(choice):
                count = at_most(rows * (block.stop - block.start), choice.sparsity)
            _prune_block(kernels, sweep, block, update, inverse.contiguous(), count, choice)


def _prune_block(
    kernels: Any,
    sweep: Sweep,
    block: slice,
    update: Tensor | None,
    inverse: Tensor,
    count: int,
    choice: Choice,
) -> None:
    upper, damp, dead = sweep.factor
    kernels.obs_prune_block_(
        sweep.weight[..., block],
        update,
        upper.diagonal(dim1=-2, dim2=-1)[:, block].contiguous(),
        dead[:, block].contiguous(),
        damp,
        inverse,
        count,
        *(choice.pattern or (0, 0)),
        sweep.pruned[..., block],
        sweep.kept[..., block],
        sweep.change[..., block],
        sweep.loss,
        sweep.invalid,
    )


def _select(
    kernels: Any, sweep: Sweep, block: slice, errors: Tensor | None, choice: Choice
) -> None:
    """Fill `kept` of a block that is wider than the kernel's, from the start values."""
    upper, _, dead = sweep.factor
    triangle = upper[:, block, block]
    start = sweep.weight[..., block].float().masked_fill(dead[:, None, block], 0)
    if errors is not None:
        start += torch.linalg.solve_triangular(triangle, errors, upper=True, left=False)
    scores = start.mul_(triangle.diagonal(dim1=-2, dim2=-1).unsqueeze(1)).abs_()
    count = at_most(scores[0].numel(), choice.sparsity or 0.0)
    # A weight that is not finite makes NaN here; the block's kernel finds it in the weight itself.
    goes, _ = kernels.smallest_mask(scores.nan_to_num_().flatten(1), count)
    sweep.kept[..., block] = ~goes.view(scores.shape)


def _is_wide(choice: Choice) -> bool:
    """Whether scores compete in blocks that are wider than the kernel's."""
    return choice.sparsity is not None and choice.block_size > WIDEST


def _panels(cols: int, choice: Choice) -> list[list[slice]]:
    """Cut the columns into panels, and these into the kernel's blocks."""
    width = WIDEST
    if choice.pattern is not None:
        width -= WIDEST % choice.pattern[1]
    elif choice.sparsity is not None:
        width = min(choice.block_size, WIDEST)
    panel = choice.block_size if _is_wide(choice) else max(PANEL // width, 1) * width
    return [
        [
            slice(block, min(block + width, begin + panel, cols))
            for block in range(begin, min(begin + panel, cols), width)
        ]
        for begin in range(0, cols, panel)
    ]


def _product(left: Tensor, right: Tensor, plus: Tensor | None = None) -> Tensor:
    """Multiply two stacks; a stack of one as matrices, which every device does best."""
    if len(left) == 1:
        product = torch.mm if plus is None else partial(torch.addmm, plus[0])
        return product(left[0], right[0]).unsqueeze(0)
    return torch.bmm(left, right) if plus is None else torch.baddbmm(plus, left, right)


def _names(hessian: Tensor) -> list[str]:
    """What an error calls each matrix of a batch."""
    batch = hessian.shape[:-2]
    if not batch:
        return ["hessian"]
    return [f"hessian {list(index)}" for index in indices(*map(range, batch))]
