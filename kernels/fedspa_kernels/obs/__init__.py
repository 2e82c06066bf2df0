"""SparseGPT: prune a weight matrix, and let the weights that stay make up for it."""

from typing import Any

import torch
from torch import Tensor

from fedspa_kernels import dispatch
from fedspa_kernels.obs import kernel, reference
from fedspa_kernels.obs.arguments import check_choice, check_tensors
from fedspa_kernels.obs.shared import obs_prune_shared
from fedspa_kernels.obs.values import check_finite
from fedspa_kernels.results import Pruned

__all__ = ["obs_prune", "obs_prune_shared"]


def obs_prune(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    mask: Tensor | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    backend: str | None = None,
) -> Pruned:
    """Prune by SparseGPT's OBS update (Frantar & Alistarh 2023, algorithm 1), from one Cholesky.

    H~ = hessian + damping·mean(its non-zero diagonal)·I = L·Lᵀ with L upper triangular. Then
    R = L⁻¹ is SparseGPT's factor, H~⁻¹ = Rᵀ·R, and w²/R_kk² its score. Column by column, what goes
    is spread over the columns to the right: w_j -= w_k/R_kk·R_kj. Of each block of B columns
    exactly the int(rows·B·sparsity) smallest scores go (the last block may be narrower), the lower
    index of the row-major block first among equals; with a pattern "n:m" all but the n largest of
    every m neighbours go, chosen when the sweep reaches them. A column whose hessian diagonal is 0
    (no input ever reached it) has its weights set to 0 first; they count, and they go first.

    weight:     (..., rows, cols) float32, float16 or bfloat16; or float64, the truth for tests
    hessian:    (..., cols, cols) float32, the sum of x·xᵀ (or float64 beside a float64 weight);
                only its upper triangle is read
    sparsity:   in [0, 1)
    pattern:    "n:m", keep n of every m along cols; m divides cols and block_size
    mask:       (..., rows, cols) bool, True = kept: a given support, only the update runs
    block_size: columns whose scores compete
    damping:    >= 0
    returns:    Pruned(weight, mask, loss): the weight's dtype; bool; and loss (..., rows) float32
                = diag((W-Ŵ)·H~·(W-Ŵ)ᵀ), with Ŵ before it is rounded to the weight's dtype
    raises:     ValueError where shapes, dtypes or devices disagree, a value is not finite, not
                exactly one of sparsity, pattern and mask is given, or the hessian is empty or not
                positive definite after damping
    """
    return Pruned(
        *torch.ops.fedspa.obs_prune(
            weight,
            hessian,
            sparsity=sparsity,
            pattern=pattern,
            mask=mask,
            block_size=block_size,
            damping=damping,
            backend=backend,
        )
    )


def _body(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    mask: Tensor | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_tensors(weight, hessian, mask)
    choice = check_choice(
        "obs_prune", weight.shape[-1], sparsity, pattern, block_size, damping, mask=mask
    )
    return dispatch.run(
        "obs_prune",
        weight.device,
        backend,
        weight,
        hessian,
        sparsity,
        choice,
        mask,
        block_size,
        damping,
    )


def _reference(weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    results = reference.obs_prune(weight, *rest)
    check_finite("weight", weight)  # after the hessian, as a kernel finds it
    return results


def _fake(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    mask: Tensor | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_tensors(weight, hessian, mask)
    check_choice("obs_prune", weight.shape[-1], sparsity, pattern, block_size, damping, mask=mask)
    return (
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape, dtype=torch.bool),
        weight.new_empty(weight.shape[:-1], dtype=torch.promote_types(weight.dtype, torch.float32)),
    )


dispatch.define(
    "obs_prune(Tensor weight, Tensor hessian, *, float? sparsity=None, str? pattern=None, "
    "Tensor? mask=None, int block_size=128, float damping=0.01, str? backend=None)"
    " -> (Tensor, Tensor, Tensor)",
    _body,
    _fake,
)
dispatch.add("obs_prune", "reference", _reference)
dispatch.add_kernels("obs_prune", kernel.obs_prune, "obs", kernel.refuses)
