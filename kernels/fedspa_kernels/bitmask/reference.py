"""Bit masks and compressed weights in PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedspa_kernels.bitmask.values import check_count, check_kept


def pack_mask(mask: Tensor) -> Tensor:
    """Byte b of a row is Σ_i 2^i · mask[8b + i]."""
    *leading, n = mask.shape
    eights = pad(mask, (0, -n % 8)).view(torch.uint8).view(*leading, -(-n // 8), 8)
    packed = eights[..., 0].clone(memory_format=torch.contiguous_format)
    for i in range(1, 8):
        packed |= eights[..., i] << i
    return packed


def unpack_mask(bits: Tensor, n: int) -> Tensor:
    """Entry 8b + i of a row is bit i of byte b."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    entries = (bits.unsqueeze(-1) >> shifts) & 1
    return entries.view(torch.bool).flatten(-2)[..., :n].contiguous()


def compress(weight: Tensor, mask: Tensor, kept: int | None) -> tuple[Tensor, Tensor]:
    """Return the mask as bits, and the kept values in row-major order."""
    values = weight[mask]
    check_kept(len(values), kept)
    return pack_mask(mask), values


def decompress(bits: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Put the values where the bits are set; raise ValueError where the two counts disagree."""
    mask = unpack_mask(bits, shape[-1])
    check_count("decompress", int(mask.count_nonzero()), values)
    return values.new_zeros(shape).masked_scatter_(mask, values)
