"""FedSpaLLM's aggregation as one would write it in PyTorch: first as it comes, then at its best."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def l0_mean_stacked(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Average over the clients that kept a weight, from one tensor that holds them all.

    weights: C tensors of one shape; masks: C likewise, bool, True = kept
    returns: the average in the weights' dtype, 0 where nobody kept it, and the votes int64
    """
    stacked, kept = torch.stack(tuple(weights)).float(), torch.stack(tuple(masks))
    votes = kept.sum(0)
    average = (stacked * kept).sum(0) / votes.clamp(min=1)
    return average.to(weights[0].dtype), votes


@torch.no_grad()
def l0_mean_streamed(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same, one client after the other into running sums; the votes are int32."""
    total = torch.zeros_like(weights[0], dtype=torch.float32)
    votes = torch.zeros_like(total, dtype=torch.int32)
    for weight, mask in zip(weights, masks, strict=True):
        total.addcmul_(weight, mask)
        votes += mask
    return total.div_(votes.clamp(min=1)).to(weights[0].dtype), votes


@torch.no_grad()
def expand_argsort(
    votes: Tensor,
    scores: Tensor,
    clients: int,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
) -> Tensor:
    """Prune the fewest-voted up to the target, equal votes by score, from a sort of everything.

    votes:   any shape, integer, how many of the clients kept each weight
    scores:  likewise, floating and not negative
    pattern: (n, m) lets the m - n first of every m neighbours along the last axis go instead
    returns: bool, True = kept
    """
    order = _keys(votes, scores, pattern).argsort(dim=-1, stable=True)
    return _without(order[:, : _count(votes, sparsity, pattern)], votes)


@torch.no_grad()
def expand_topk(
    votes: Tensor,
    scores: Tensor,
    clients: int,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
) -> Tensor:
    """The same from a selection, which need not put in order what it selects."""
    count = _count(votes, sparsity, pattern)
    keys = _keys(votes, scores, pattern)
    return _without(keys.topk(count, largest=False, sorted=False).indices, votes)


def _keys(votes: Tensor, scores: Tensor, pattern: tuple[int, int] | None) -> Tensor:
    """Votes and, below them, scores in one int64 that orders as the pair does; a group a row."""
    keys = (votes.long() << 32) | scores.float().view(torch.int32)
    return keys.view(1, -1) if pattern is None else keys.view(-1, pattern[1])


def _count(votes: Tensor, sparsity: float | None, pattern: tuple[int, int] | None) -> int:
    """How many of a group go at least; with a sparsity, what nobody kept goes in any case."""
    if pattern is not None:
        return pattern[1] - pattern[0]
    assert sparsity is not None
    return max(math.ceil(votes.numel() * sparsity), int((votes == 0).sum()))


def _without(goes: Tensor, votes: Tensor) -> Tensor:
    """The mask of the votes' shape that lacks those indices of each group, and what nobody kept."""
    kept = (votes != 0).view(len(goes), -1)
    return kept.scatter_(1, goes, False).view(votes.shape)
