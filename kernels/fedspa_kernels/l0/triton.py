"""ℓ0 averaging in Triton: kernels, then launchers.

The clients' tensors are read where they lie, through a table of their addresses.
"""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedspa_kernels.bitmask.triton import count_kept, ranks, segment_at, set_bits
from fedspa_kernels.floats import from_float32, to_float32
from fedspa_kernels.launch import VECTOR, Compilation, describe, device_guard, options

# What kernel.py asks of this module; it counts the bits of compressed clients.
__all__ = ["compilations", "count_kept", "l0_add_", "l0_average", "l0_average_compressed"]

# Entries of a program; eight a thread are one 16-byte load of a half-precision weight.
BLOCK = 1024
# Registers that a thread may have. Left to itself ptxas takes fewer, and then loads the clients'
# vectors one after the other, or spills.
AVERAGE_REGISTERS = 80
ADD_REGISTERS = 128
# Bytes of bits in a tile of compressed clients, of eight entries each.
TILE_BYTES = 256
TILE_WARPS = 8


@triton.jit
def _mean(total, count, dtype: tl.constexpr):
    # Where nobody kept an entry its sum is 0, and so is 0 / 1.
    return from_float32(tl.div_rn(total, tl.maximum(count, 1).to(tl.float32)), dtype)


