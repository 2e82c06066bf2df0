"""FedSpaLLM's mask expansion: from the clients' votes to a mask of exactly the target sparsity."""

import torch
from torch import Tensor

from fedspa_kernels import dispatch
from fedspa_kernels.arguments import (
    check_devices,
    check_floats,
    check_one_of,
    check_sparsity,
    parse_pattern,
)
from fedspa_kernels.expansion import kernel, reference
from fedspa_kernels.expansion.values import check_scores, check_votes

GROUPS = ("layer", "row", "column")
VOTES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def expand_mask(
    votes: Tensor,
    clients: int,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    scores: Tensor | None = None,
    group: str = "layer",
    backend: str | None = None,
) -> Tensor:
    """Prune what nobody kept, then the fewest-voted, up to the target (Bai et al. 2025, FedSpaLLM).

    The order is votes, then score, then index (row-major), the lowest first; the
    max(entries without a vote, ceil(n·sparsity)) first of each group of n go. What nobody kept
    always goes, so nothing is ever un-pruned. With a pattern "n:m" the m - n first of every m
    neighbours along the last axis go, and what nobody kept.

    votes:   (...,) integer, how many clients kept each weight
    clients: how many there were; no vote is larger
    scores:  (...,) floating, such as |averaged weight|; None: equal votes go by index alone
    group:   "layer" (all of the tensor), "row" (along the last axis) or "column" (along the
             one before); a pattern is itself a group along the last axis, leave it at "layer"
    returns: (...,) bool, True = kept
    raises:  ValueError where shapes, dtypes or devices disagree, a vote is not in 0..clients, a
             score is NaN, or not exactly one of sparsity and pattern is given, in its range
    """
    return torch.ops.fedspa.expand_mask(
        votes,
        clients,
        sparsity=sparsity,
        pattern=pattern,
        scores=scores,
        group=group,
        backend=backend,
    )


def _check_tensors(votes: Tensor, clients: int, scores: Tensor | None) -> None:
    check_devices("expand_mask", votes=votes, scores=scores)
    if votes.dtype not in VOTES:
        raise ValueError(f"expand_mask: votes have dtype {votes.dtype}; pass integers")
    if clients < 1:
        raise ValueError(f"expand_mask: clients is {clients}; pass at least 1")
    if scores is None:
        return
    check_floats("expand_mask", scores=scores)
    if scores.shape != votes.shape:
        raise ValueError(
            f"expand_mask: votes are {tuple(votes.shape)} and scores {tuple(scores.shape)}; "
            "pass one shape"
        )


def _check_choice(
    shape: torch.Size, sparsity: float | None, pattern: str | None, group: str
) -> tuple[int, int] | None:
    check_one_of("expand_mask", sparsity=sparsity, pattern=pattern)
    if group not in GROUPS:
        raise ValueError(f"expand_mask: group is {group!r}; choose from {', '.join(GROUPS)}")
    axes = 1 if pattern is not None else GROUPS.index(group)
    if len(shape) < axes:
        raise ValueError(
            f"expand_mask: votes of shape {tuple(shape)} have no {group if axes > 1 else 'row'}; "
            f"pass at least {axes} axes"
        )
    if sparsity is not None:
        check_sparsity("expand_mask", sparsity)
    if pattern is None:
        return None
    if group != "layer":
        raise ValueError(
            f"expand_mask: a pattern is a group of its own, and group is {group!r}; "
            "leave the group at 'layer'"
        )
    return parse_pattern("expand_mask", pattern, shape[-1])


def _body(
    votes: Tensor,
    clients: int,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    scores: Tensor | None = None,
    group: str = "layer",
    backend: str | None = None,
) -> Tensor:
    _check_tensors(votes, clients, scores)
    choice = _check_choice(votes.shape, sparsity, pattern, group)
    return dispatch.run(
        "expand_mask", votes.device, backend, votes, clients, sparsity, choice, scores, group
    )


def _reference(
    votes: Tensor,
    clients: int,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    scores: Tensor | None,
    group: str,
) -> Tensor:
    check_votes(votes, clients)
    check_scores(scores)
    return reference.expand_mask(votes, sparsity, pattern, scores, group)


def _fake(
    votes: Tensor,
    clients: int,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    scores: Tensor | None = None,
    group: str = "layer",
    backend: str | None = None,
) -> Tensor:
    _check_tensors(votes, clients, scores)
    _check_choice(votes.shape, sparsity, pattern, group)
    return votes.new_empty(votes.shape, dtype=torch.bool)


dispatch.define(
    "expand_mask(Tensor votes, SymInt clients, *, float? sparsity=None, str? pattern=None, "
    'Tensor? scores=None, str group="layer", str? backend=None) -> Tensor',
    _body,
    _fake,
)
dispatch.add("expand_mask", "reference", _reference)
dispatch.add_kernels("expand_mask", kernel.expand_mask, "expansion", kernel.refuses)
