import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspa_kernels import expand_mask, l0_average

OPERATORS = ("expand_mask",)


def brute_force(votes, scores, count_of, group):
    """Sort each group by (votes, score, index) and prune the first ones, and all without a vote."""
    position = torch.arange(votes.numel()).reshape(votes.shape)
    groups = {
        "layer": position.reshape(1, -1),
        "row": position.reshape(-1, position.shape[-1]),
        "column": position.mT.reshape(-1, position.shape[-2]) if position.dim() > 1 else None,
    }
    members = groups[group] if isinstance(group, str) else position.reshape(-1, group)
    flat, values = votes.flatten().tolist(), scores.flatten().tolist()
    kept = [vote > 0 for vote in flat]
    for group_members in members.tolist():
        order = sorted(group_members, key=lambda i: (flat[i], values[i]))
        for i in order[: count_of(len(group_members))]:
            kept[i] = False
    return torch.tensor(kept, dtype=torch.bool).reshape(votes.shape)


def call(place, votes, clients, scores=None, **how):
    scores = None if scores is None else scores.to(place.device)
    mask = expand_mask(votes.to(place.device), clients, scores=scores, **how, backend=place.backend)
    assert mask.dtype == torch.bool and mask.is_contiguous()
    return mask.cpu()


def test_by_hand_with_ties_by_index(place):
    votes = torch.tensor([3, 1, 2, 1, 0, 1, 3, 2])
    mask = call(place, votes, 3, sparsity=0.3)  # ceil(2.4) = 3: the 0, then the first two 1s
    assert mask.tolist() == [True, False, True, False, False, True, True, True]


def test_by_hand_with_ties_by_score(place):
    votes = torch.tensor([3, 1, 2, 1, 0, 1, 3, 2])
    scores = torch.tensor([0.0, 0.5, 0.0, 0.4, 9.0, 0.4, 0.0, 0.0])
    mask = call(place, votes, 3, scores, sparsity=0.3)
    assert mask.tolist() == [True, True, True, False, False, False, True, True]


def test_what_nobody_kept_goes_even_beyond_the_target(place):
    votes = torch.tensor([0, 0, 0, 1])
    assert call(place, votes, 1, sparsity=0.0).tolist() == [False, False, False, True]
    assert call(place, votes, 1, sparsity=0.5).tolist() == [False, False, False, True]


@pytest.mark.parametrize("group", ("layer", "row", "column"))
@pytest.mark.parametrize("sparsity", (0.0, 0.2, 0.5, 0.83, 0.999))
@pytest.mark.parametrize("clients", (1, 3, 300))
@pytest.mark.parametrize("scored", ("none", "distinct", "tied", "infinite"))
def test_matches_a_sort_of_each_group(place, group, sparsity, clients, scored):
    generator = torch.Generator().manual_seed(clients)
    votes = torch.randint(0, clients + 1, (17, 24), generator=generator, dtype=torch.int32)
    scores = {
        "none": None,
        "distinct": torch.randn(votes.shape, generator=generator),
        "tied": torch.randint(0, 3, votes.shape, generator=generator).half(),
        "infinite": torch.randint(0, 2, votes.shape, generator=generator) * math.inf,
    }[scored]
    if scored == "infinite":
        scores = scores.nan_to_num(nan=-math.inf, posinf=math.inf)
    expected = brute_force(
        votes,
        torch.zeros(votes.shape) if scores is None else scores,
        lambda n: math.ceil(n * Fraction(str(sparsity))),
        group,
    )
    assert torch.equal(
        call(place, votes, clients, scores, sparsity=sparsity, group=group), expected
    )


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_random_small_groups_match_a_sort(place, data):
    rows, cols = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    entries = st.lists(st.integers(0, 3), min_size=rows * cols, max_size=rows * cols)
    votes = torch.tensor(data.draw(entries)).view(rows, cols)
    scores = torch.tensor(data.draw(entries)).view(rows, cols).float()
    sparsity = data.draw(st.floats(0, 1, exclude_max=True))
    group = data.draw(st.sampled_from(("layer", "row", "column")))
    expected = brute_force(votes, scores, lambda n: math.ceil(n * Fraction(str(sparsity))), group)
    assert torch.equal(call(place, votes, 3, scores, sparsity=sparsity, group=group), expected)


@pytest.mark.parametrize("group", ("layer", "row", "column"))
def test_each_group_meets_its_target_exactly(place, group):
    votes = torch.randint(0, 5, (40, 30), generator=torch.Generator().manual_seed(0))
    mask = call(place, votes, 4, sparsity=0.6, group=group)
    axis = {"layer": (0, 1), "row": 1, "column": 0}[group]
    size = {"layer": 1200, "row": 30, "column": 40}[group]
    expected = (votes == 0).sum(axis).clamp(min=math.ceil(size * 0.6))
    assert torch.equal((~mask).sum(axis), expected)


