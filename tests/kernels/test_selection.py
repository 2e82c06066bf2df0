import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspa_kernels import smallest_mask

OPERATORS = ("smallest_mask",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Values that a selection by bits, by comparison or by sorting could each order differently.
AWKWARD = (0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1.0, -1.0, 2.0, math.inf, -math.inf)


def smallest_by_sorting(row, k):
    """Python's sort is stable and holds -0.0 == 0.0: ties go to the lower index."""
    chosen = set(sorted(range(len(row)), key=lambda i: row[i])[:k])
    return [i in chosen for i in range(len(row))]


def check(scores, k, place):
    mask = smallest_mask(scores.to(place.device), k, backend=place.backend)
    assert mask.dtype == torch.bool and mask.is_contiguous()
    assert mask.tolist() == [smallest_by_sorting(row, k) for row in scores.tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", (0, 1, 17, 49, 50))
def test_few_distinct_values_tie_to_the_lower_index(place, dtype, k):
    torch.manual_seed(k)
    check(torch.randint(-3, 4, (20, 50)).to(dtype), k, place)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_awkward_values_match_a_stable_sort(place, data):
    n = data.draw(st.integers(1, 12))
    rows = data.draw(
        st.lists(st.lists(st.sampled_from(AWKWARD), min_size=n, max_size=n), min_size=1, max_size=4)
    )
    check(torch.tensor(rows), data.draw(st.integers(0, n)), place)


@pytest.mark.parametrize("shape", ((0, 5), (3, 0), (0, 0)))
def test_empty_scores_give_an_empty_mask(place, shape):
    mask = smallest_mask(torch.zeros(shape, device=place.device), 0, backend=place.backend)
    assert mask.shape == shape and mask.dtype == torch.bool


def test_a_non_contiguous_view_is_selected_like_its_copy(place):
    scores = torch.randn(40, 30, device=place.device)[::2, ::3].T
    expected = smallest_mask(scores.contiguous(), 7, backend=place.backend)
    assert torch.equal(smallest_mask(scores, 7, backend=place.backend), expected)


def test_many_rows_of_four(place):
    check(torch.randint(0, 3, (5000, 4)).float(), 2, place)


def test_a_large_row_keeps_the_exact_count(place):
    scores = torch.randint(0, 100, (1, 300_000), device=place.device).float()
    assert int(smallest_mask(scores, 123_457, backend=place.backend).sum()) == 123_457


@pytest.mark.parametrize(
    ("scores", "k", "sentence"),
    (
        (torch.zeros(3), 1, r"scores have shape \(3,\); pass \(groups, n\)"),
        (torch.zeros(2, 3), 4, "k is 4 in rows of 3; pass 0 <= k <= n"),
        (torch.zeros(2, 3), -1, "k is -1 in rows of 3"),
        (torch.zeros(2, 3, dtype=torch.int32), 1, "dtype torch.int32; pass float32"),
        (torch.tensor([[1.0, math.nan]]), 1, "scores hold NaN"),
    ),
)
def test_what_cannot_be_selected_is_refused(place, scores, k, sentence):
    with pytest.raises(ValueError, match=f"^smallest_mask: .*{sentence}"):
        smallest_mask(scores.to(place.device), k, backend=place.backend)
