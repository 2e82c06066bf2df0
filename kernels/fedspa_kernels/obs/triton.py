"""SparseGPT's sweep over one block of columns in Triton: one launch, a tile of rows a program."""

from itertools import product
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fedspa_kernels.floats import from_float32
from fedspa_kernels.launch import VECTOR, Compilation, describe, device_guard, options
from fedspa_kernels.obs.triton_choice import (
    BINS,
    DIGITS,
    histogram_kernel,
    load_tile,
    locate_tile,
    score_keys,
    smallest,
    smallest_of_group,
)
from fedspa_kernels.selection.triton import smallest_mask

# What kernel.py asks of this module; it selects in blocks that are wider than a tile.
__all__ = ["compilations", "obs_prune_block_", "smallest_mask"]

# A tile is rows × all columns of the block, and one warp has it: taking a column out of the tile
# is then a few shuffles, where more warps would meet at a barrier for every column.
CONFIG = {"BLOCK_ROWS": 8, "BLOCK_COLS": 128, "num_warps": 1, "num_stages": 1}
# Of other widths and strides than multiples of VECTOR each entry has an address of its own, and
# there are registers for fewer rows; without the bound ptxas would take fewer still, and spill.
ODD = {"BLOCK_ROWS": 4, "BLOCK_COLS": 128, "num_warps": 1, "num_stages": 1, "maxnreg": 200}


