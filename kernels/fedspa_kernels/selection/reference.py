"""Selection in PyTorch: the k-th smallest value, and a count of its ties. Never a sort."""

import torch
from torch import Tensor


def smallest_mask(scores: Tensor, k: int) -> Tensor:
    """Mark what is below the k-th smallest value, and of its ties the first ones that fit."""
    if k == 0 or scores.numel() == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    # PyTorch orders halves like the float32 they convert to, which more devices can select from.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).contiguous()
    threshold = scores.kthvalue(k, dim=-1, keepdim=True).values
    below, tied = scores < threshold, scores == threshold
    return below | first_true(tied, k - below.sum(-1, keepdim=True))


def first_true(mask: Tensor, count: Tensor) -> Tensor:
    """Keep the first `count` True of each row: (groups, n) bool, (groups, 1) integer."""
    return mask & (mask.cumsum(-1) <= count)
