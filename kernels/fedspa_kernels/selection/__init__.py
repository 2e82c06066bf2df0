"""The order statistic that every pruner here stands on: exactly the k smallest of a row."""

import torch
from torch import Tensor

from fedspa_kernels import dispatch
from fedspa_kernels.arguments import check_floats
from fedspa_kernels.selection import kernel, reference
from fedspa_kernels.selection.values import check_scores


def smallest_mask(scores: Tensor, k: int, *, backend: str | None = None) -> Tensor:
    """Mark exactly the k smallest scores of each row; among equal scores the lower index wins.

    scores:  (groups, n) float32, float16, bfloat16 or float64; infinities allowed, -0.0 equals 0.0
    k:       0 <= k <= n
    returns: (groups, n) bool, with k times True in every row
    raises:  ValueError where scores are not two-dimensional or hold NaN, or k is out of range
    """
    return torch.ops.fedspa.smallest_mask(scores, k, backend=backend)


def _check(scores: Tensor, k: int) -> None:
    check_floats("smallest_mask", scores=scores)
    if scores.dim() != 2:
        raise ValueError(
            f"smallest_mask: scores have shape {tuple(scores.shape)}; pass (groups, n)"
        )
    if not 0 <= k <= scores.shape[1]:
        raise ValueError(f"smallest_mask: k is {k} in rows of {scores.shape[1]}; pass 0 <= k <= n")


def _body(scores: Tensor, k: int, *, backend: str | None = None) -> Tensor:
    _check(scores, k)
    return dispatch.run("smallest_mask", scores.device, backend, scores, k)


def _reference(scores: Tensor, k: int) -> Tensor:
    check_scores(scores)
    return reference.smallest_mask(scores, k)


def _fake(scores: Tensor, k: int, *, backend: str | None = None) -> Tensor:
    _check(scores, k)
    return scores.new_empty(scores.shape, dtype=torch.bool)


dispatch.define(
    "smallest_mask(Tensor scores, SymInt k, *, str? backend=None) -> Tensor", _body, _fake
)
dispatch.add("smallest_mask", "reference", _reference)
dispatch.add_kernels("smallest_mask", kernel.smallest_mask, family="selection")