@triton.jit(do_not_specialize=["count", "group", "drops"])
def sweep_kernel(
    weight,
    update,
    scale,
    dead,
    damp,
    inverse,
    histograms,
    tile_counts,
    pruned,
    kept,
    change,
    loss,
    invalid,
    rows_total,
    width,
    count,
    group,
    drops,
    weight_matrix,
    weight_row,
    pruned_matrix,
    pruned_row,
    kept_matrix,
    kept_row,
    change_matrix,
    change_row,
    CHOICE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Sweep a tile of rows from the first column of the block to the last, and write all of it.

    CHOICE: "count" (what the histograms found), "pattern" (`drops` of every `group` columns), or
            "mask" (what `kept` holds); without a pattern `group` is the width
    """
    matrix = tl.program_id(1).to(tl.int64)
    if update is not None:
        update += matrix * rows_total * width
    rows, cols, inside = locate_tile(rows_total, width, BLOCK_ROWS, BLOCK_COLS)
    weight += matrix * weight_matrix
    dead += matrix * width
    _, _, start = load_tile(weight, update, dead, rows, cols, inside, weight_row, width)
    scales = tl.load(scale + matrix * width + cols, mask=cols < width, other=0.0)
    kept += matrix * kept_matrix + rows * kept_row + cols
    if CHOICE == "count":
        histograms += matrix * DIGITS * BINS
        tile_counts += matrix * BINS * tl.num_programs(0)
        goes = smallest(score_keys(start, scales), inside, histograms, tile_counts, count)
    elif CHOICE == "mask":
        goes = inside & (tl.load(kept, mask=inside, other=1) == 0)
    else:
        goes = inside & (cols < 0)

    # e_k = w_k·factor_k: the factor is the scale where the weight goes, and 0 where it stays.
    factors = tl.where(goes, scales, 0.0)
    squares = tl.zeros([BLOCK_ROWS], tl.float32)
    inverse += matrix * width * width
    swept = start
    for first in range(0, width, group):
        if CHOICE == "pattern":
            chosen = smallest_of_group(score_keys(swept, scales), cols, first, group, drops)
            factors = tl.where(chosen, scales, factors)
        for k in range(first, first + group):
            error = tl.sum(tl.where(cols == k, swept * factors, 0.0), 1)
            right = (cols > k) & (cols < width)
            swept -= error[:, None] * tl.load(inverse + k * width + cols, mask=right, other=0.0)
            squares += error * error

    goes = factors > 0
    swept = tl.where(goes, 0.0, swept)
    pruned += matrix * pruned_matrix + rows * pruned_row + cols
    tl.store(pruned, from_float32(swept, pruned.dtype.element_ty), mask=inside)
    if CHOICE != "mask":
        tl.store(kept, ~goes, mask=inside)
    # Loaded again, after a store: the sweep needs the registers.
    weights, is_dead, _ = load_tile(weight, None, dead, rows, cols, inside, weight_row, width)
    change += matrix * change_matrix + rows * change_row + cols
    tl.store(change, tl.where(is_dead, 0.0, weights) - swept, mask=inside)

    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    loss += matrix * rows_total + row
    lost = squares + tl.load(damp + matrix) * tl.sum(tl.where(is_dead, weights * weights, 0.0), 1)
    tl.store(loss, tl.load(loss, mask=row < rows_total) + lost, mask=row < rows_total)
    wrong = tl.max(tl.max((~(tl.abs(weights) < float("inf"))).to(tl.int32), 1), 0)
    tl.store(invalid, 1, mask=wrong > 0)


def obs_prune_block_(
    weight: Tensor,
    update: Tensor | None,
    scale: Tensor,
    dead: Tensor,
    damp: Tensor,
    inverse: Tensor,
    count: int,
    keep: int,
    of: int,
    pruned: Tensor,
    kept: Tensor,
    change: Tensor,
    loss: Tensor,
    invalid: Tensor,
) -> None:
    """Prune one block of at most 128 columns of a stack of matrices.

    weight:  (matrices, rows, width), last stride 1; pruned, kept (bool) and change (float32) too
    update:  (matrices, rows, width) float32, what earlier blocks add to the weights, or None
    scale:   (matrices, width) float32 > 0; dead: (matrices, width) bool; damp: (matrices,) float32
    inverse: (matrices, width, width) float32, upper triangular
    count:   how many of each matrix go; or -1, and of every `of` columns `keep` stay; or of is 0
             too, and `kept` says what stays
    loss:    (matrices, rows) float32, added to; invalid: (1,) int32, set by a weight that is not
             finite
    """
    matrices, rows, width = weight.shape
    if weight.numel() == 0:
        return
    choice = "count" if count >= 0 else "pattern" if of > 0 else "mask"
    group = of if choice == "pattern" else width
    block = (weight, update, scale, dead)
    outputs = (pruned, kept, change, loss, invalid)
    strides = [step for view in (weight, *outputs[:3]) for step in view.stride()[:2]]
    odd = any(number % VECTOR for number in (width, weight.data_ptr(), *strides))
    config = options(weight, ODD if odd else CONFIG)
    tiles = triton.cdiv(rows, config["BLOCK_ROWS"])
    found: tuple[Tensor | None, Tensor | None] = (None, None)
    with device_guard(weight):
        if choice == "count":
            found = (
                invalid.new_zeros(matrices, DIGITS.value, BINS.value),
                invalid.new_empty(matrices, tiles, BINS.value),
            )
            for digit in range(DIGITS.value):
                histogram_kernel[tiles, matrices](
                    *block, *found, rows, width, count, *strides[:2], DIGIT=digit, **config
                )
        sweep_kernel[tiles, matrices](
            *block,
            damp,
            inverse,
            *found,
            *outputs,
            rows,
            width,
            count,
            group,
            of - keep,
            *strides,
            CHOICE=choice,
            **config,
        )


def compilations() -> list[Compilation]:
    """Describe the kernels of every dtype, with `update` and, in a first block, without.

    The digits of float16 are counted as those of bfloat16, and its first block is swept so.
    """
    floats = ("scale", "damp", "inverse", "update", "change", "loss")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("dead", "kept"), "*i1")
    types |= dict.fromkeys(("histograms", "tile_counts", "invalid"), "*i32")
    types |= dict.fromkeys(("rows_total", "width", "count", "group", "drops"), "i32")
    for view, step in product(("weight", "pruned", "kept", "change"), ("matrix", "row")):
        types[f"{view}_{step}"] = "i32"
    described = []
    for dtype, odd_sizes in product(("bf16", "fp16", "fp32"), (False, True)):
        types |= dict.fromkeys(("weight", "pruned"), f"*{dtype}")
        config: dict[str, Any] = {"odd_sizes": odd_sizes, **(ODD if odd_sizes else CONFIG)}
        first = config | {"update": None}
        described += _describe_sweeps(dtype, types, config)
        if dtype != "fp16":
            described += _describe_digits(dtype, types, config)
            described += _describe_sweeps(f"{dtype}, first", types, first)
        if dtype == "bf16":
            described += _describe_digits(f"{dtype}, first", types, first)
    return described


def _describe_digits(
    variant: str, types: dict[str, str], config: dict[str, Any]
) -> list[Compilation]:
    # Those between the first and the last find fewer digits than the last, and hold no more.
    return [
        describe(histogram_kernel, f"{variant}, digit {digit}", types, DIGIT=digit, **config)
        for digit in (0, DIGITS.value - 1)
    ]


def _describe_sweeps(
    variant: str, types: dict[str, str], config: dict[str, Any]
) -> list[Compilation]:
    unused: dict[str, Any] = {"histograms": None, "tile_counts": None}
    return [
        describe(sweep_kernel, f"{variant}, {choice}", types, CHOICE=choice, **none, **config)
        for choice, none in (("count", {}), ("pattern", unused), ("mask", unused))
    ]
