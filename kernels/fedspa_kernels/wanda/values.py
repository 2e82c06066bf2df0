"""The values that Wanda refuses."""

from torch import Tensor


def check_norms(operator: str, norms: Tensor) -> None:
    """Raise ValueError where a norm is negative or not finite."""
    wrong = ~(norms.isfinite() & (norms >= 0))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"{operator}: norms[{at}] is {float(norms[at])}; pass finite norms >= 0, "
            "the square roots of sums of squares"
        )


def check_weight(weight: Tensor) -> None:
    """Raise ValueError where a weight is not finite: infinity times a norm of 0 has no order."""
    if not weight.isfinite().all():
        raise ValueError("wanda_prune: weight holds NaN or infinity; load it again")
