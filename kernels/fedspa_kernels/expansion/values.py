"""The values that the mask expansion refuses."""

from torch import Tensor


def outside(votes: Tensor, clients: int) -> Tensor:
    """Return whether any of the votes, at least one, is not in 0..clients: () bool."""
    least, most = votes.aminmax()
    return (least < 0) | (most > clients)


def check_votes(votes: Tensor, clients: int) -> None:
    """Raise ValueError where a vote is not in 0..clients."""
    if not votes.numel():
        return
    least, most = (int(vote) for vote in votes.aminmax())
    if least < 0 or most > clients:
        raise ValueError(
            f"expand_mask: votes go from {least} to {most} with {clients} clients; "
            "pass counts of the clients that kept a weight"
        )


def check_scores(scores: Tensor | None) -> None:
    """Raise ValueError where a score is NaN."""
    if scores is not None and scores.isnan().any():
        raise ValueError("expand_mask: scores hold NaN, which has no order; replace it first")
