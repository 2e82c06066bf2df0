"""Bit masks and compressed weights in Triton: kernels, then launchers."""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedspa_kernels.launch import Compilation, describe, device_guard

# Bytes of bits in a program's tile, of eight entries each.
PACK_BYTES = 256
VALUE_BYTES = 256
VALUE_WARPS = 8
# Segments that one program counts, and the bytes of each that it loads at a time.
COUNT_SEGMENTS = 8
COUNT_BYTES = 128


@triton.jit
def set_bits(byte):
    """How many bits of each byte (int32, 0 to 255) are set."""
    byte -= (byte >> 1) & 0x55
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@triton.jit
def ranks(byte):
    """Where the kept entries of a run of bytes have their values.

    byte:    (BYTES,) int32, 0 to 255
    returns: kept (BYTES, 8) bool; rank (BYTES, 8), the kept entries up to and without each;
             and how many are kept
    """
    bit = (byte[:, None] >> tl.arange(0, 8)[None, :]) & 1
    count = set_bits(byte)
    before = tl.cumsum(count, 0) - count
    return bit != 0, before[:, None] + tl.cumsum(bit, 1) - bit, tl.sum(count, 0)


@triton.jit
def segment_at(number, n, segment_bytes):
    """Locate a segment: the first of its entries and of its bytes, and how many it has of both."""
    n = tl.cast(n, tl.int64)
    width = tl.cdiv(n, 8)
    segments = tl.cdiv(width, segment_bytes)
    row = number // segments
    first = (number - row * segments) * segment_bytes
    entries = tl.minimum(segment_bytes * 8, n - first * 8)
    length = tl.minimum(segment_bytes, width - first)
    return row * n + first * 8, row * width + first, entries, length


@triton.jit
def _entries(byte, bytes_in_all, n, RAGGED: tl.constexpr):
    # The eight entries of each byte, and which of them exist. Rows that fill their bytes are one
    # long row, which saves the division.
    bit = tl.arange(0, 8)[None, :]
    exists = (byte < bytes_in_all)[:, None]
    if RAGGED:
        width = tl.cdiv(tl.cast(n, tl.int64), 8)
        row = byte // width
        column = ((byte - row * width) * 8)[:, None] + bit
        entry = (row * n)[:, None] + column
        exists = exists & (column < n)
    else:
        entry = (byte * 8)[:, None] + bit
    return entry, exists


