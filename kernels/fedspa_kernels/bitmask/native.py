"""Launchers of the compiled operators (cpu.cpp)."""

import torch
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """Pack eight mask entries into a byte."""
    return torch.ops.fedspa_native.pack_mask(mask.contiguous())


def unpack_mask(bits: Tensor, n: int) -> Tensor:
    """Unpack eight mask entries from each byte, n of them wanted."""
    return torch.ops.fedspa_native.unpack_mask(bits.contiguous(), n)
