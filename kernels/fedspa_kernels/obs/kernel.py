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

from fedspa_kernels.checks import refuse
from fedspa_kernels.counts import at_most
from fedspa_kernels.dispatch import takes_no_float64
from fedspa_kernels.obs.factor import (
    Factor,
    by_panels,
    damped_factor,
    inverse_blocks,
    whole,
)
from fedspa_kernels.obs.product import UPPER, product_on
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


class Part(NamedTuple):
    """A stack of matrices (matrices, rows, cols) whose scores compete within each, with results.

    Of several parts the rows of `change` and `loss` lie one after the other in `Sweep.change`.
    """

    weight: Tensor
    pruned: Tensor
    kept: Tensor
    change: Tensor
    loss: Tensor
    rows: slice


class Sweep(NamedTuple):
    """One sweep over the columns of all parts, which share their hessians.

    change: (matrices, rows of all parts, cols) float32, as in obs_prune_block_
    """

    factor: Factor
    parts: list[Part]
    change: Tensor
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
    shape = (math.prod(weight.shape[:-2]), *weight.shape[-2:])
    masks = None if mask is None else [mask.reshape(shape)]
    choice = Choice(sparsity, pattern, block_size)
    hessians = hessian.reshape(shape[0], *hessian.shape[-2:])
    ((pruned, kept, loss),) = _prune(
        kernels, [weight.reshape(shape)], hessians, masks, choice, damping, _names(hessian)
    )
    return pruned.view(weight.shape), kept.view(weight.shape), loss.view(weight.shape[:-1])


def obs_prune_shared(
    kernels: Any,
    weights: list[Tensor],
    hessian: Tensor,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    masks: list[Tensor] | None,
    block_size: int,
    damping: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Factor the hessian once, and sweep over the columns of all weights together."""
    stacked = None if masks is None else [mask.unsqueeze(0) for mask in masks]
    results = _prune(
        kernels,
        [weight.unsqueeze(0) for weight in weights],
        hessian.unsqueeze(0),
        stacked,
        Choice(sparsity, pattern, block_size),
        damping,
        ["hessian"],
    )
    pruned, kept, loss = ([tensor[0] for tensor in column] for column in zip(*results, strict=True))
    return pruned, kept, loss


def _prune(
    kernels: Any,
    weights: list[Tensor],
    hessians: Tensor,
    masks: list[Tensor] | None,
    choice: Choice,
    damping: float,
    names: list[str],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Prune stacks (matrices, rows, cols) that share their hessians (matrices, cols, cols)."""
    matrices, cols = hessians.shape[:2]
    rows = sum(weight.shape[1] for weight in weights)
    change = weights[0].new_empty((matrices, rows, cols), dtype=torch.float32)
    parts: list[Part] = []
    begin = 0
    for weight in weights:
        end = begin + weight.shape[1]
        kept = torch.empty_like(weight, dtype=torch.bool, memory_format=torch.contiguous_format)
        loss = weight.new_zeros(weight.shape[:-1], dtype=torch.float32)
        if masks is not None:
            kept.copy_(masks[len(parts)])
        pruned = torch.empty_like(weight, memory_format=torch.contiguous_format)
        there = slice(begin, end)
        parts.append(Part(weight.contiguous(), pruned, kept, change[:, there], loss, there))
        begin = end
    if hessians.numel():
        # It is not there where tests run a GPU's kernels on a CPU.
        native = hessians.device.type == "cpu" and hasattr(kernels, "factor_block_")
        method = partial(by_panels, kernels) if native else whole
        factor = damped_factor(hessians, damping, names, method)
    if change.numel():
        invalid = change.new_zeros(1, dtype=torch.int32)
        full = [part for part in parts if part.weight.numel()]
        _run(kernels, Sweep(factor, full, change, invalid), choice)
        refuse(invalid, lambda: _check_weights(weights))
    return [(part.pruned, part.kept, part.loss) for part in parts]


def _check_weights(weights: list[Tensor]) -> None:
    for index, weight in enumerate(weights):
        check_finite("weight" if len(weights) == 1 else f"weight {index}", weight)


def _run(kernels: Any, sweep: Sweep, choice: Choice) -> None:
    """Sweep over the panels, and inside them over the blocks.

    With E = W - Ŵ a block B = [i, j) starts from W_B + (E[:, :i] · L[:i, B]) · L_BB⁻¹.
    """
    upper, change = sweep.factor.upper, sweep.change
    multiply = product_on(change.device, kernels)
    panels = _panels(change.shape[-1], choice)
    inverses = iter(inverse_blocks(sweep.factor, [block for panel in panels for block in panel]))
    for panel in panels:
        begin, end = panel[0].start, panel[-1].stop
        far = None
        if begin:
            far = multiply(change[..., :begin], upper[:, :begin, begin:end])
        if _is_wide(choice):
            for part in sweep.parts:
                _select(kernels, sweep.factor, part, slice(begin, end), far, choice)
        for block in panel:
            inverse = next(inverses)[:, : block.stop - block.start, : block.stop - block.start]
            update = None if far is None else far[..., block.start - begin : block.stop - begin]
            if block.start > begin:
                near = slice(begin, block.start)
                update = multiply(change[..., near], upper[:, near, block], plus=update)
            if update is not None:
                update = multiply(update, inverse, triangle=UPPER)
            inverse = inverse.contiguous()
            for part in sweep.parts:
                _prune_block(kernels, sweep, part, block, update, inverse, choice)


def _prune_block(
    kernels: Any,
    sweep: Sweep,
    part: Part,
    block: slice,
    update: Tensor | None,
    inverse: Tensor,
    choice: Choice,
) -> None:
    upper, _, damp, dead = sweep.factor
    count = -1
    if choice.sparsity is not None and not _is_wide(choice):
        count = at_most(part.weight.shape[1] * (block.stop - block.start), choice.sparsity)
    kernels.obs_prune_block_(
        part.weight[..., block],
        None if update is None else update[:, part.rows].contiguous(),
        upper.diagonal(dim1=-2, dim2=-1)[:, block].contiguous(),
        dead[:, block].contiguous(),
        damp,
        inverse,
        count,
        *(choice.pattern or (0, 0)),
        part.pruned[..., block],
        part.kept[..., block],
        part.change[..., block],
        part.loss,
        sweep.invalid,
    )


def _select(
    kernels: Any, factor: Factor, part: Part, block: slice, errors: Tensor | None, choice: Choice
) -> None:
    """Fill `kept` of a block that is wider than the kernel's, from the start values."""
    triangle = factor.upper[:, block, block]
    start = part.weight[..., block].float().masked_fill(factor.dead[:, None, block], 0)
    if errors is not None:
        start += torch.linalg.solve_triangular(
            triangle, errors[:, part.rows], upper=True, left=False
        )
    scores = start.mul_(triangle.diagonal(dim1=-2, dim2=-1).unsqueeze(1)).abs_()
    count = at_most(scores[0].numel(), choice.sparsity or 0.0)
    # A weight that is not finite makes NaN here; the block's kernel finds it in the weight itself.
    goes, _ = kernels.smallest_mask(scores.nan_to_num_().flatten(1), count)
    part.kept[..., block] = ~goes.view(scores.shape)


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


def _names(hessian: Tensor) -> list[str]:
    """What an error calls each matrix of a batch."""
    batch = hessian.shape[:-2]
    if not batch:
        return ["hessian"]
    return [f"hessian {list(index)}" for index in indices(*map(range, batch))]
