"""Wanda: prune by |weight| times the norm of the input that it meets. No update of the rest."""

from typing import Any

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
from fedspa_kernels.results import Pruned
from fedspa_kernels.wanda import kernel, reference
from fedspa_kernels.wanda.values import check_norms, check_weight

GROUPS = ("row", "layer", "column")


def wanda_scores(weight: Tensor, norms: Tensor, *, backend: str | None = None) -> Tensor:
    """Wanda's scores: |W| times the norm of the input that it meets (Sun et al. 2024, eq. 1).

    weight:  (rows, cols) float32, float16 or bfloat16; or float64, the truth for tests
    norms:   (cols,) float32, the L2 norm of each input feature over the calibration tokens
    returns: (rows, cols) float32 (float64 for a float64 weight)
    raises:  ValueError where the shapes disagree or a norm is negative or not finite
    """
    return torch.ops.fedspa.wanda_scores(weight, norms, backend=backend)


def wanda_prune(
    weight: Tensor,
    norms: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    group: str = "row",
    backend: str | None = None,
) -> Pruned:
    """Set the smallest of Wanda's scores to zero: exactly int(n·sparsity) of each group of n.

    Among equal scores the lower index (row-major) goes first. A pattern "n:m" keeps the n largest
    of every m neighbours in a row instead. Magnitude pruning is this call with norms of ones.

    weight:  (rows, cols) float32, float16 or bfloat16; or float64, the truth for tests
    norms:   (cols,) float32, the L2 norm of each input feature over the calibration tokens
    group:   what competes: "row" (the paper's choice, and the only one with a pattern), "layer"
             or "column"
    returns: Pruned(weight, mask, loss): the weight's dtype and shape, bool True = kept, None
    raises:  ValueError where shapes, dtypes or devices disagree, a norm is negative or not finite,
             a score is NaN, or not exactly one of sparsity and pattern is given, in its range
    """
    pruned, mask = torch.ops.fedspa.wanda_prune(
        weight, norms, sparsity=sparsity, pattern=pattern, group=group, backend=backend
    )
    return Pruned(pruned, mask, None)


def _check(operator: str, weight: Tensor, norms: Tensor) -> None:
    check_floats(operator, weight=weight, norms=norms)
    check_devices(operator, weight=weight, norms=norms)
    if weight.dim() != 2 or norms.shape != weight.shape[1:]:
        raise ValueError(
            f"{operator}: weight is {tuple(weight.shape)} and norms are {tuple(norms.shape)}; "
            "pass (rows, cols) and (cols,)"
        )


def _check_choice(
    weight: Tensor, sparsity: float | None, pattern: str | None, group: str
) -> tuple[int, int] | None:
    check_one_of("wanda_prune", sparsity=sparsity, pattern=pattern)
    if group not in GROUPS:
        raise ValueError(f"wanda_prune: group is {group!r}; choose from {', '.join(GROUPS)}")
    if sparsity is not None:
        check_sparsity("wanda_prune", sparsity)
    if pattern is None:
        return None
    if group != "row":
        raise ValueError(
            f"wanda_prune: a pattern compares neighbours in a row, and group is {group!r}; "
            "leave the group at 'row'"
        )
    return parse_pattern("wanda_prune", pattern, weight.shape[1])


def _scores(weight: Tensor, norms: Tensor, *, backend: str | None = None) -> Tensor:
    _check("wanda_scores", weight, norms)
    return dispatch.run("wanda_scores", weight.device, backend, weight, norms)


def _fake_scores(weight: Tensor, norms: Tensor, *, backend: str | None = None) -> Tensor:
    _check("wanda_scores", weight, norms)
    return weight.new_empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))


def _prune(
    weight: Tensor,
    norms: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    group: str = "row",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check("wanda_prune", weight, norms)
    choice = _check_choice(weight, sparsity, pattern, group)
    return dispatch.run(
        "wanda_prune", weight.device, backend, weight, norms, sparsity, choice, group
    )


def _fake_prune(
    weight: Tensor,
    norms: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    group: str = "row",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check("wanda_prune", weight, norms)
    _check_choice(weight, sparsity, pattern, group)
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape, dtype=torch.bool)


def _reference_scores(weight: Tensor, norms: Tensor) -> Tensor:
    check_norms("wanda_scores", norms)
    return reference.wanda_scores(weight, norms)


def _reference_prune(weight: Tensor, norms: Tensor, *choice: Any) -> tuple[Tensor, Tensor]:
    check_norms("wanda_prune", norms)
    check_weight(weight)
    return reference.wanda_prune(weight, norms, *choice)


dispatch.define(
    "wanda_scores(Tensor weight, Tensor norms, *, str? backend=None) -> Tensor",
    _scores,
    _fake_scores,
)
dispatch.define(
    "wanda_prune(Tensor weight, Tensor norms, *, float? sparsity=None, str? pattern=None, "
    'str group="row", str? backend=None) -> (Tensor, Tensor)',
    _prune,
    _fake_prune,
)
dispatch.add("wanda_scores", "reference", _reference_scores)
dispatch.add("wanda_prune", "reference", _reference_prune)
dispatch.add_kernels("wanda_scores", kernel.wanda_scores, family="wanda")
dispatch.add_kernels("wanda_prune", kernel.wanda_prune, family="wanda")
