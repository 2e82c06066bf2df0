"""Groups of more than a warp, a block and a tile, full of ties: parts that must agree on a cut."""

import os

import pytest
import torch

from fedspa_kernels import (
    compress,
    expand_mask,
    l0_average,
    l0_average_compressed,
    smallest_mask,
    wanda_prune,
)

OPERATORS = ("smallest_mask", "wanda_prune", "expand_mask", "l0_average", "compress")
# CUDA takes a warp, blocks of 256, 512 and 1024 threads, and many blocks.
LENGTHS = (1000, 3001, 16000, 40000, 70001)
if os.environ.get("TRITON_INTERPRET") == "1":
    # Triton has three ways, for up to 8192 and 65,536 entries and for more, and is slow here.
    LENGTHS = (1000, 3001, 16000, 70001)


def few_values(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-3, 4, shape, generator=generator)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_a_cut_through_ties(place, n, dtype):
    scores = few_values(2, n).to(dtype)
    for k in (1, n // 3, n - 5):
        expected = smallest_mask(scores, k, backend="reference")
        ours = smallest_mask(scores.to(place.device), k, backend=place.backend)
        assert torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_a_cut_through_tied_products(place, n, dtype):
    weight, norms = few_values(2, n).to(dtype), few_values(n).float().abs()
    expected = wanda_prune(weight, norms, sparsity=0.55, backend="reference")
    moved = weight.to(place.device), norms.to(place.device)
    ours = wanda_prune(*moved, sparsity=0.55, backend=place.backend)
    assert torch.equal(ours.mask.cpu(), expected.mask)
    assert torch.equal(ours.weight.cpu(), expected.weight)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("scored", (False, True))
def test_a_cut_through_tied_votes(place, n, scored):
    votes = few_values(n).abs().int()
    how = {"scores": few_values(n).float()} if scored else {}
    expected = expand_mask(votes, 3, sparsity=0.6, **how, backend="reference")
    how = {name: value.to(place.device) for name, value in how.items()}
    ours = expand_mask(votes.to(place.device), 3, sparsity=0.6, **how, backend=place.backend)
    assert torch.equal(ours.cpu(), expected)


def test_compressed_clients_that_differ_in_every_word(place):
    masks = [few_values(3, 10_001 + client)[:, client:] > client for client in range(3)]
    weights = [few_values(3, 10_001) * mask for mask in masks]
    weights = [weight.float().to(place.device) for weight in weights]
    masks = [mask.contiguous().to(place.device) for mask in masks]
    expected = l0_average(weights, masks, backend="reference")
    packed = [compress(weight, mask) for weight, mask in zip(weights, masks, strict=True)]
    ours = l0_average_compressed(packed, weights[0].shape, backend=place.backend)
    assert torch.equal(ours.weight, expected.weight) and torch.equal(ours.votes, expected.votes)
