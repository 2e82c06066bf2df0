"""Bit masks and compressed weights in PyTorch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


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


def compress(
    weight: Tensor, mask: Tensor, pack: Callable[[Tensor], Tensor] = pack_mask
) -> tuple[Tensor, Tensor]:
    """Return the mask as bits, and the kept values in row-major order."""
    return pack(mask), weight[mask]


def decompress(
    bits: Tensor,
    values: Tensor,
    shape: Sequence[int],
    unpack: Callable[[Tensor, int], Tensor] = unpack_mask,
) -> Tensor:
    """Put the values where the bits are set; raise ValueError where the two counts disagree."""
    mask = unpack(bits, shape[-1])
    kept = int(mask.count_nonzero())
    if kept != len(values):
        raise ValueError(
            f"decompress: the bits keep {kept} weights and there are {len(values)} values; "
            "pass the bits and values of one compress call"
        )
    return values.new_zeros(shape).masked_scatter_(mask, values)
