from fractions import Fraction

import pytest
import torch

from fedspa_kernels import wanda_prune, wanda_scores

OPERATORS = ("wanda_scores", "wanda_prune")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# One float32 product of exact inputs on both sides: no tolerance in any dtype.


def brute_force(weight, norms, sparsity, group):
    """Sort every group of |w|·norm, stably, and drop the first int(n·sparsity)."""
    scores = weight.float().abs() * norms
    rows, cols = weight.shape
    position = torch.arange(rows * cols).reshape(rows, cols)
    groups = {"row": position, "column": position.T, "layer": position.reshape(1, -1)}[group]
    kept = torch.ones(rows * cols, dtype=torch.bool)
    flat = scores.flatten().tolist()
    for members in groups.tolist():
        for index in sorted(members, key=lambda i: flat[i])[
            : int(len(members) * Fraction(str(sparsity)))
        ]:
            kept[index] = False
    return kept.reshape(rows, cols)


def test_scores_by_hand(place):
    scores = wanda_scores(
        torch.tensor([[1.0, -2.0], [0.5, -0.0]], device=place.device),
        torch.tensor([3.0, 0.25], device=place.device),
        backend=place.backend,
    )
    assert scores.tolist() == [[3.0, 0.5], [1.5, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_scores_are_float32_products(place, dtype):
    weight, norms = torch.randn(30, 20).to(dtype), torch.rand(20)
    scores = wanda_scores(weight.to(place.device), norms.to(place.device), backend=place.backend)
    assert scores.dtype == torch.float32
    assert torch.equal(scores.cpu(), weight.float().abs() * norms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", ("row", "layer", "column"))
@pytest.mark.parametrize("sparsity", (0.0, 0.1, 0.5, 0.67, 0.999))
def test_pruning_matches_a_sort_of_each_group(place, dtype, group, sparsity):
    torch.manual_seed(0)
    # Few distinct values, as in dequantised models: ties everywhere.
    weight, norms = (torch.randint(-4, 5, (23, 37)) / 4).to(dtype), torch.ones(37)
    weight, norms = weight.to(place.device), norms.to(place.device)
    pruned, mask, loss = wanda_prune(
        weight, norms, sparsity=sparsity, group=group, backend=place.backend
    )
    assert torch.equal(mask.cpu(), brute_force(weight.cpu(), norms.cpu(), sparsity, group))
    assert torch.equal(pruned, torch.where(mask, weight, 0)) and pruned.dtype == dtype
    assert loss is None and pruned.is_contiguous() and mask.is_contiguous()


@pytest.mark.parametrize("axis", (None, 0, 1))
def test_each_group_loses_exactly_its_count(place, axis):
    weight, norms = torch.randn(50, 64, device=place.device), torch.rand(64, device=place.device)
    group = {None: "layer", 0: "column", 1: "row"}[axis]
    mask = wanda_prune(weight, norms, sparsity=0.37, group=group, backend=place.backend).mask
    members = weight.numel() if axis is None else weight.shape[axis]
    gone = (~mask).sum() if axis is None else (~mask).sum(axis)
    assert gone.unique().tolist() == [int(members * 0.37)]


@pytest.mark.parametrize(("pattern", "keep", "of"), (("2:4", 2, 4), ("4:8", 4, 8), ("1:2", 1, 2)))
def test_a_pattern_keeps_the_largest_of_every_group(place, pattern, keep, of):
    weight, norms = torch.randn(9, 24), torch.rand(24)
    mask = wanda_prune(
        weight.to(place.device), norms.to(place.device), pattern=pattern, backend=place.backend
    ).mask.cpu()
    expected = torch.zeros(9 * 24 // of, of, dtype=torch.bool)
    best = (weight.abs() * norms).reshape(-1, of).topk(keep).indices
    assert torch.equal(mask, expected.scatter(1, best, True).reshape(9, 24))


def test_equal_scores_in_a_pattern_go_from_the_left(place):
    ones = torch.ones(2, 8, device=place.device)
    mask = wanda_prune(ones, ones[0], pattern="2:4", backend=place.backend).mask
    assert mask.tolist() == [[False, False, True, True] * 2] * 2


@pytest.mark.parametrize("shape", ((0, 8), (8, 0)))
@pytest.mark.parametrize("how", ({"sparsity": 0.5, "group": "column"}, {"pattern": "2:4"}))
def test_empty_weights_stay_empty(place, shape, how):
    weight = torch.zeros(shape, device=place.device)
    norms = torch.ones(shape[1], device=place.device)
    assert wanda_prune(weight, norms, **how, backend=place.backend).mask.shape == shape


@pytest.mark.parametrize("group", ("row", "layer", "column"))
def test_a_non_contiguous_weight_is_pruned_like_its_copy_and_not_changed(place, group):
    weight = torch.randn(60, 40, device=place.device)[::2].T
    norms = torch.rand(60, device=place.device)[::2]
    before = weight.clone()
    pruned = wanda_prune(weight, norms, sparsity=0.5, group=group, backend=place.backend)
    copied = wanda_prune(before, norms.clone(), sparsity=0.5, group=group, backend=place.backend)
    assert torch.equal(weight, before) and torch.equal(pruned.mask, copied.mask)
    assert torch.equal(pruned.weight, copied.weight) and pruned.weight.is_contiguous()


def test_zero_sparsity_returns_a_copy(place):
    weight = torch.randn(4, 4, device=place.device)
    pruned = wanda_prune(weight, weight[0].abs(), sparsity=0.0, backend=place.backend).weight
    assert torch.equal(pruned, weight) and pruned.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    (
        ({"norms": torch.ones(5)}, r"weight is \(2, 4\) and norms are \(5,\)"),
        ({"norms": torch.tensor([1.0, -1.0, 0.0, 0.0])}, r"norms\[1\] is -1.0"),
        ({"norms": torch.tensor([1.0, 1.0, torch.inf, 0.0])}, r"norms\[2\] is inf"),
        ({"weight": torch.full((2, 4), torch.nan)}, "weight holds NaN or infinity"),
        ({"weight": torch.ones(2, 4, dtype=torch.int32)}, "weight has dtype torch.int32"),
        ({"sparsity": 1.0}, r"sparsity is 1.0; pass a number in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"sparsity": None}, "got none; pass exactly one of sparsity, pattern"),
        ({"pattern": "2:4"}, "got sparsity and pattern"),
        ({"group": "block"}, "group is 'block'; choose from row, layer, column"),
        ({"sparsity": None, "pattern": "2:4", "group": "layer"}, "group is 'layer'; leave"),
        ({"sparsity": None, "pattern": "4:4"}, "'4:4' keeps 4 of 4"),
        ({"sparsity": None, "pattern": "0:4"}, "'0:4' keeps 0 of 4"),
        ({"sparsity": None, "pattern": "2:3"}, "'2:3' does not divide the width 4"),
        ({"sparsity": None, "pattern": "2/4"}, "pattern is '2/4'; write it as kept:group"),
        ({"sparsity": None, "pattern": " 2:4"}, "pattern is ' 2:4'"),
    ),
)
def test_bad_arguments_are_refused_with_their_values(place, changes, sentence):
    given = {"weight": torch.ones(2, 4), "norms": torch.ones(4), "sparsity": 0.5} | changes
    weight, norms = given.pop("weight").to(place.device), given.pop("norms").to(place.device)
    with pytest.raises(ValueError, match=f"^wanda_prune: .*{sentence}"):
        wanda_prune(weight, norms, **given, backend=place.backend)


def test_scores_refuse_a_negative_norm(place):
    weight = torch.ones(1, 2, device=place.device)
    with pytest.raises(ValueError, match=r"^wanda_scores: norms\[0\] is -1.0"):
        wanda_scores(weight, -weight[0], backend=place.backend)
