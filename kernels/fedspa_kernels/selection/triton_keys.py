"""Keys whose order as integers is the order of selection, and what is written of those that go.

An entry is ordered by its votes (where it has votes), then by its value (times its norm, where it
has one), then by its index. Key 0 always goes and OUTSIDE never; but for 0 votes, which always go,
no vote and no number has such a key.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedspa_kernels.floats import to_float32

OUTSIDE = tl.constexpr(0xFFFFFFFF)
# Of all kernels: loops here have no matrix products to overlap loads with.
NUM_STAGES = 1

# How an entry's row and column follow from its group's: the group is one row; it leaves the row at
# most once; it may leave it many times; at most once, and 32 bits cannot count its columns.
ONE_ROW, ONE_WRAP, MANY_WRAPS, WIDE_ROWS = (tl.constexpr(way) for way in range(4))


class Entries(NamedTuple):
    """What is selected from; values or votes, or both, all flat and contiguous.

    values:  float32, float16 or bfloat16
    norms:   float32 or None: the order is |value|·norm, and entry f of the values lies in row
             f // width, column f % width; norms meet the columns, or with norms_of_rows the rows
    votes:   int32 in 0..clients
    """

    values: Tensor | None = None
    norms: Tensor | None = None
    votes: Tensor | None = None
    width: int = 1
    norms_of_rows: bool = False
    clients: int = 0


def wrap(entries: Entries, of: int, block: int) -> int:
    """Return how blocks that lie in groups of `of` run through the rows of the values."""
    width = entries.width
    if entries.norms is None or (of == width and of <= block):
        return ONE_ROW.value
    if width >= 2**31:
        return WIDE_ROWS.value
    return ONE_WRAP.value if min(of, block) <= width else MANY_WRAPS.value


def num_warps(threads: int) -> int:
    """Return a program's warps; AMD's are taken to be of 64 threads."""
    return threads // (64 if torch.version.hip else 32)


@triton.jit
def value_keys(values, norms, base, position, inside, width, WRAP, NORMS_OF_ROWS):
    """Load values (times norms) as uint32 keys, and whether an input has no place in the order."""
    value = to_float32(tl.load(values + base + position, mask=inside, other=0.0))
    if norms is None:
        wrong = value != value
    else:
        met = _norm_index(base, position, width, WRAP, NORMS_OF_ROWS)
        norm = tl.load(norms + met, mask=inside, other=0.0)
        value = tl.abs(value)
        # As "not sound", NaN is wrong as well.
        sound = (value < float("inf")) & (norm >= 0) & (norm < float("inf"))
        wrong = sound == 0
        value *= norm
    return tl.where(inside, _ordered(value), OUTSIDE), wrong & inside


@triton.jit
def vote_keys(votes, base, position, inside, clients):
    """Load votes as uint32 keys, and whether a vote is not in 0..clients."""
    vote = tl.load(votes + base + position, mask=inside, other=0)
    wrong = (vote < 0) | (vote > clients)
    return tl.where(inside, vote.to(tl.uint32, bitcast=True), OUTSIDE), wrong & inside


@triton.jit
def joined(vote, value):
    """Compose a uint32 key of votes and one of values into an int64 key; two OUTSIDE come last."""
    # Votes are below 2**31: what this takes from OUTSIDE would be the sign.
    return ((vote & 0x7FFFFFFF).to(tl.int64) << 32) | value.to(tl.int64)


@triton.jit
def entry_keys(values, norms, votes, base, position, inside, width, clients, WRAP, NORMS_OF_ROWS):
    """Load keys of votes and values: uint32 of the one that is there, int64 of both."""
    if values is not None:
        value, wrong = value_keys(values, norms, base, position, inside, width, WRAP, NORMS_OF_ROWS)
    if votes is None:
        keys = value
    else:
        keys, miscounted = vote_keys(votes, base, position, inside, clients)
        if values is None:
            wrong = miscounted
        else:
            keys, wrong = joined(keys, value), wrong | miscounted
    return keys, wrong


@triton.jit
def report(invalid, wrong):
    """Set `invalid` where any entry of a block is wrong."""
    # In floats, because LLVM makes an "any" of integers bits, which it gathers on the stack.
    tl.store(invalid, 1, mask=tl.max(wrong.to(tl.float32)) > 0)


@triton.jit
def _norm_index(base, position, width, WRAP, NORMS_OF_ROWS):
    row = base // width
    if WRAP == ONE_ROW:
        index = row + position * 0 if NORMS_OF_ROWS else position
    else:
        column = base % width
        if WRAP != WIDE_ROWS:
            column = column.to(tl.uint32)
        column += position.to(column.dtype)
        columns = tl.full((), width, column.dtype)
        if WRAP == MANY_WRAPS:
            wraps = column // columns
        else:
            wraps = (column >= columns).to(column.dtype)
        index = row + wraps if NORMS_OF_ROWS else column - wraps * columns
    return index


@triton.jit
def _ordered(value):
    """Map float32 to uint32 in the same order, -0.0 onto 0.0; only NaN meets 0 or OUTSIDE."""
    bits = tl.where(value == 0, 0.0, value).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def first_in_turn(keys, threshold, inside, rank, room, tied):
    """Mark what is below a threshold, and its ties up to `room` of all `tied`; count those here.

    rank: how many ties came in the blocks before
    """
    goes = keys <= threshold
    ties = tl.full((), 0, tl.int32)
    if tied > room:
        tie = inside & (keys == threshold)
        ties = tl.sum(tie.to(tl.int32), axis=0)
        fits = rank + tl.cumsum(tie.to(tl.int32), axis=0) <= room
        goes = goes & (fits | (keys != threshold))
    return goes, ties


@triton.jit
def has_no_votes(keys, values):
    """Tell it from a key of votes, or of votes and values."""
    return keys == 0 if values is None else keys >> 32 == 0


@triton.jit
def write(values, mask, pruned, offset, inside, goes, KEPT):
    """Store the mask, and where it is wanted the values without what goes."""
    tl.store(mask + offset, goes != KEPT, mask=inside)
    if pruned is not None:
        # Read again, from the cache: registers do not hold them through a search.
        weight = tl.load(values + offset, mask=inside, other=0.0)
        tl.store(pruned + offset, tl.where(goes, tl.zeros_like(weight), weight), mask=inside)
