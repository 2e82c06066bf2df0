"""What the doors of this family check before anything runs."""

import torch
from torch import Tensor

from fedspa_kernels.arguments import (
    check_devices,
    check_floats,
    check_mask,
    check_not_negative,
    check_one_of,
    check_sparsity,
    parse_pattern,
)


def check_tensors(weight: Tensor, hessian: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError where dtypes, devices or shapes of one stack and its hessians disagree."""
    _check_types("obs_prune", weight, hessian, mask)
    size = weight.shape[-1:]
    if weight.dim() < 2 or hessian.shape != weight.shape[:-2] + size + size:
        raise ValueError(
            f"obs_prune: weight is {tuple(weight.shape)} and hessian {tuple(hessian.shape)}; "
            "pass (..., rows, cols) and (..., cols, cols)"
        )


def check_shared(weights: list[Tensor], hessian: Tensor, masks: list[Tensor] | None) -> None:
    """Raise ValueError where layers cannot share a hessian."""
    name = "obs_prune_shared"
    if not weights:
        raise ValueError(f"{name}: there are no weights; pass at least one")
    if masks is not None and len(masks) != len(weights):
        raise ValueError(
            f"{name}: {len(weights)} weights and {len(masks)} masks; pass one for each"
        )
    for index, weight in enumerate(weights):
        _check_types(name, weight, hessian, None if masks is None else masks[index])
        if weight.dim() != 2 or hessian.shape != weight.shape[1:] * 2:
            raise ValueError(
                f"{name}: weight {index} is {tuple(weight.shape)} and hessian "
                f"{tuple(hessian.shape)}; pass (rows, cols) each, and (cols, cols)"
            )
        if weight.dtype != weights[0].dtype:
            raise ValueError(
                f"{name}: weight {index} is {weight.dtype} and weight 0 {weights[0].dtype}; "
                "pass one dtype"
            )


def _check_types(name: str, weight: Tensor, hessian: Tensor, mask: Tensor | None) -> None:
    check_floats(name, weight=weight)
    check_devices(name, weight=weight, hessian=hessian, mask=mask)
    if hessian.dtype != torch.float32 and (hessian.dtype, weight.dtype) != (torch.float64,) * 2:
        raise ValueError(
            f"{name}: hessian is {hessian.dtype} and weight {weight.dtype}; "
            "pass a float32 hessian, or both in float64"
        )
    if mask is not None:
        check_mask(name, mask, weight.shape)


def check_choice(
    name: str,
    width: int,
    sparsity: float | None,
    pattern: str | None,
    block_size: int,
    damping: float,
    **support: object,
) -> tuple[int, int] | None:
    """Return (n, m) of a pattern, None without; raise ValueError where the choice has no sense.

    support: the given mask or masks, by the name that the door gives them
    """
    check_one_of(name, sparsity=sparsity, pattern=pattern, **support)
    check_not_negative(name, "damping", damping)
    if block_size < 1:
        raise ValueError(f"{name}: block_size is {block_size}; pass at least 1")
    if sparsity is not None:
        check_sparsity(name, sparsity)
    if pattern is None:
        return None
    keep, of = parse_pattern(name, pattern, width)
    if block_size % of:
        raise ValueError(
            f"{name}: block_size {block_size} cuts groups of pattern {pattern!r}; "
            f"pass a multiple of {of}"
        )
    return keep, of
