"""The values that a selection refuses."""

from torch import Tensor


def check_scores(scores: Tensor) -> None:
    """Raise ValueError where a score is NaN."""
    if scores.isnan().any():
        raise ValueError("smallest_mask: scores hold NaN, which has no order; replace it first")