def test_a_batch_of_matrices_has_groups_in_each(place):
    votes = torch.randint(0, 5, (2, 3, 8, 6), generator=torch.Generator().manual_seed(0))
    for group in ("row", "column"):
        mask = call(place, votes, 4, sparsity=0.5, group=group)
        for i in range(2):
            for j in range(3):
                alone = call(place, votes[i, j], 4, sparsity=0.5, group=group)
                assert torch.equal(mask[i, j], alone)


@pytest.mark.parametrize(("pattern", "keep", "of"), (("2:4", 2, 4), ("4:8", 4, 8), ("1:2", 1, 2)))
@pytest.mark.parametrize("scored", (False, True))
def test_a_pattern_keeps_the_most_voted_of_every_group(place, pattern, keep, of, scored):
    generator = torch.Generator().manual_seed(of)
    votes = torch.randint(0, 4, (15, 32), generator=generator)
    scores = torch.randint(0, 3, votes.shape, generator=generator).float() * scored
    expected = brute_force(votes, scores, lambda n: of - keep, of)
    mask = call(place, votes, 3, scores if scored else None, pattern=pattern)
    assert torch.equal(mask, expected)
    assert (mask.reshape(-1, of).sum(1) <= keep).all()


def test_never_un_prunes_what_averaging_left_out(place):
    weights = [torch.randn(20, 20) * (torch.rand(20, 20) < 0.3) for _ in range(3)]
    average = l0_average(weights)
    for sparsity in (0.1, 0.5, 0.9):
        mask = call(place, average.votes, 3, average.weight.abs(), sparsity=sparsity)
        assert not (mask & (average.weight == 0)).any()


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
def test_votes_of_any_integer_dtype_mean_the_same(place, dtype):
    votes = torch.randint(0, 5, (12, 12), generator=torch.Generator().manual_seed(0))
    for group in ("layer", "row"):
        expected = call(place, votes, 4, sparsity=0.5, group=group)
        assert torch.equal(call(place, votes.to(dtype), 4, sparsity=0.5, group=group), expected)


def test_a_non_contiguous_view_is_expanded_like_its_copy(place):
    votes = torch.randint(0, 5, (24, 40)).T[::2]
    scores = torch.rand(24, 40).T[::2]
    for how in (*({"sparsity": 0.5, "group": g} for g in ("layer", "row", "column")),
                {"pattern": "2:4"}):  # fmt: skip
        expected = call(place, votes.contiguous(), 4, scores.contiguous(), **how)
        assert torch.equal(call(place, votes, 4, scores, **how), expected)


@pytest.mark.parametrize("shape", ((0, 8), (8, 0), (0, 0)))
def test_empty_votes_stay_empty(place, shape):
    votes = torch.zeros(shape, dtype=torch.int32)
    for group in ("layer", "row", "column"):
        for scores in (None, torch.zeros(shape)):
            mask = call(place, votes, 2, scores, sparsity=0.5, group=group)
            assert mask.shape == shape
    assert call(place, votes, 2, pattern="2:4").shape == shape


def test_a_zero_dimensional_vote_is_a_layer_of_one(place):
    assert not call(place, torch.tensor(1), 1, sparsity=0.5)
    assert call(place, torch.tensor(1), 1, sparsity=0.0)


VOTES = torch.tensor([[1, 2, 0, 2], [2, 2, 1, 1]])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    (
        ({"clients": 1}, "votes go from 0 to 2 with 1 clients"),
        ({"votes": VOTES - 1}, "votes go from -1 to 1 with 2 clients"),
        ({"clients": 0}, "clients is 0; pass at least 1"),
        ({"votes": VOTES.float()}, "votes have dtype torch.float32; pass integers"),
        ({"votes": VOTES.bool()}, "votes have dtype torch.bool"),
        ({"scores": torch.ones(2, 3)}, r"votes are \(2, 4\) and scores \(2, 3\)"),
        ({"scores": torch.full((2, 4), math.nan)}, "scores hold NaN"),
        ({"scores": VOTES}, "scores has dtype torch.int64"),
        ({"sparsity": None}, "got none; pass exactly one of sparsity, pattern"),
        ({"pattern": "2:4"}, "got sparsity and pattern"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"group": "block"}, "group is 'block'; choose from layer, row, column"),
        ({"sparsity": None, "pattern": "2:4", "group": "row"}, "leave the group at 'layer'"),
        ({"sparsity": None, "pattern": "2:3"}, "'2:3' does not divide the width 4"),
        ({"votes": VOTES[0], "group": "column"}, r"votes of shape \(4,\) have no column"),
    ),
)
def test_bad_arguments_are_refused_with_their_values(place, changes, sentence):
    given = {"votes": VOTES, "clients": 2, "sparsity": 0.5} | changes
    with pytest.raises(ValueError, match=f"^expand_mask: .*{sentence}"):
        call(place, **given)
