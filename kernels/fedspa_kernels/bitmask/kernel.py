"""What the kernels of this family compute, and how the operators call them.

Everything is two-dimensional and contiguous, n > 0. A segment is a run of SEGMENT entries of a row
(the last one of a row may be shorter), so that one row is shared by many workers; `offsets` say
where each segment's values begin.

pack_mask(mask (rows, n)) -> bits (rows, ceil(n/8)) uint8, spare bits 0
unpack_mask(bits, n) -> mask (rows, n) bool
count_kept(bits, n, segment) -> (rows·ceil(n/segment),) int64, the set bits of every segment
compress_values(weight (rows, n), bits, offsets, kept, segment) -> values (kept,)
decompress_values(bits, values, offsets, n, segment) -> weight (rows, n), 0 where no bit is set
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fedspa_kernels.bitmask.values import check_count, check_kept
from fedspa_kernels.checks import refuse

# A whole number of bytes, and small enough that a few stay on chip with their values.
SEGMENT = 8192


def pack_mask(kernels: Any, mask: Tensor) -> Tensor:
    """Pack, as rows."""
    *leading, n = mask.shape
    width = (n + 7) // 8
    if not mask.numel():
        return mask.new_empty((*leading, width)).byte()
    return kernels.pack_mask(_as_rows(mask, n)).view(*leading, width)


def unpack_mask(kernels: Any, bits: Tensor, n: int) -> Tensor:
    """Unpack, as rows."""
    shape = (*bits.shape[:-1], n)
    if not math.prod(shape):
        return bits.new_empty(shape).bool()
    return kernels.unpack_mask(_as_rows(bits, bits.shape[-1]), n).view(shape)


def compress(kernels: Any, weight: Tensor, mask: Tensor, kept: int | None) -> tuple[Tensor, Tensor]:
    """Pack the mask, count it, and gather the values to where the counts send them."""
    bits = pack_mask(kernels, mask)
    if not weight.numel():
        check_kept(0, kept)
        return bits, weight.new_empty(0)
    row_bits, n = rows_of(bits, weight.shape)
    offsets, ends = segment_offsets(kernels, row_bits, n)
    if kept is None:
        kept = int(ends)
    else:
        row_bits = bits_to_trust(row_bits, ends != kept, partial(_explain_kept, ends, kept))
    values = kernels.compress_values(_as_rows(weight, n), row_bits, offsets, kept, SEGMENT)
    return bits, values


def decompress(kernels: Any, bits: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Count the bits, and scatter the values from where the counts say they are."""
    if not math.prod(shape):
        check_count("decompress", 0, values)
        return values.new_empty(shape)
    row_bits, n = rows_of(bits, shape)
    offsets, ends = segment_offsets(kernels, row_bits, n)
    explain = partial(_explain_count, ends, values)
    row_bits = bits_to_trust(row_bits, ends != len(values), explain)
    weight = kernels.decompress_values(row_bits, values.contiguous(), offsets, n, SEGMENT)
    return weight.view(*shape)


def rows_of(bits: Tensor, shape: Sequence[int]) -> tuple[Tensor, int]:
    """Return the bits as (rows, ceil(n/8)), and n; one long row where no bit is spare."""
    n = math.prod(shape) if shape[-1] % 8 == 0 else shape[-1]
    return _as_rows(bits, (n + 7) // 8), n


def segment_offsets(kernels: Any, row_bits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return where the values of each segment begin, (segments,) int64, and where the last ends."""
    counts = kernels.count_kept(row_bits, n, SEGMENT)
    ends = counts.cumsum(0)
    return ends - counts, ends[-1]


def bits_to_trust(row_bits: Tensor, wrong: Tensor, explain: Callable[[], None]) -> Tensor:
    """Refuse bits that are not as many as their values, () bool; what is refused later is emptied.

    The kernels move a value for each bit: with more bits than values, beyond the values' end.
    """
    return row_bits if refuse(wrong, explain) else row_bits.masked_fill(wrong, 0)


def _explain_count(ends: Tensor, values: Tensor) -> None:
    check_count("decompress", int(ends), values)


def _explain_kept(ends: Tensor, kept: int) -> None:
    check_kept(int(ends), kept)


def _as_rows(tensor: Tensor, n: int) -> Tensor:
    return tensor.contiguous().view(-1, n)
