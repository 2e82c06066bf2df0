"""The values that SparseGPT's update refuses."""

from torch import Tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError where a weight or a hessian is not finite."""
    if not tensor.isfinite().all():
        raise ValueError(
            f"obs_prune: {name} holds NaN or infinity; look for an overflow where it was made"
        )
