"""Wanda in PyTorch."""

import torch
from torch import Tensor

from fedspa_kernels.counts import at_most
from fedspa_kernels.selection.reference import smallest_mask


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """|w|·norm, in float32 (float64 for a float64 weight)."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(exact).abs() * norms.to(exact)).contiguous()


def wanda_prune(
    weight: Tensor,
    norms: Tensor,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Lay the groups out as rows of scores, and let the smallest of each row go."""
    scores = wanda_scores(weight, norms)
    if pattern is not None:
        keep, of = pattern
        pruned = smallest_mask(scores.reshape(-1, of), of - keep).reshape(weight.shape)
    elif group == "column":
        pruned = _smallest_share(scores.T, sparsity).T
    elif group == "layer":
        pruned = _smallest_share(scores.reshape(1, -1), sparsity).reshape(weight.shape)
    else:
        pruned = _smallest_share(scores, sparsity)
    return weight.masked_fill(pruned, 0).contiguous(), ~pruned.contiguous()


def _smallest_share(scores: Tensor, sparsity: float | None) -> Tensor:
    assert sparsity is not None, "the door lets no call without a sparsity or a pattern through"
    return smallest_mask(scores, at_most(scores.shape[1], sparsity))
