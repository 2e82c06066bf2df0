"""Which weights of a block of columns go, in Triton.

Of a whole block it is a radix selection on the bits of the scores, four digits of eight bits: each
launch counts one digit of the scores that share the digits found so far, and every program of the
next one finds that digit by itself, so that nothing waits for the host. The time is the same
whatever the scores are.
"""

import triton
import triton.language as tl

from fedspa_kernels.floats import to_float32

DIGITS = tl.constexpr(4)
BINS = tl.constexpr(256)


@triton.jit
def locate_tile(rows_total, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Return this program's rows (rows, 1) int64, its columns (1, cols), and which exist."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    return rows, cols, (rows < rows_total) & (cols < width)


@triton.jit
def load_tile(weight, update, dead, rows, cols, inside, weight_row, width):
    """Return a tile's weights, which of its columns are dead, and where its sweep starts from."""
    weights = to_float32(tl.load(weight + rows * weight_row + cols, mask=inside, other=0.0))
    is_dead = tl.load(dead + cols, mask=cols < width, other=0) != 0
    start = tl.where(is_dead, 0.0, weights)
    if update is not None:
        start += tl.load(update + rows * width + cols, mask=inside, other=0.0)
    return weights, is_dead, start


@triton.jit
def score_keys(weights, scales):
    """Return the scores as integers of the same order: a float that is not negative has them."""
    return (tl.abs(weights) * scales).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _find(histograms, count, FOUND: tl.constexpr):
    """Return the first FOUND digits of the count-th smallest key, its rank and their number.

    The rank counts from one, among the keys that share these digits.
    """
    bins = tl.arange(0, BINS)
    prefix = 0
    rank = count
    sharing = 0
    for digit in tl.static_range(FOUND):
        sizes = tl.load(histograms + digit * BINS + bins)
        found = tl.sum((tl.cumsum(sizes, 0) < rank).to(tl.int32), 0)
        rank -= tl.sum(tl.where(bins < found, sizes, 0), 0)
        sharing = tl.sum(tl.where(bins == found, sizes, 0), 0)
        prefix = prefix * BINS + found
    return prefix, rank, sharing


@triton.jit(do_not_specialize=["count"])
def histogram_kernel(
    weight,
    update,
    scale,
    dead,
    histograms,
    tile_counts,
    rows_total,
    width,
    count,
    weight_matrix,
    weight_row,
    DIGIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Count one digit of the keys that share the digits found before.

    histograms:  (matrices, DIGITS, BINS) int32, zeros at first
    tile_counts: (matrices, tiles, BINS) int32, the last digit's counts tile by tile
    """
    matrix = tl.program_id(1).to(tl.int64)
    weight += matrix * weight_matrix
    if update is not None:
        update += matrix * rows_total * width
    histograms += matrix * DIGITS * BINS
    rows, cols, counted = locate_tile(rows_total, width, BLOCK_ROWS, BLOCK_COLS)
    dead += matrix * width
    _, _, start = load_tile(weight, update, dead, rows, cols, counted, weight_row, width)
    keys = score_keys(start, tl.load(scale + matrix * width + cols, mask=cols < width, other=0.0))
    if DIGIT > 0:
        prefix, _, _ = _find(histograms, count, DIGIT)
        counted &= (keys >> (32 - 8 * DIGIT)) == prefix
    digits = (keys >> (24 - 8 * DIGIT)) & (BINS - 1)
    flat: tl.constexpr = BLOCK_ROWS * BLOCK_COLS
    sizes = tl.histogram(tl.reshape(digits, [flat]), BINS, mask=tl.reshape(counted, [flat]))
    bins = tl.arange(0, BINS)
    tl.atomic_add(histograms + DIGIT * BINS + bins, sizes, mask=sizes > 0, sem="relaxed")
    if DIGIT == DIGITS - 1:
        tile = matrix * tl.num_programs(0) + tl.program_id(0)
        tl.store(tile_counts + tile * BINS + bins, sizes)


@triton.jit
def _ties_before(ties, tile_counts):
    """Return how many ties have a lower flat index: (rows, cols), for the ties of a tile.

    tile_counts: (tiles, BINS) int32 from the ties' own bin on, the number of ties in each tile
    """
    before = tl.zeros([BINS], tl.int32)
    for first in range(0, tl.program_id(0), BINS):
        tiles = first + tl.arange(0, BINS)
        earlier = tiles < tl.program_id(0)
        before += tl.load(tile_counts + tiles.to(tl.int64) * BINS, mask=earlier, other=0)
    ties = ties.to(tl.int32)
    along_row = tl.cumsum(ties, 1)
    # Not the sum of the ties: LLVM makes that a count of bits, which it gathers on the stack.
    of_rows = tl.max(along_row, 1)
    before_row = tl.cumsum(of_rows, 0) - of_rows
    return tl.sum(before, 0) + before_row[:, None] + along_row - ties


@triton.jit
def smallest(keys, inside, histograms, tile_counts, count):
    """Mark the tile's share of the matrix's `count` smallest keys, lower flat indices first."""
    threshold, rank, tied = _find(histograms, count, DIGITS)
    ties = inside & (keys == threshold)
    # Nearly always all the ties fit (most often the only one), and nobody has to count them.
    if tied > rank:
        ties &= _ties_before(ties, tile_counts + (threshold & (BINS - 1))) < rank
    return ties | (inside & (keys < threshold))


@triton.jit
def smallest_of_group(keys, cols, first, group, drops):
    """Mark the `drops` smallest keys of the columns [first, first + group) of each row."""
    rank = tl.zeros_like(keys)
    for k in range(first, first + group):
        key = tl.sum(tl.where(cols == k, keys, 0), 1)[:, None]
        rank += ((key < keys) | ((key == keys) & (k < cols))).to(tl.int32)
    return (cols >= first) & (cols < first + group) & (rank < drops)
