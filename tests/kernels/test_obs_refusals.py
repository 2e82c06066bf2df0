"""Hessians that have no factor are refused in a sentence; unusual ones that have are not."""

import pytest
import torch

from fedspa_kernels import obs_prune

OPERATORS = ("obs_prune",)


def gram(*shape, seed=0):
    inputs = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return inputs.mT @ inputs


@pytest.mark.parametrize("cols", [1, 2, 4, 40, 129])
def test_an_infinite_diagonal_is_refused(place, cols):
    hessian = gram(2 * cols + 4, cols).to(place.device)
    hessian[0, 0] = torch.inf
    weight = torch.ones(4, cols, device=place.device)
    with pytest.raises(ValueError, match="hessian holds NaN or infinity"):
        obs_prune(weight, hessian, sparsity=0.5, backend=place.backend)


@pytest.mark.parametrize("cols", [4, 40])
def test_a_damping_that_overflows_is_refused(place, cols):
    hessian = gram(2 * cols + 4, cols)
    hessian = (hessian * (3e38 / hessian.max())).to(place.device)
    assert hessian.isfinite().all()
    weight = torch.ones(4, cols, device=place.device)
    with pytest.raises(ValueError, match="damping 0.01 times the mean .* is beyond torch.float32"):
        obs_prune(weight, hessian, sparsity=0.5, backend=place.backend)


def test_every_singular_hessian_is_refused_with_its_damping(place):
    weight = torch.ones(5, 40, device=place.device)
    for seed in range(20):
        hessian = gram(21, 40, seed=seed).to(place.device)
        with pytest.raises(ValueError, match="not positive definite after damping 0.0"):
            obs_prune(weight, hessian, sparsity=0.5, damping=0.0, backend=place.backend)


@pytest.mark.parametrize("cols", [4, 40])
def test_stacked_hessians_may_be_permuted(place, cols):
    hessians = gram(3, 2 * cols + 4, cols).to(place.device)
    permuted = hessians.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    weight = torch.randn(3, 5, cols).to(place.device)
    plain = obs_prune(weight, hessians, sparsity=0.5, backend=place.backend)
    ours = obs_prune(weight, permuted, sparsity=0.5, backend=place.backend)
    assert torch.equal(ours.weight, plain.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(place, dtype):
    weight, hessian = torch.ones(3, 4, device=place.device), gram(9, 4).to(place.device)
    plain = obs_prune(weight, hessian, sparsity=0.5, backend=place.backend)
    torch.set_default_dtype(dtype)
    try:
        ours = obs_prune(weight, hessian, sparsity=0.5, backend=place.backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(ours.weight, plain.weight)
