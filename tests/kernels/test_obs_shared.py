import pytest
import torch

from fedspa_kernels import obs_prune, obs_prune_shared

OPERATORS = ("obs_prune_shared",)
ROWS = (24, 9, 9, 1)
COLS = 48
# Wider products add up float32 numbers in another order. The weights are of order 1, and a
# Hessian's condition number is some 1e3; halves are rounded in addition.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CHOICES = {
    "sparsity": {"sparsity": 0.6},
    "pattern": {"pattern": "2:4"},
    "two blocks": {"sparsity": 0.3, "block_size": 24},
    "blocks wider than the kernel's": {"sparsity": 0.5, "block_size": 136},
}


def problem(rows=ROWS, cols=COLS, dtype=torch.float32, seed=0):
    """Weights, and the Hessian of correlated inputs, of which number 7 is never active."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * cols, cols, generator=generator)
    inputs = inputs + 0.5 * inputs.roll(1, dims=1)
    inputs[:, 7] = 0
    weights = [torch.randn(n, cols, generator=generator).to(dtype) for n in rows]
    return weights, inputs.T @ inputs


def rows_on(place):
    """Fewer in Triton's interpreter, of tiles of 4 or 8 rows: in two tiles or more, and in one."""
    return (11, 5, 5, 1) if place.name == "cpu-triton" else ROWS


def moved(place, weights, hessian):
    return [weight.to(place.device) for weight in weights], hessian.to(place.device)


@pytest.mark.parametrize(
    ("choice", "cols", "dtype"),
    [
        ("sparsity", COLS, torch.float32),
        ("sparsity", COLS, torch.float16),
        ("pattern", COLS, torch.bfloat16),
        ("two blocks", COLS, torch.float32),
        ("blocks wider than the kernel's", 140, torch.float32),
    ],
)
def test_each_layer_is_pruned_as_if_it_were_alone(place, choice, cols, dtype):
    weights, hessian = moved(place, *problem(rows_on(place), cols, dtype))
    shared = obs_prune_shared(weights, hessian, **CHOICES[choice], backend=place.backend)
    for weight, ours in zip(weights, shared, strict=True):
        alone = obs_prune(weight, hessian, **CHOICES[choice], backend=place.backend)
        assert ours.weight.dtype == dtype and ours.mask.dtype == torch.bool
        assert ours.mask.sum() == alone.mask.sum()
        # A score within rounding of the threshold may fall on either side.
        same = ours.mask == alone.mask
        assert same.float().mean() > 0.99
        rows = same.all(dim=1)
        assert rows.float().mean() > 0.9 or len(rows) == 1
        error = (ours.weight[rows].float() - alone.weight[rows].float()).abs()
        assert rows.sum() == 0 or error.max() <= TOLERANCE[dtype]


def test_given_masks_are_kept_and_give_the_compensation_of_each_layer(place):
    weights, hessian = moved(place, *problem())
    masks = [weight > 0 for weight in weights]
    shared = obs_prune_shared(weights, hessian, masks=masks, backend=place.backend)
    for weight, mask, ours in zip(weights, masks, shared, strict=True):
        alone = obs_prune(weight, hessian, mask=mask, backend=place.backend)
        assert torch.equal(ours.mask, mask)
        assert (ours.weight - alone.weight).abs().max() <= TOLERANCE[torch.float32]
        torch.testing.assert_close(ours.loss, alone.loss, rtol=1e-3, atol=1e-3)


def test_one_layer_gives_the_bits_of_obs_prune(place):
    (weight, *_), hessian = moved(place, *problem())
    (ours,) = obs_prune_shared([weight], hessian, sparsity=0.5, backend=place.backend)
    alone = obs_prune(weight, hessian, sparsity=0.5, backend=place.backend)
    assert all(map(torch.equal, ours, alone))


def test_the_same_bits_twice_and_from_strided_inputs(place):
    weights, hessian = moved(place, *problem())
    first = obs_prune_shared(weights, hessian, sparsity=0.5, backend=place.backend)
    strided = [weight.T.contiguous().T for weight in weights]
    again = obs_prune_shared(strided, hessian, sparsity=0.5, backend=place.backend)
    for one, other in zip(first, again, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("rows", [(0, 3), (3, 0), (0, 0)])
def test_layers_without_rows_give_nothing(place, rows):
    weights, hessian = moved(place, *problem(rows=rows, cols=16))
    shared = obs_prune_shared(weights, hessian, sparsity=0.5, backend=place.backend)
    assert [ours.mask.shape for ours in shared] == [(n, 16) for n in rows]
    assert [int((~ours.mask).sum()) for ours in shared] == [n * 8 for n in rows]


def test_layers_without_columns_give_nothing(place):
    weights, hessian = moved(place, [torch.ones(3, 0), torch.ones(2, 0)], torch.ones(0, 0))
    shared = obs_prune_shared(weights, hessian, sparsity=0.5, backend=place.backend)
    assert [tuple(ours.loss.shape) for ours in shared] == [(3,), (2,)]


WEIGHT = torch.ones(2, 8)
EYE = torch.eye(8)
REFUSED = {
    "there are no weights": ([], EYE, {}),
    "weight 1 is \\(2, 4\\) and hessian \\(8, 8\\)": ([WEIGHT, WEIGHT[:, :4]], EYE, {}),
    "weight 1 is torch.float16 and weight 0 torch.float32": ([WEIGHT, WEIGHT.half()], EYE, {}),
    "2 weights and 1 masks": ([WEIGHT] * 2, EYE, {"masks": [WEIGHT > 0]}),
    "got sparsity and masks": ([WEIGHT], EYE, {"masks": [WEIGHT > 0], "sparsity": 0.5}),
    "not positive definite": ([WEIGHT], -EYE, {"sparsity": 0.5}),
    "weight 1 holds NaN": ([WEIGHT, WEIGHT * torch.nan], EYE, {"sparsity": 0.5}),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_pruned_is_refused_with_the_values(place, sentence):
    weights, hessian, options = REFUSED[sentence]
    weights, hessian = moved(place, weights, hessian)
    masks = options.get("masks")
    if masks is not None:
        options = options | {"masks": [mask.to(place.device) for mask in masks]}
    options = options or {"sparsity": 0.5}
    with pytest.raises(ValueError, match=sentence):
        obs_prune_shared(weights, hessian, **options, backend=place.backend)
