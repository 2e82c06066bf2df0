"""The exact choice of the k first keys of a row that registers hold: by ranks, or by a search."""

import triton
import triton.language as tl

from fedspa_kernels.selection.triton_keys import OUTSIDE

# Up to this size an entry is compared with every other of its group, in fewer steps than a search;
# at 16, keys of votes and values already spill registers.
RANKED = tl.constexpr(8)
# After so many rounds a search pulls its bracket in to the keys that are left in it, so that many
# equal keys end it, and not the 32 bits of a key.
TIGHTEN = tl.constexpr(8)
# Of so many rounds one halves the bracket and the others interpolate: about 9 rounds for a row of
# 4096 to 28,672 products of normal numbers, where halving alone takes 14 to 17.
HALVE = tl.constexpr(4)


@triton.jit
def first_of(keys, k, BLOCK):
    """Mark the k first of each row of keys (ROWS, BLOCK), ties to the lower index."""
    if BLOCK <= RANKED:
        chosen = _ranks(keys, BLOCK) < k
    else:
        threshold, upto = kth_key(keys, k)
        chosen = keys <= threshold[:, None]
        if tl.max(upto, axis=0) > k:
            tied = keys == threshold[:, None]
            below = keys < threshold[:, None]
            # In floats for the same reason as the ranks.
            earlier = tl.sum(below.to(tl.float32), axis=1).to(tl.int32)
            room = tl.where(upto > k, k - earlier, BLOCK)
            chosen = below | (tied & (tl.cumsum(tied.to(tl.int32), axis=1) <= room[:, None]))
    return chosen


@triton.jit
def _ranks(keys, BLOCK):
    """Count, for each entry of a row, those before it."""
    position = tl.arange(0, BLOCK)[None, :]
    # In floats, because LLVM makes a sum of integers a count of bits, gathered on the stack.
    rank = tl.zeros_like(keys).to(tl.float32)
    for index in tl.static_range(BLOCK):
        other = tl.sum(tl.where(position == index, keys, 0), axis=1)[:, None]
        before = (other < keys) | ((other == keys) & (index < position))
        rank += before.to(tl.float32)
    return rank


@triton.jit
def kth_key(keys, k):
    """Search each row of keys (ROWS, BLOCK) for a threshold: (ROWS,) uint32, and (ROWS,) int32.

    The second is how many keys reach up to the threshold, k or more. Where it is more, the
    threshold is the k-th smallest key itself. If k or more keys are 0, the threshold is 0.
    """
    below = tl.sum((keys == 0).to(tl.int32), axis=1)
    upto = tl.sum((keys != OUTSIDE).to(tl.int32), axis=1)
    low = (below * 0).to(tl.uint32)
    high = tl.where(below >= k, low, low + (OUTSIDE - 1))
    upto = tl.where(below >= k, k, upto)
    is_open = (upto != k) & (high - low > 1)
    turn = 0
    # Always below = #(keys <= low) < k <= upto = #(keys <= high), until one row after another
    # meets k exactly or holds a single key in its bracket.
    while tl.max(is_open.to(tl.int32), axis=0) > 0:
        if turn % TIGHTEN == 0:
            low, high = _tightened(keys, low, high, is_open)
        pivot = pivot_between(low, high, below, upto, k, turn)
        count = tl.sum((keys <= pivot[:, None]).to(tl.int32), axis=1)
        rise, fall = is_open & (count < k), is_open & (count >= k)
        low, below = tl.where(rise, pivot, low), tl.where(rise, count, below)
        high, upto = tl.where(fall, pivot, high), tl.where(fall, count, upto)
        is_open = is_open & (upto != k) & (high - low > 1)
        turn += 1
    return high, upto


@triton.jit
def pivot_between(low, high, below, upto, k, turn):
    """Return where to count next: above low and up to high, but below it where there is room."""
    width = high - low
    share = tl.minimum((k - below - 0.5) / tl.maximum(upto - below, 1), 1.0)
    share = tl.where((turn % HALVE == 1) | (share < 0), 0.5, share)
    step = (width.to(tl.float32) * share).to(width.dtype)
    return low + tl.minimum(tl.maximum(step, 1), tl.maximum(width, 2) - 1)


@triton.jit
def _tightened(keys, low, high, is_open):
    between = (keys > low[:, None]) & (keys <= high[:, None])
    least = tl.min(tl.where(between, keys, high[:, None]), axis=1)
    most = tl.max(tl.where(between, keys, least[:, None]), axis=1)
    return tl.where(is_open, least - 1, low), tl.where(is_open, most, high)