@triton.jit(do_not_specialize=["clients"])
def _average(
    table,
    average,
    votes,
    clients,
    vectors,
    MASKED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.cast(vectors, tl.int64) * VECTOR
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    # Unrolled, because the loads of one client alone do not keep the memory busy.
    for client in tl.range(0, clients, loop_unroll_factor=4):
        weight = tl.multiple_of(tl.load(table + client).to(average.dtype), VECTOR)
        value = to_float32(tl.load(weight + index, mask=inside, other=0))
        kept = value != 0
        if MASKED:
            mask = tl.load(table + clients + client).to(tl.pointer_type(tl.uint8))
            mask = tl.multiple_of(mask, VECTOR)
            kept = tl.load(mask + index, mask=inside, other=0) != 0
        # Selected after the load: a load that skips entries moves them one at a time.
        total += tl.where(kept, value, 0.0)
        count += kept.to(tl.int32)
    tl.store(average + index, _mean(total, count, average.dtype.element_ty), mask=inside)
    tl.store(votes + index, count, mask=inside)


@triton.jit(do_not_specialize=["clients", "tiles"])
def _average_compressed(
    table, average, votes, clients, n, segment_bytes, tiles, BYTES: tl.constexpr
):
    number = tl.program_id(0).to(tl.int64) // tiles
    first_entry, first_byte, entries, length = segment_at(number, n, segment_bytes)
    start = (tl.program_id(0) % tiles) * BYTES
    byte = tl.arange(0, BYTES)
    inside = byte < length - start
    first_byte += start
    first_entry += start * 8
    entries -= start * 8
    # The votes in a loop of their own: together with the sums, they would not fit the registers of
    # as many programs.
    count = tl.zeros((BYTES, 8), tl.int32)
    for client in range(0, clients):
        bits = tl.load(table + client).to(tl.pointer_type(tl.uint8)) + first_byte
        packed = tl.load(bits + byte, mask=inside, other=0).to(tl.int32)
        count += (packed[:, None] >> tl.arange(0, 8)[None, :]) & 1
    total = tl.zeros((BYTES, 8), tl.float32)
    for client in range(0, clients):
        bits = tl.load(table + client).to(tl.pointer_type(tl.uint8)) + first_byte
        values = tl.load(table + clients + client).to(average.dtype)
        offsets = tl.load(table + 2 * clients + client).to(tl.pointer_type(tl.int64))
        kept, rank, _ = ranks(tl.load(bits + byte, mask=inside, other=0).to(tl.int32))
        # The offset is that of the segment: what its earlier tiles keep comes before.
        earlier = tl.zeros((BYTES,), tl.int32)
        for other in range(-start, 0, BYTES):
            earlier += set_bits(tl.load(bits + other + byte).to(tl.int32))
        values += tl.load(offsets + number) + tl.sum(earlier, 0)
        total += to_float32(tl.load(values + rank, mask=kept, other=0))
    entry = (byte * 8)[:, None] + tl.arange(0, 8)[None, :]
    mean = _mean(total, count, average.dtype.element_ty)
    tl.store(average + first_entry + entry, mean, mask=entry < entries)
    tl.store(votes + first_entry + entry, count, mask=entry < entries)


@triton.jit
def _add(total, votes, kept, weight, mask, importance, n, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    value = to_float32(tl.load(weight + index, mask=inside, other=0))
    chosen = value != 0
    if mask is not None:
        chosen = tl.load(mask + index, mask=inside, other=0) != 0
        value = tl.where(chosen, value, 0.0)
    before = tl.load(total + index, mask=inside)
    tl.store(total + index, before + importance * value, mask=inside)
    before = tl.load(votes + index, mask=inside)
    tl.store(votes + index, before + chosen.to(tl.int32), mask=inside)
    if kept is not None:
        before = tl.load(kept + index, mask=inside)
        tl.store(kept + index, before + tl.where(chosen, importance, 0.0), mask=inside)


def l0_average(weights: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return Σ m·w / Σ m and Σ m of C dense clients; no masks mean w != 0."""
    average = torch.empty_like(weights[0])
    votes = torch.empty_like(average, dtype=torch.int32)
    n = average.numel()
    if n:
        addresses = [tensor.data_ptr() for tensor in (*weights, *masks)]
        vector = VECTOR if all(size % VECTOR == 0 for size in (n, *addresses)) else 1
        with device_guard(average):
            _average[(triton.cdiv(n, BLOCK),)](
                _table(addresses, average.device),
                average,
                votes,
                len(weights),
                n // vector,
                MASKED=bool(masks),
                VECTOR=vector,
                BLOCK=BLOCK,
                **options(average, {"maxnreg": AVERAGE_REGISTERS}),
            )
    return average, votes


def l0_average_compressed(
    bits: list[Tensor], values: list[Tensor], offsets: list[Tensor], n: int, segment: int
) -> tuple[Tensor, Tensor]:
    """Return the same of C compressed clients: (rows, n) and (rows, n)."""
    average = values[0].new_empty((len(bits[0]), n))
    votes = torch.empty_like(average, dtype=torch.int32)
    if average.numel():
        addresses = [tensor.data_ptr() for tensor in (*bits, *values, *offsets)]
        tiles = triton.cdiv(min(bits[0].shape[1], segment // 8), TILE_BYTES)
        with device_guard(average):
            _average_compressed[(len(offsets[0]) * tiles,)](
                _table(addresses, average.device),
                average,
                votes,
                len(bits),
                n,
                segment // 8,
                tiles,
                TILE_BYTES,
                num_warps=TILE_WARPS,
            )
    return average, votes


def l0_add_(
    total: Tensor,
    votes: Tensor,
    kept: Tensor | None,
    weight: Tensor,
    mask: Tensor | None,
    importance: float,
) -> None:
    """Add a client: total += importance·m·w, votes += m and, if given, kept += importance·m."""
    n = total.numel()
    if n:
        mask = None if mask is None else mask.view(torch.uint8)
        with device_guard(total):
            _add[(triton.cdiv(n, BLOCK),)](
                total,
                votes,
                kept,
                weight,
                mask,
                importance,
                n,
                BLOCK,
                **options(total, {"maxnreg": ADD_REGISTERS}),
            )


def _table(addresses: list[int], device: torch.device) -> Tensor:
    # Without non_blocking the host would wait for everything that the device has still to do.
    return torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)


def compilations() -> list[Compilation]:
    """Describe every kernel, of sizes that 16 divides and others, with masks and without."""
    types = {"table": "*i64", "votes": "*i32", "total": "*fp32", "kept": "*fp32", "mask": "*u8"}
    types |= dict.fromkeys(("clients", "vectors", "n", "segment_bytes", "tiles"), "i32")
    types["importance"] = "fp32"
    described = []
    for dtype, odd_sizes in product(("fp32", "fp16", "bf16"), (False, True)):
        types |= dict.fromkeys(("average", "weight"), f"*{dtype}")
        common: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "odd_sizes": odd_sizes}
        averaging = {"VECTOR": 1 if odd_sizes else VECTOR, "maxnreg": AVERAGE_REGISTERS}
        adding = {"maxnreg": ADD_REGISTERS, "BLOCK": BLOCK}
        for kernel, variant, own in (
            (_average, dtype, averaging | {"MASKED": False, "BLOCK": BLOCK}),
            (_average, f"{dtype}, masks", averaging | {"MASKED": True, "BLOCK": BLOCK}),
            (_average_compressed, dtype, {"BYTES": TILE_BYTES, "num_warps": TILE_WARPS}),
            (_add, dtype, adding | {"mask": None, "kept": None}),
            (_add, f"{dtype}, masks", adding | {"kept": None}),
            (_add, f"{dtype}, kept", adding | {"mask": None}),
            (_add, f"{dtype}, masks, kept", adding),
        ):
            described.append(describe(kernel, variant, types, **common | own))
    return described
