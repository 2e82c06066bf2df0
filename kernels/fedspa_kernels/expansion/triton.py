"""Mask expansion in Triton: one selection by votes, then scores, then index."""

from torch import Tensor

from fedspa_kernels.launch import Compilation
from fedspa_kernels.selection.triton import select
from fedspa_kernels.selection.triton_describe import describe_selection
from fedspa_kernels.selection.triton_keys import Entries


def expand_mask(
    votes: Tensor, scores: Tensor | None, clients: int, of: int, count: int
) -> tuple[Tensor, Tensor]:
    """Let the `count` first of each run of `of` entries go, and everything without a vote.

    votes:   (...) int32, contiguous
    scores:  (...) float32, float16 or bfloat16, contiguous, or None
    returns: (...) bool True = kept, and `invalid` (1,) int32, not 0 where a vote is not in
             0..clients or a score is NaN
    """
    entries = Entries(scores, votes=votes, clients=clients)
    mask, invalid = select(entries, of, count, kept=True)
    return mask.view(votes.shape), invalid


def compilations() -> list[Compilation]:
    """Describe the kernels of votes alone, and with float32 scores; others differ in loads."""
    return [
        *describe_selection("votes", votes="*i32", kept=True, common=False),
        *describe_selection("votes, fp32", votes="*i32", values="*fp32", kept=True),
    ]
