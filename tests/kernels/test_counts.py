import pytest
import torch

from fedspa_kernels import expand_mask, obs_prune, wanda_prune


# In binary floating point 0.55 * 100 is more than 55, and 0.29 * 100 less than 29.
@pytest.mark.parametrize("percent", [7, 29, 55, 57, 58])
def test_a_percentage_of_a_hundred_is_that_many(percent):
    votes, sparsity = torch.ones(10, 10, dtype=torch.int32), percent / 100
    weight, scores = torch.rand(1, 100) + 1, torch.rand(10, 10)
    assert int((~expand_mask(votes, 1, sparsity=sparsity, scores=scores)).sum()) == percent
    assert int((~wanda_prune(weight, torch.ones(100), sparsity=sparsity).mask).sum()) == percent
    pruned = obs_prune(weight, torch.eye(100), sparsity=sparsity, block_size=100)
    assert int((~pruned.mask).sum()) == percent


@pytest.mark.parametrize(("rows", "down", "up"), [(3, 1, 2), (10, 6, 6), (7, 4, 5)])
def test_local_pruning_rounds_down_and_the_expansion_up(rows, down, up):
    weight = torch.rand(1, rows) + 1
    assert int((~wanda_prune(weight, torch.ones(rows), sparsity=0.6).mask).sum()) == down
    votes = torch.ones(1, rows, dtype=torch.int32)
    assert int((~expand_mask(votes, 1, sparsity=0.6)).sum()) == up
