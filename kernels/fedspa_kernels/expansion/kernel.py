"""What the kernel of this family computes, and how the operator calls it.

expand_mask(votes, scores, clients, of, count) -> (mask, invalid)
    votes:   (...,) int32, contiguous
    scores:  (...,) float32, float16 or bfloat16, contiguous; None: equal votes go by index alone
    of:      a group is a run of so many entries; in the order (votes, score, index) the first
             count of each go, and whatever has no vote
    mask:    (...,) bool, True = kept
    invalid: (1,) int32, not 0 where a vote is not in 0..clients or a score is NaN; the mask is
             then nothing
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedspa_kernels.checks import refuse
from fedspa_kernels.counts import at_least, of_group
from fedspa_kernels.dispatch import takes_no_float64
from fedspa_kernels.expansion.values import check_scores, check_votes, outside

MOST_CLIENTS = 2**31 - 1


def refuses(votes: Tensor, clients: int, *rest: Any) -> str:
    """Why the kernels, which count in int32, do not take a call, or ""."""
    if clients > MOST_CLIENTS:
        return f"its kernels count up to {MOST_CLIENTS} clients, and there are {clients}"
    return takes_no_float64(votes, *rest)


def expand_mask(
    kernels: Any,
    votes: Tensor,
    clients: int,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    scores: Tensor | None,
    group: str,
) -> Tensor:
    """Lay the groups out as runs of entries, expand, and refuse what the kernel found wrong.

    Columns become rows by transposed copies, and votes of another dtype become int32 in one.
    """
    of_columns = group == "column"
    entries = (votes.mT if of_columns else votes).contiguous()
    if votes.dtype == torch.int64 and votes.numel():
        # int32 would wrap, and the kernel not see it.
        refuse(outside(votes, clients), partial(check_votes, votes, clients))
    if scores is not None:
        scores = (scores.mT if of_columns else scores).contiguous()
    entries_of_group = entries.numel() if group == "layer" else entries.shape[-1]
    of, count = of_group(entries_of_group, sparsity, pattern, at_least)
    mask, invalid = kernels.expand_mask(entries.to(torch.int32), scores, clients, of, count)
    refuse(invalid, partial(_explain, votes, clients, scores))
    return mask.mT.contiguous() if of_columns else mask


def _explain(votes: Tensor, clients: int, scores: Tensor | None) -> None:
    check_votes(votes, clients)
    check_scores(scores)
