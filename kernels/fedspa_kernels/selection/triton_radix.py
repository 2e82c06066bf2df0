"""Groups that do not fit on chip: the k-th key digit by digit, without a sort or a synchronisation.

A pass over the data counts the next digit of the keys that still agree with the k-th one. The pass
after it reads from these counts how the k-th key goes on: state (levels + 1, groups, 3) int64 holds
for every level the digits found, how many entries to take among those that share them, and how many
do. Two passes more count the last key's ties ahead of each chunk, and write.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedspa_kernels.launch import options
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

# A histogram costs votes and population counts in proportion to its bins: 64 bins and 6 passes for
# 32 bits take less time than 256 bins and 4. AMD's waves need 64 bins or more.
DIGIT = 6
BINS = tl.constexpr(64)
BLOCK = tl.constexpr(2048)
# Entries of a program: enough to make its 64 atomic additions rare.
CHUNK = tl.constexpr(16384)
THREADS = 256
# Registers that a thread may have where norms are met: left to itself ptxas then takes fewer, and
# spills.
TIES_REGISTERS = 64
MARK_REGISTERS = 192
EMPTY_BITS = {torch.bfloat16: 16, torch.float16: 13}
# These change from pass to pass, and are no reason to compile again.
CHANGING = ["level", "bits_before", "shift", "bits"]


@triton.jit
def _found(counts, state, k, groups, group, chunk, level, bits):
    """Return the k-th key's first `level` digits, how many entries with them go, how many exist.

    The last digit comes from the counts of the pass before, and the first program of a group leaves
    the answer to the pass after.
    """
    prefix = tl.full((), 0, tl.int64)
    room = tl.full((), k, tl.int64)
    tied = tl.full((), 0, tl.int64)
    if level > 0:
        before = (level - 1) * groups + group
        bins = tl.arange(0, BINS)
        count = tl.load(counts + before * BINS + bins)
        prefix = tl.load(state + 3 * before)
        room = tl.load(state + 3 * before + 1)
        digit = tl.sum((tl.cumsum(count, axis=0) < room).to(tl.int32), axis=0)
        prefix = (prefix << bits) | digit
        room -= tl.sum(tl.where(bins < digit, count, 0), axis=0)
        tied = tl.sum(tl.where(bins == digit, count, 0), axis=0)
    here = state + 3 * (level * groups + group)
    tl.store(here, prefix, mask=chunk == 0)
    tl.store(here + 1, room, mask=chunk == 0)
    tl.store(here + 2, tied, mask=chunk == 0)
    return prefix, room, tied


@triton.jit(do_not_specialize=CHANGING)
def count_digits(
    values,
    norms,
    votes,
    counts,
    state,
    k,
    groups,
    chunks,
    n,
    width,
    clients,
    level,
    bits_before,
    shift,
    bits,
    WRAP: tl.constexpr,
    NORMS_OF_ROWS: tl.constexpr,
):
    """Add to counts (levels, groups, BINS) how often each digit follows the digits found so far."""
    group = tl.program_id(0).to(tl.int64) // chunks
    chunk = tl.program_id(0).to(tl.int64) % chunks
    prefix, _room, _tied = _found(counts, state, k, groups, group, chunk, level, bits_before)

    histogram = tl.zeros((BINS,), tl.int32)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BLOCK):
        position = tl.arange(0, BLOCK)
        base, inside = group * n + start, start + position < n
        keys, _ = entry_keys(
            values, norms, votes, base, position, inside, width, clients, WRAP, NORMS_OF_ROWS
        )
        # Two shifts, because their sum can be the key's own width.
        here = inside & (keys >> shift >> bits == prefix.to(keys.dtype))
        digit = ((keys >> shift) & ((1 << bits) - 1)).to(tl.int32)
        histogram += tl.histogram(digit, BINS, mask=here)
    bins = tl.arange(0, BINS)
    sums = counts + (level * groups + group) * BINS + bins
    tl.atomic_add(sums, histogram.to(tl.int64), mask=histogram > 0)


@triton.jit(do_not_specialize=CHANGING)
def count_ties(
    values,
    norms,
    votes,
    counts,
    state,
    ties,
    k,
    groups,
    chunks,
    n,
    width,
    clients,
    level,
    bits_before,
    shift,
    WRAP: tl.constexpr,
    NORMS_OF_ROWS: tl.constexpr,
):
    """Count each chunk's entries with the k-th key, into ties (groups, chunks); 0 where all go."""
    group = tl.program_id(0).to(tl.int64) // chunks
    chunk = tl.program_id(0).to(tl.int64) % chunks
    prefix, room, tied = _found(counts, state, k, groups, group, chunk, level, bits_before)

    count = tl.full((), 0, tl.int32)
    if tied > room:
        for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BLOCK):
            position = tl.arange(0, BLOCK)
            base, inside = group * n + start, start + position < n
            keys, _ = entry_keys(
                values, norms, votes, base, position, inside, width, clients, WRAP, NORMS_OF_ROWS
            )
            tie = inside & (keys >> shift == prefix.to(keys.dtype))
            count += tl.sum(tie.to(tl.int32), axis=0)
    tl.store(ties + group * chunks + chunk, count.to(tl.int64))