@triton.jit
def _pack(mask, bits, bytes_in_all, n, RAGGED: tl.constexpr, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    entry, exists = _entries(byte, bytes_in_all, n, RAGGED)
    kept = (tl.load(mask + entry, mask=exists, other=0) != 0).to(tl.int32)
    packed = tl.sum(kept << tl.arange(0, 8)[None, :], 1)
    tl.store(bits + byte, packed.to(tl.uint8), mask=byte < bytes_in_all)


@triton.jit
def _unpack(bits, mask, bytes_in_all, n, RAGGED: tl.constexpr, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    entry, exists = _entries(byte, bytes_in_all, n, RAGGED)
    packed = tl.load(bits + byte, mask=byte < bytes_in_all, other=0).to(tl.int32)
    kept = (packed[:, None] >> tl.arange(0, 8)[None, :]) & 1
    tl.store(mask + entry, kept.to(tl.uint8), mask=exists)


@triton.jit
def _count(bits, counts, segments, n, segment_bytes, SEGMENTS: tl.constexpr, BYTES: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    _, first_byte, _, length = segment_at(number, n, segment_bytes)
    exists = number < segments
    length = tl.where(exists, length, 0)
    count = tl.zeros((SEGMENTS, BYTES), tl.int32)
    for start in range(0, tl.max(length, 0), BYTES):
        byte = start + tl.arange(0, BYTES)[None, :]
        inside = byte < length[:, None]
        packed = tl.load(bits + first_byte[:, None] + byte, mask=inside, other=0)
        count += set_bits(packed.to(tl.int32))
    tl.store(counts + number, tl.sum(count, 1).to(tl.int64), mask=exists)


@triton.jit
def _compress(weight, bits, offsets, values, n, segment_bytes, BYTES: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    first_entry, first_byte, entries, length = segment_at(number, n, segment_bytes)
    values += tl.load(offsets + number)
    for start in range(0, length, BYTES):
        byte = start + tl.arange(0, BYTES)
        packed = tl.load(bits + first_byte + byte, mask=byte < length, other=0)
        kept, rank, count = ranks(packed.to(tl.int32))
        entry = (byte * 8)[:, None] + tl.arange(0, 8)[None, :]
        # Whole vectors are loaded, kept or not: a load that skips entries moves one at a time.
        value = tl.load(weight + first_entry + entry, mask=entry < entries)
        tl.store(values + rank, value, mask=kept)
        values += count


@triton.jit
def _decompress(bits, values, offsets, weight, n, segment_bytes, BYTES: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    first_entry, first_byte, entries, length = segment_at(number, n, segment_bytes)
    values += tl.load(offsets + number)
    for start in range(0, length, BYTES):
        byte = start + tl.arange(0, BYTES)
        packed = tl.load(bits + first_byte + byte, mask=byte < length, other=0)
        kept, rank, count = ranks(packed.to(tl.int32))
        value = tl.load(values + rank, mask=kept, other=0)
        entry = (byte * 8)[:, None] + tl.arange(0, 8)[None, :]
        tl.store(weight + first_entry + entry, value, mask=entry < entries)
        values += count


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a (rows, n) bool mask into (rows, ceil(n/8)) uint8, spare bits 0."""
    rows, n = mask.shape
    bits = mask.new_empty((rows, (n + 7) // 8), dtype=torch.uint8)
    if rows:
        grid = (triton.cdiv(bits.numel(), PACK_BYTES),)
        with device_guard(mask):
            _pack[grid](mask.view(torch.uint8), bits, bits.numel(), n, n % 8 != 0, PACK_BYTES)
    return bits


def unpack_mask(bits: Tensor, n: int) -> Tensor:
    """Unpack (rows, ceil(n/8)) uint8 into a (rows, n) bool mask."""
    mask = bits.new_empty((len(bits), n), dtype=torch.bool)
    if len(bits):
        grid = (triton.cdiv(bits.numel(), PACK_BYTES),)
        with device_guard(bits):
            _unpack[grid](bits, mask.view(torch.uint8), bits.numel(), n, n % 8 != 0, PACK_BYTES)
    return mask


def count_kept(bits: Tensor, n: int, segment: int) -> Tensor:
    """Count the set bits of each segment: (rows·ceil(n/segment),) int64."""
    counts = bits.new_empty(len(bits) * triton.cdiv(n, segment), dtype=torch.int64)
    if len(counts):
        grid = (triton.cdiv(len(counts), COUNT_SEGMENTS),)
        with device_guard(bits):
            _count[grid](bits, counts, len(counts), n, segment // 8, COUNT_SEGMENTS, COUNT_BYTES)
    return counts


def compress_values(
    weight: Tensor, bits: Tensor, offsets: Tensor, kept: int, segment: int
) -> Tensor:
    """Gather the kept entries of a (rows, n) weight: (kept,), each segment's at its offset."""
    values = weight.new_empty(kept)
    if kept:
        with device_guard(weight):
            _compress[(len(offsets),)](
                _as_integers(weight),
                bits,
                offsets,
                _as_integers(values),
                weight.shape[1],
                segment // 8,
                VALUE_BYTES,
                num_warps=VALUE_WARPS,
            )
    return values


def decompress_values(
    bits: Tensor, values: Tensor, offsets: Tensor, n: int, segment: int
) -> Tensor:
    """Rebuild the (rows, n) weight: values where a bit is set, zeros elsewhere."""
    weight = values.new_empty((len(bits), n))
    if len(bits):
        with device_guard(bits):
            _decompress[(len(offsets),)](
                bits,
                _as_integers(values),
                offsets,
                _as_integers(weight),
                n,
                segment // 8,
                VALUE_BYTES,
                num_warps=VALUE_WARPS,
            )
    return weight


def _as_integers(tensor: Tensor) -> Tensor:
    # Values are moved and never computed with: one kernel for all dtypes of a size.
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def compilations() -> list[Compilation]:
    """Describe every kernel, of rows that fill their bytes or do not, of values of 2 to 8 bytes."""
    types = {"mask": "*u8", "bits": "*u8", "counts": "*i64", "offsets": "*i64"}
    types |= dict.fromkeys(("bytes_in_all", "segments", "n", "segment_bytes"), "i32")
    described = []
    for kernel in (_pack, _unpack):
        for variant, ragged, odd in (("", False, False), ("", False, True), ("ragged", True, True)):
            described.append(
                describe(
                    kernel, variant, types, 4, 3, odd_sizes=odd, RAGGED=ragged, BYTES=PACK_BYTES
                )
            )
    for odd in (False, True):
        counting = {"SEGMENTS": COUNT_SEGMENTS, "BYTES": COUNT_BYTES}
        described.append(describe(_count, "", types, 4, 3, odd_sizes=odd, **counting))
        for kernel, size in product((_compress, _decompress), (2, 4, 8)):
            types |= dict.fromkeys(("weight", "values"), f"*i{8 * size}")
            described.append(
                describe(
                    kernel, f"{size} bytes", types, VALUE_WARPS, 3, odd_sizes=odd, BYTES=VALUE_BYTES
                )
            )
    return described
