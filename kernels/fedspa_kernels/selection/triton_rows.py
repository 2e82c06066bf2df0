"""Groups of up to 65,536: one launch, a program a group, which it reads from the cache repeatedly.

Registers do not hold so many keys. The rounds of the search after the first read the row again from
the L1 or the L2 cache; from memory it comes once.
"""

import triton
import triton.language as tl
from torch import Tensor

from fedspa_kernels.selection.triton_keys import (
    NUM_STAGES,
    Entries,
    entry_keys,
    first_in_turn,
    has_no_votes,
    num_warps,
    report,
    wrap,
    write,
)
from fedspa_kernels.selection.triton_search import TIGHTEN, pivot_between

LONGEST_ROW = 65536
BLOCK = tl.constexpr(4096)
THREADS = 512


@triton.jit
def select_rows(
    values,
    norms,
    votes,
    mask,
    pruned,
    invalid,
    n,
    k,
    width,
    clients,
    WRAP: tl.constexpr,
    NORMS_OF_ROWS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Mark the k first of every n entries; `mask` is True there, or with KEPT everywhere else."""
    begin = tl.program_id(0).to(tl.int64) * n
    low = tl.full((), -1, tl.int64)
    # Above every number's key, and high - low still an int64.
    high = tl.full((), 2**63 - 2, tl.int64)
    below = tl.full((), 0, tl.int32)
    upto = below + n
    if k == 0:
        high, upto = low, below

    # As kth_key does, but of keys that are loaded block by block.
    turn = 0
    while (upto != k) & (high - low > 1):
        pivot = pivot_between(low, high, below, upto, k, turn)
        least, most = high, low
        count = tl.full((), 0, tl.int32)
        for start in range(0, n, BLOCK):
            position = start + tl.arange(0, BLOCK)
            inside = position < n
            keys, _ = entry_keys(
                values, norms, votes, begin, position, inside, width, clients, WRAP, NORMS_OF_ROWS
            )
            keys = keys.to(tl.int64)
            if turn % TIGHTEN == 0:
                between = inside & (keys > low) & (keys <= high)
                least = tl.minimum(least, tl.min(tl.where(between, keys, high), axis=0))
                most = tl.maximum(most, tl.max(tl.where(between, keys, low), axis=0))
            else:
                count += tl.sum((inside & (keys <= pivot)).to(tl.int32), axis=0)
        if turn % TIGHTEN == 0:
            low, high = least - 1, most
        elif count < k:
            low, below = pivot, count
        else:
            high, upto = pivot, count
        turn += 1

    rank = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < n
        keys, wrong = entry_keys(
            values, norms, votes, begin, position, inside, width, clients, WRAP, NORMS_OF_ROWS
        )
        report(invalid, wrong)
        goes, ties = first_in_turn(keys.to(tl.int64), high, inside, rank, k - below, upto - below)
        rank += ties
        if votes is not None:
            goes |= has_no_votes(keys, values)
        write(values, mask, pruned, begin + position, inside, goes, KEPT)


def launch_rows(
    entries: Entries,
    of: int,
    count: int,
    mask: Tensor,
    pruned: Tensor | None,
    invalid: Tensor,
    kept: bool,
) -> None:
    """Fill mask, pruned and invalid for runs of `of` entries, LONGEST_ROW at most."""
    values, norms, votes, width, norms_of_rows, clients = entries
    sizes = (of, count, width, clients)
    ways = (wrap(entries, of, LONGEST_ROW), norms_of_rows, kept)
    options = {"num_warps": num_warps(THREADS), "num_stages": NUM_STAGES}
    grid = (mask.numel() // of,)
    select_rows[grid](values, norms, votes, mask, pruned, invalid, *sizes, *ways, **options)
