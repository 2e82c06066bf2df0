"""SparseGPT's update for layers that share their input, and so their hessian."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedspa_kernels import dispatch
from fedspa_kernels.obs import kernel, reference
from fedspa_kernels.obs.arguments import check_choice, check_shared
from fedspa_kernels.obs.values import check_finite
from fedspa_kernels.results import Pruned


def obs_prune_shared(
    weights: Sequence[Tensor],
    hessian: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    masks: Sequence[Tensor] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    backend: str | None = None,
) -> list[Pruned]:
    """Prune layers that share their input, such as q, k and v, or gate and up, by `obs_prune`.

    One factorisation serves all of them, and their rows are swept over together. Each has its own
    mask, with the counts that `obs_prune` gives it; up to the rounding of float sums the results
    are those of `obs_prune` on each.

    weights:  one or more (rows_i, cols), of one dtype: float32, float16, bfloat16; or float64
    hessian:  (cols, cols) float32, the sum of x·xᵀ (or float64 beside float64 weights)
    masks:    one (rows_i, cols) bool for each weight, True = kept
    returns:  a Pruned for each weight
    raises:   ValueError as `obs_prune`, and where the weights are none or differ in dtype

    The rest is as in `obs_prune`.
    """
    results = torch.ops.fedspa.obs_prune_shared(
        list(weights),
        hessian,
        sparsity=sparsity,
        pattern=pattern,
        masks=None if masks is None else list(masks),
        block_size=block_size,
        damping=damping,
        backend=backend,
    )
    return [Pruned(*of_one) for of_one in zip(*results, strict=True)]


Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def _body(
    weights: list[Tensor],
    hessian: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    masks: list[Tensor] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    backend: str | None = None,
) -> Lists:
    check_shared(weights, hessian, masks)
    choice = check_choice(
        "obs_prune_shared", hessian.shape[-1], sparsity, pattern, block_size, damping, masks=masks
    )
    return dispatch.run(
        "obs_prune_shared",
        hessian.device,
        backend,
        weights,
        hessian,
        sparsity,
        choice,
        masks,
        block_size,
        damping,
    )


def _reference(
    weights: list[Tensor],
    hessian: Tensor,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    masks: list[Tensor] | None,
    *rest: Any,
) -> Lists:
    results = [
        reference.obs_prune(
            weight, hessian, sparsity, pattern, None if masks is None else masks[index], *rest
        )
        for index, weight in enumerate(weights)
    ]
    for index, weight in enumerate(weights):
        check_finite(f"weight {index}", weight)
    pruned, kept, loss = (list(column) for column in zip(*results, strict=True))
    return pruned, kept, loss


def _fake(
    weights: list[Tensor],
    hessian: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    masks: list[Tensor] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    backend: str | None = None,
) -> Lists:
    check_shared(weights, hessian, masks)
    check_choice(
        "obs_prune_shared", hessian.shape[-1], sparsity, pattern, block_size, damping, masks=masks
    )
    exact = torch.promote_types(weights[0].dtype, torch.float32)
    return (
        [weight.new_empty(weight.shape) for weight in weights],
        [weight.new_empty(weight.shape, dtype=torch.bool) for weight in weights],
        [weight.new_empty(weight.shape[:-1], dtype=exact) for weight in weights],
    )


dispatch.define(
    "obs_prune_shared(Tensor[] weights, Tensor hessian, *, float? sparsity=None, "
    "str? pattern=None, Tensor[]? masks=None, int block_size=128, float damping=0.01, "
    "str? backend=None) -> (Tensor[], Tensor[], Tensor[])",
    _body,
    _fake,
)
dispatch.add("obs_prune_shared", "reference", _reference)
dispatch.add_kernels("obs_prune_shared", kernel.obs_prune_shared, "obs", kernel.refuses)
