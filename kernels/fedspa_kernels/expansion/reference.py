"""Mask expansion in PyTorch: find the class of votes that the target cuts, and select inside it."""

import math

import torch
from torch import Tensor

from fedspa_kernels.counts import at_least, of_group
from fedspa_kernels.selection.reference import first_true, smallest_mask


def expand_mask(
    votes: Tensor,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    scores: Tensor | None,
    group: str,
) -> Tensor:
    """Lay the groups out as rows, and let the first of each row go."""
    rows, row_scores = _as_rows(votes, pattern, group), None
    if scores is not None:
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        row_scores = _as_rows(scores, pattern, group)
    _, count = of_group(rows.shape[1], sparsity, pattern, at_least)
    kept = ~_fewest_voted(rows, row_scores, count)
    if pattern is None and group == "column":
        return kept.view(votes.mT.shape).mT.contiguous()
    return kept.view(votes.shape)


def _as_rows(tensor: Tensor, pattern: tuple[int, int] | None, group: str) -> Tensor:
    if pattern is not None:
        return tensor.reshape(-1, pattern[1]).contiguous()
    if group == "layer":
        return tensor.reshape(1, -1).contiguous()
    # Not -1 beside the length: without any entries it could not be inferred.
    tensor = tensor.mT if group == "column" else tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]).contiguous()


def _fewest_voted(votes: Tensor, scores: Tensor | None, count: int) -> Tensor:
    """Mark the `count` first of each row by (votes, score, index), and every 0 (groups, n)."""
    if count == 0 or votes.numel() == 0:
        return votes == 0
    boundary = _kth_votes(votes, count)
    below, tied = votes < boundary, votes == boundary
    room = count - below.sum(-1, keepdim=True)
    return below | _first_of(tied, scores, room) | (votes == 0)


def _kth_votes(votes: Tensor, k: int) -> Tensor:
    """Return the k-th smallest votes of each row, (groups, 1); one long row takes a histogram."""
    if len(votes) == 1 and votes.max() < votes.numel():
        up_to = votes[0].bincount().cumsum(0)
        return (up_to < k).sum().view(1, 1)
    return votes.kthvalue(k, dim=-1, keepdim=True).values


def _first_of(tied: Tensor, scores: Tensor | None, room: Tensor) -> Tensor:
    """Mark the `room` (groups, 1) smallest scores among the tied of each row (groups, n)."""
    if scores is None:
        return first_true(tied, room)
    if len(tied) == 1:
        return tied.masked_scatter(tied, smallest_mask(scores[tied].unsqueeze(0), int(room)))
    # Each row takes another number of its own: one sort of the values serves them all. What is not
    # tied may share the threshold at infinity, so `tied` is asked again.
    among = scores.masked_fill(~tied, math.inf)
    threshold = among.sort(dim=-1).values.gather(1, room - 1)
    smaller, equal = tied & (among < threshold), tied & (among == threshold)
    return smaller | first_true(equal, room - smaller.sum(-1, keepdim=True))
