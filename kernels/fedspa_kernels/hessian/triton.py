"""The symmetric product inputsᵀ·inputs in Triton: tiles on and above the diagonal, and mirrored.

Halves are multiplied as they are, on tensor cores: their products are exact in float32, in which
they are summed. Where there are few tiles the tokens are cut into parts, whose sums a second
kernel adds in order, so that the same call gives the same bits.
"""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedspa_kernels.launch import VECTOR, Compilation, describe, device_guard, options

# A program sums a tile of BLOCK × BLOCK products, over BLOCK_TOKENS tokens at a time.
HALVES = {"BLOCK": 128, "BLOCK_TOKENS": 64, "num_warps": 8, "num_stages": 3}
TF32 = {"BLOCK": 128, "BLOCK_TOKENS": 32, "num_warps": 8, "num_stages": 3}
# Without tensor cores each thread multiplies, and its registers hold less; without the bound ptxas
# would take fewer of them, and spill.
IEEE = {"BLOCK": 64, "BLOCK_TOKENS": 16, "num_warps": 4, "num_stages": 3, "maxnreg": 128}
# Of other numbers of columns than multiples of VECTOR the entries are moved one at a time, each by
# an address of its own: a larger tile's would not fit the registers.
ODD = {"BLOCK": 64, "BLOCK_TOKENS": 32, "num_warps": 8, "num_stages": 3}
ADD = {"BLOCK": 64, "num_warps": 8, "num_stages": 1}

# Neighbouring programs take a square of GROUP × GROUP tiles: their inputs stay in the L2 cache.
GROUP = tl.constexpr(8)
# Tokens are cut into parts until there are so many programs, about what a GPU runs at a time; but
# not into shorter parts than these.
ENOUGH_PROGRAMS = 256
PART_TOKENS = 2048


