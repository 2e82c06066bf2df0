"""ℓ0 averaging in PyTorch, one client after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedspa_kernels.bitmask import reference as bitmask
from fedspa_kernels.bitmask.values import check_count


def l0_average(weights: list[Tensor], masks: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return Σ m·w / Σ m and Σ m."""
    shape, dtype, device = weights[0].shape, weights[0].dtype, weights[0].device
    total = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
    votes = torch.zeros(shape, dtype=torch.int32, device=device)
    for client, weight in enumerate(weights):
        l0_add_(total, votes, None, weight, None if masks is None else masks[client], 1.0)
    return divide(total, votes).to(dtype), votes


def l0_average_compressed(
    bits: list[Tensor], values: list[Tensor], shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return what `l0_average` of the decompressed clients returns, one of them at a time."""
    dtype, device = values[0].dtype, values[0].device
    total = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
    votes = torch.zeros(shape, dtype=torch.int32, device=device)
    for client, (client_bits, client_values) in enumerate(zip(bits, values, strict=True)):
        mask = bitmask.unpack_mask(client_bits, shape[-1])
        kept = int(mask.count_nonzero())
        check_count("l0_average_compressed", kept, client_values, f" of client {client}")
        weight = client_values.new_zeros(shape).masked_scatter_(mask, client_values)
        l0_add_(total, votes, None, weight, mask, 1.0)
    return divide(total, votes).to(dtype), votes


def l0_add_(
    total: Tensor,
    votes: Tensor,
    kept: Tensor | None,
    weight: Tensor,
    mask: Tensor | None,
    importance: float,
) -> None:
    """Add a client: Σ importance·m·w, Σ m and, if it is wanted, Σ importance·m."""
    if mask is None:
        mask = weight != 0
    else:
        # Not a product with the mask: what a client did not keep may be NaN.
        weight = weight.masked_fill(~mask, 0)
    total.add_(weight, alpha=importance)
    votes.add_(mask)
    if kept is not None:
        kept.add_(mask, alpha=importance)


def divide(total: Tensor, kept: Tensor) -> Tensor:
    """Return total / kept, 0 where nobody kept anything."""
    return torch.where(kept > 0, total / kept, 0)
