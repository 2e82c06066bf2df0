"""ℓ0 averaging in PyTorch, one client after the other."""

import torch
from torch import Tensor


def l0_average(weights: list[Tensor], masks: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return Σ m·w / Σ m and Σ m."""
    shape, dtype, device = weights[0].shape, weights[0].dtype, weights[0].device
    total = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
    votes = torch.zeros(shape, dtype=torch.int32, device=device)
    for client, weight in enumerate(weights):
        add_client_(total, votes, weight, None if masks is None else masks[client])
    return divide(total, votes).to(dtype), votes


def add_client_(
    total: Tensor, votes: Tensor, weight: Tensor, mask: Tensor | None, importance: float = 1.0
) -> None:
    """Add a client: Σ importance·m·w and Σ m."""
    if mask is None:
        mask = weight != 0
    else:
        # Not a product with the mask: what a client did not keep may be NaN.
        weight = weight.masked_fill(~mask, 0)
    total.add_(weight, alpha=importance)
    votes.add_(mask)


def divide(total: Tensor, kept: Tensor) -> Tensor:
    """Return total / kept, 0 where nobody kept anything."""
    return torch.where(kept > 0, total / kept, 0)