@triton.jit
def _triangle(index):
    """Return row <= column of the index-th entry on or above the diagonal, column by column."""
    column = (tl.sqrt(2.0 * index + 0.25) - 0.5).to(tl.int32)
    # The square root is rounded, and the column may be off by one.
    column -= (column * (column + 1) // 2 > index).to(tl.int32)
    column += ((column + 1) * (column + 2) // 2 <= index).to(tl.int32)
    return index - column * (column + 1) // 2, column


@triton.jit
def _add(hessian, sums, row_tile, col_tile, size, BLOCK: tl.constexpr):
    """Add a tile of sums on or above the diagonal to the Hessian, and mirror what comes out."""
    row, col = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (row < size - row_tile * BLOCK) & (col < size - col_tile * BLOCK)
    # Offsets inside a tile are short: 64 bits for each would not fit the registers.
    upper = hessian + (row_tile.to(tl.int64) * size + col_tile) * BLOCK + (row * size + col)
    sums += tl.load(upper, mask=inside, other=0.0)
    if row_tile == col_tile:
        # Tensor cores need not give a product and its transpose the same bits.
        sums = tl.where(row <= col, sums, tl.trans(sums))
    else:
        lower = hessian + (col_tile.to(tl.int64) * size + row_tile) * BLOCK + (col * size + row)
        tl.store(lower, sums, mask=inside)
    tl.store(upper, sums, mask=inside)


@triton.jit(do_not_specialize=["tokens", "part_tokens"])
def product_kernel(
    hessian,
    parts,
    inputs,
    size,
    tokens,
    part_tokens,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Sum the products of two runs of columns over one part of the tokens: a tile of the result.

    hessian: (matrices, size, size) float32, added to
    parts:   (matrices, number of parts, size, size) float32, filled on and above the diagonal in
             its stead; or None
    inputs:  (matrices, tokens, size)
    """
    square_row, square_col = _triangle(tl.program_id(0) // (GROUP * GROUP))
    place = tl.program_id(0) % (GROUP * GROUP)
    row_tile = square_row * GROUP + place // GROUP
    col_tile = square_col * GROUP + place % GROUP
    if (row_tile > col_tile) | (col_tile * BLOCK >= size):
        return
    part = tl.program_id(1).to(tl.int64)
    matrix = tl.program_id(2).to(tl.int64)
    rows = row_tile * BLOCK + tl.arange(0, BLOCK)
    cols = col_tile * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, BLOCK_TOKENS)
    first = inputs + (matrix * tokens + part * part_tokens) * size
    left = first + lanes[None, :] * size + rows[:, None]
    right = first + lanes[:, None] * size + cols[None, :]
    remaining = tl.minimum(part_tokens, tokens - tl.program_id(1) * part_tokens)
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for done in range(0, remaining, BLOCK_TOKENS):
        here = done + lanes < remaining
        sums = tl.dot(
            tl.load(left, mask=(rows < size)[:, None] & here[None, :], other=0.0),
            tl.load(right, mask=here[:, None] & (cols < size)[None, :], other=0.0),
            sums,
            input_precision=PRECISION,
        )
        left += BLOCK_TOKENS * size
        right += BLOCK_TOKENS * size
    if parts is None:
        hessian += matrix * size * size
        _add(hessian, sums, row_tile, col_tile, size, BLOCK)
    else:
        parts += (matrix * tl.num_programs(1) + part) * size * size
        inside = (rows < size)[:, None] & (cols < size)[None, :]
        tl.store(parts + rows.to(tl.int64)[:, None] * size + cols[None, :], sums, mask=inside)


@triton.jit(do_not_specialize=["number"])
def add_parts_kernel(hessian, parts, size, number, BLOCK: tl.constexpr):
    """Add the parts' sums to a tile of the Hessian, the first part first.

    hessian: (matrices, size, size) float32
    parts:   (matrices, number, size, size) float32, read on and above the diagonal
    """
    row_tile, col_tile = _triangle(tl.program_id(0))
    matrix = tl.program_id(1).to(tl.int64)
    rows = row_tile * BLOCK + tl.arange(0, BLOCK)
    cols = col_tile * BLOCK + tl.arange(0, BLOCK)
    inside = (rows[:, None] <= cols[None, :]) & (cols < size)[None, :]
    part = parts + matrix * number * size * size
    part += rows.to(tl.int64)[:, None] * size + cols[None, :]
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(number):
        sums += tl.load(part, mask=inside, other=0.0)
        part += tl.cast(size, tl.int64) * size
    hessian += matrix * size * size
    _add(hessian, sums, row_tile, col_tile, size, BLOCK)


def accumulate_hessian_(hessian: Tensor, inputs: Tensor, precision: str) -> None:
    """Add inputsᵀ·inputs to the upper triangle; the lower one becomes its mirror image.

    hessian:   (matrices, cols, cols) float32, contiguous, changed
    inputs:    (matrices, tokens, cols) float32, float16 or bfloat16, contiguous
    precision: "ieee" or "tf32", of the products of float32 inputs; on AMD it is always "ieee"
    """
    matrices, tokens, size = inputs.shape
    if inputs.numel() == 0:
        return
    if inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu":
        # Triton's interpreter (3.7) multiplies the bits of bfloat16 as if they were integers.
        inputs = inputs.float()
    if torch.version.hip:
        precision = "ieee"  # few of AMD's GPUs have TF32
    config = options(inputs, _config(inputs, precision))
    tiles = triton.cdiv(size, config["BLOCK"])
    number, part_tokens = _cut(tokens, _entries(tiles) * matrices)
    parts = hessian.new_empty(matrices, number, size, size) if number > 1 else None
    grid = (_entries(triton.cdiv(tiles, GROUP.value)) * GROUP.value**2, number, matrices)
    with device_guard(hessian):
        product_kernel[grid](
            hessian,
            parts,
            inputs,
            size,
            tokens,
            part_tokens,
            PRECISION=precision,
            **config,
        )
        if number > 1:
            pairs = _entries(triton.cdiv(size, ADD["BLOCK"]))
            add_parts_kernel[pairs, matrices](hessian, parts, size, number, **ADD)


def _config(inputs: Tensor, precision: str) -> dict[str, int]:
    if inputs.shape[-1] % VECTOR or inputs.data_ptr() % VECTOR:
        return ODD
    if inputs.dtype != torch.float32:
        return HALVES
    return TF32 if precision == "tf32" else IEEE


def _entries(size: int) -> int:
    """Return how many entries of a square matrix are on or above the diagonal."""
    return size * (size + 1) // 2


def _cut(tokens: int, programs: int) -> tuple[int, int]:
    """Return into how many parts the tokens are cut for so many tiles, and a part's length."""
    number = max(min(ENOUGH_PROGRAMS // programs, tokens // PART_TOKENS), 1)
    part_tokens = triton.cdiv(tokens, number)
    return triton.cdiv(tokens, part_tokens), part_tokens


def compilations() -> list[Compilation]:
    """Describe the kernels of every dtype and precision, with one part of the tokens and more."""
    types = dict.fromkeys(("hessian", "parts"), "*fp32")
    types |= dict.fromkeys(("size", "tokens", "part_tokens", "number"), "i32")
    one_part: dict[str, Any] = {"parts": None}
    described = []
    for odd_sizes, (dtype, precision, even) in product(
        (False, True),
        (
            ("bf16", "ieee", HALVES),
            ("fp16", "ieee", HALVES),
            ("fp32", "tf32", TF32),
            ("fp32", "ieee", IEEE),
        ),
    ):
        types["inputs"] = f"*{dtype}"
        config: dict[str, Any] = {"odd_sizes": odd_sizes, **(ODD if odd_sizes else even)}
        for parts, unused in (("one part", one_part), ("parts", {})):
            variant = f"{dtype}, {precision}, {parts}"
            described.append(
                describe(product_kernel, variant, types, PRECISION=precision, **unused, **config)
            )
    config = dict(ADD)
    return described + [
        describe(add_parts_kernel, "fp32", types, odd_sizes=odd_sizes, **config)
        for odd_sizes in (False, True)
    ]