@triton.jit(do_not_specialize=CHANGING)
def mark(
    values,
    norms,
    votes,
    state,
    ties_before,
    mask,
    pruned,
    invalid,
    groups,
    chunks,
    n,
    width,
    clients,
    level,
    shift,
    WRAP: tl.constexpr,
    NORMS_OF_ROWS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Mark what is below the k-th key, of its ties the first ones, and what has no votes."""
    group = tl.program_id(0).to(tl.int64) // chunks
    chunk = tl.program_id(0).to(tl.int64) % chunks
    found = state + 3 * (level * groups + group)
    prefix, room, tied = tl.load(found), tl.load(found + 1), tl.load(found + 2)
    rank = tl.load(ties_before + group * chunks + chunk)

    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BLOCK):
        position = tl.arange(0, BLOCK)
        base, inside = group * n + start, start + position < n
        keys, wrong = entry_keys(
            values, norms, votes, base, position, inside, width, clients, WRAP, NORMS_OF_ROWS
        )
        report(invalid, wrong)
        goes, ties = first_in_turn(keys >> shift, prefix.to(keys.dtype), inside, rank, room, tied)
        rank += ties
        if votes is not None:
            goes |= has_no_votes(keys, values)
        write(values, mask, pruned, base + position, inside, goes, KEPT)


def launch_radix(
    entries: Entries,
    of: int,
    count: int,
    mask: Tensor,
    pruned: Tensor | None,
    invalid: Tensor,
    kept: bool,
) -> None:
    """Fill mask, pruned and invalid for runs of `of` entries, of any number."""
    values, norms, votes, width, norms_of_rows, clients = entries
    groups, chunks = mask.numel() // of, triton.cdiv(of, CHUNK.value)
    digits = _digits(entries)
    counts = mask.new_zeros((len(digits), groups, BINS.value), dtype=torch.int64)
    state = mask.new_empty((len(digits) + 1, groups, 3), dtype=torch.int64)
    ties = mask.new_empty((groups, chunks), dtype=torch.int64)
    grid = (groups * chunks,)
    sizes = (groups, chunks, of, width, clients)
    ways: tuple[int | bool, ...] = (wrap(entries, of, BLOCK.value), norms_of_rows)
    config = {"num_warps": num_warps(THREADS), "num_stages": NUM_STAGES}

    def run(kernel: Any, *arguments: Any, maxnreg: int | None = None) -> None:
        bound = {} if maxnreg is None or norms is None else options(mask, {"maxnreg": maxnreg})
        kernel[grid](values, norms, votes, *arguments, *ways, **config, **bound)

    before = 0
    for level, (shift, bits) in enumerate(digits):
        run(count_digits, counts, state, count, *sizes, level, before, shift, bits)
        before = bits
    levels, (shift, _) = len(digits), digits[-1]
    place = (*sizes, levels, before, shift)
    run(count_ties, counts, state, ties, count, *place, maxnreg=TIES_REGISTERS)
    ties_before = ties.cumsum(1) - ties
    ways = (*ways, kept)
    outputs = (mask, pruned, invalid)
    run(mark, state, ties_before, *outputs, *sizes, levels, shift, maxnreg=MARK_REGISTERS)


def _digits(entries: Entries) -> list[tuple[int, int]]:
    """List (shift, bits) of the digits in which keys can differ, the highest first."""
    digits = []
    if entries.values is not None:
        # The values of 16 bits leave the end of a float32 empty; a product with a norm does not.
        product = entries.norms is not None
        empty = 0 if product else EMPTY_BITS.get(entries.values.dtype, 0)
        digits = _split(32, empty)
    if entries.votes is not None:
        above = 32 if digits else 0
        digits = _split(above + entries.clients.bit_length(), above) + digits
    return digits


def _split(high: int, low: int) -> list[tuple[int, int]]:
    tops = range(high, low, -DIGIT)
    return [(max(top - DIGIT, low), min(top - low, DIGIT)) for top in tops]
