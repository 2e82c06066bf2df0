from fractions import Fraction

import pytest
import torch

from fedspa_kernels import obs_prune, wanda_prune

OPERATORS = ("obs_prune",)
# float64 against SparseGPT's three factorisations of matrices with a condition number of some 1e4:
# 1e-16 · 1e4 and a few sums.
EXACT = 1e-10
# float32 sums over 200 columns behind a Cholesky of that condition number; the halves add the
# rounding of the result to 11 or 8 bits. The weights are of order 1.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def rows_on(place, rows):
    """Fewer in Triton's interpreter, which takes a hundred times as long as a kernel.

    It has 4 or 8 rows in a tile: 11 are two tiles or three, and the last one is cut short.
    """
    return min(rows, 11) if place.name == "cpu-triton" else rows


def problem(rows, cols, dead=(), seed=0):
    """A float64 weight, and the Hessian of correlated inputs; `dead` inputs are never active."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator, dtype=torch.float64) / cols**0.5
    inputs = torch.randn(3 * cols, cols, generator=generator, dtype=torch.float64)
    inputs = inputs @ (mix + torch.eye(cols, dtype=torch.float64))
    inputs[:, list(dead)] = 0
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    return weight, inputs.T @ inputs


def sparsegpt(
    weight, hessian, sparsity=None, pattern=None, mask=None, block_size=128, damping=0.01
):
    """Frantar & Alistarh's algorithm 1: three factorisations, right-looking, column by column."""
    w, h = weight.clone(), hessian.clone()
    rows, cols = w.shape
    dead = h.diagonal() == 0
    damp = damping * h.diagonal()[~dead].mean()
    h[dead, dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(damp)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    kept = torch.ones_like(w, dtype=torch.bool) if mask is None else mask.clone()
    for i in range(0, cols, block_size):
        j = min(i + block_size, cols)
        if sparsity is not None:
            scores = (w[:, i:j] ** 2 / upper.diagonal()[i:j] ** 2).flatten()
            order = scores.sort(stable=True).indices[
                : int(rows * (j - i) * Fraction(str(sparsity)))
            ]
            block = torch.ones_like(scores, dtype=torch.bool)
            block[order] = False
            kept[:, i:j] = block.view(rows, j - i)
        errors = torch.zeros(rows, j - i, dtype=w.dtype)
        for k in range(i, j):
            if pattern is not None and k % pattern[1] == 0:
                group = slice(k, k + pattern[1])
                scores = w[:, group] ** 2 / upper.diagonal()[group] ** 2
                order = scores.sort(dim=1, stable=True).indices[:, : pattern[1] - pattern[0]]
                kept[:, group] = torch.ones_like(scores, dtype=torch.bool).scatter(1, order, False)
            final = torch.where(kept[:, k], w[:, k], 0)
            errors[:, k - i] = (w[:, k] - final) / upper[k, k]
            w[:, k:j] -= errors[:, k - i, None] * upper[k, k:j]
            w[:, k] = final
        w[:, j:] -= errors @ upper[i:j, j:]
    return w, kept


def call(place, weight, hessian, **how):
    how = {k: v.to(place.device) if isinstance(v, torch.Tensor) else v for k, v in how.items()}
    pruned = obs_prune(
        weight.to(place.device), hessian.to(place.device), **how, backend=place.backend
    )
    return [tensor.cpu() for tensor in pruned]


@pytest.fixture
def one_thread():
    """Hundreds of steps on rows of 24 are waiting, not work, on more threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def exact_place(place):
    """Backends other than the reference do not compute in float64; conftest leaves them out."""
    return place


@pytest.mark.parametrize(
    ("block_size", "dead"),
    ((128, ()), (128, (0, 7, 130, 199)), (40, (8,)), (8, ()), (512, (0,))),
    ids=str,
)
@pytest.mark.parametrize("how", (0.0, 0.3, 0.6, 0.95, (2, 4), (4, 8), (1, 4), "mask"), ids=str)
def test_equals_sparsegpts_recurrence(exact_place, one_thread, how, block_size, dead):
    weight, hessian = problem(24, 200, dead)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    if how == "mask":
        ours, theirs = {"mask": mask}, {"mask": mask}
    elif isinstance(how, tuple):
        ours, theirs = {"pattern": f"{how[0]}:{how[1]}"}, {"pattern": how}
    else:
        ours, theirs = {"sparsity": how}, {"sparsity": how}
    expected, kept = sparsegpt(weight, hessian, **theirs, block_size=block_size)
    pruned, mask, _ = call(exact_place, weight, hessian, **ours, block_size=block_size)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(pruned, expected, atol=EXACT, rtol=0)


@pytest.mark.parametrize("damping", (0.0, 1e-4, 0.1))
@pytest.mark.parametrize("dead", ((), (3, 150)), ids=("live", "dead"))
@pytest.mark.parametrize("how", ({"sparsity": 0.6}, {"pattern": "2:4"}), ids=str)
def test_loss_is_the_quadratic_form_of_the_change(exact_place, how, dead, damping):
    weight, hessian = problem(10, 200, dead)
    pruned, _, loss = call(exact_place, weight, hessian, **how, damping=damping)
    diagonal = hessian.diagonal()
    damped = hessian + damping * diagonal[diagonal != 0].mean() * torch.eye(
        200, dtype=torch.float64
    )
    change = weight - pruned
    expected = (change @ damped * change).sum(1)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", ((64, 200), (200, 64), (1, 130), (33, 1)), ids=str)
def test_working_precisions_on_a_given_support_match_float64(place, dtype, shape):
    """On a given support, since rounding may swap two weights of nearly one score."""
    weight, hessian = problem(rows_on(place, shape[0]), shape[1])
    hessian, weight = hessian.float(), weight.to(dtype)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    expected, _, loss = obs_prune(weight.double(), hessian.double(), mask=mask, backend="reference")
    pruned, kept, lost = call(place, weight, hessian, mask=mask)
    assert pruned.dtype == dtype and lost.dtype == torch.float32 and torch.equal(kept, mask)
    tolerance = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(pruned.double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(lost.double(), loss, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_working_precisions_choose_nearly_the_support_of_float64(place, dtype):
    weight, hessian = problem(rows_on(place, 64), 200)
    weight, hessian = weight.to(dtype), hessian.float()
    expected = obs_prune(weight.double(), hessian.double(), sparsity=0.6, backend="reference")
    pruned, mask, loss = call(place, weight, hessian, sparsity=0.6)
    # A float32 score is off by 1e-6 or so: of 12,800 it swaps at most a handful.
    assert (mask != expected.mask).sum() <= mask.numel() // 1000
    torch.testing.assert_close(loss.double().sum(), expected.loss.sum(), rtol=1e-3, atol=0)
    assert not pruned[~mask].any()


@pytest.mark.parametrize(
    ("block_size", "sparsity"),
    ((128, 0.0), (128, 0.501), (64, 0.3), (17, 0.99), (150, 0.3), (200, 0.501), (9, 0.5)),
)
def test_each_block_loses_exactly_its_count(place, sparsity, block_size):
    weight, hessian = problem(rows_on(place, 30), 200)
    mask = call(place, weight.float(), hessian.float(), sparsity=sparsity, block_size=block_size)[1]
    for block in mask.split(block_size, dim=1):
        assert int((~block).sum()) == int(block.numel() * Fraction(str(sparsity)))


@pytest.mark.parametrize(("pattern", "keep", "of"), (("2:4", 2, 4), ("4:8", 4, 8), ("3:5", 3, 5)))
def test_every_group_of_a_pattern_keeps_its_count(place, pattern, keep, of):
    weight, hessian = problem(rows_on(place, 30), 200)
    mask = call(place, weight.float(), hessian.float(), pattern=pattern, block_size=40)[1]
    assert (mask.reshape(-1, of).sum(1) == keep).all()


def test_with_uncorrelated_inputs_it_is_magnitude_pruning_without_update(place):
    weight = torch.randint(-5, 6, (16, 64)).float()  # ties everywhere
    pruned, mask, loss = call(
        place, weight, torch.eye(64), sparsity=0.5, block_size=64, damping=0.0
    )
    expected = wanda_prune(weight, torch.ones(64), sparsity=0.5, group="layer")
    assert torch.equal(mask, expected.mask) and torch.equal(pruned, expected.weight)
    assert torch.equal(loss, (weight - expected.weight).square().sum(1))


def test_dead_columns_are_zeroed_and_go_first(place):
    weight, hessian = problem(8, 40, dead=(2, 30))
    pruned, mask, _ = call(place, weight.float(), hessian.float(), sparsity=0.1)
    assert not pruned[:, [2, 30]].any() and not mask[:, [2, 30]].any()
    assert int((~mask).sum()) == int(8 * 40 * 0.1)


def test_inputs_are_not_changed_and_not_aliased(place):
    for shape in ((8, 40), (1, 40), (8, 1)):
        weight, hessian = (tensor.float().to(place.device) for tensor in problem(*shape))
        mask = torch.rand(shape, device=place.device) < 0.5
        before = [tensor.clone() for tensor in (weight, hessian, mask)]
        result = obs_prune(weight, hessian, mask=mask, backend=place.backend)
        for tensor, copy in zip((weight, hessian, mask), before, strict=True):
            assert torch.equal(tensor, copy)
        assert result.mask.data_ptr() != mask.data_ptr()
        assert all(tensor.is_contiguous() for tensor in result)


def test_only_the_upper_triangle_of_the_hessian_is_read(place):
    weight, hessian = (tensor.float() for tensor in problem(8, 150))
    upper = hessian.triu() + torch.full_like(hessian, torch.nan).tril(-1)
    for one, other in zip(
        call(place, weight, hessian, sparsity=0.5),
        call(place, weight, upper, sparsity=0.5),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("leading", ((2,), (2, 3)))
def test_a_batch_is_its_matrices_one_by_one(place, leading):
    count = 2 if leading == (2,) else 6
    pairs = [problem(12, 40, seed=seed) for seed in range(count)]
    weights = torch.stack([w for w, _ in pairs]).float().view(*leading, 12, 40)
    hessians = torch.stack([h for _, h in pairs]).float().view(*leading, 40, 40)
    batch = call(place, weights, hessians, sparsity=0.5)
    for i, (weight, hessian) in enumerate(pairs):
        alone = call(place, weight.float(), hessian.float(), sparsity=0.5)
        for ours, one in zip(batch, alone, strict=True):
            torch.testing.assert_close(ours.reshape(count, *one.shape)[i], one)


def test_non_contiguous_inputs_give_the_bits_of_their_copies(place):
    weight, hessian = (tensor.float().to(place.device) for tensor in problem(40, 40))
    strided = torch.empty(80, 80, device=place.device)[::2, ::2].copy_(hessian)
    plain = call(place, weight.T.contiguous(), hessian, sparsity=0.5)
    views = call(place, weight.T, strided, sparsity=0.5)
    assert all(torch.equal(a, b) for a, b in zip(plain, views, strict=True))


@pytest.mark.parametrize("shape", ((0, 8), (8, 0), (0, 0), (0, 4, 8), (2, 0, 8)))
def test_empty_weights_stay_empty(place, shape):
    hessian = torch.eye(shape[-1]).expand(*shape[:-2], shape[-1], shape[-1])
    for how in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        pruned, mask, loss = call(place, torch.zeros(shape), hessian, **how)
        assert pruned.shape == mask.shape == shape and loss.shape == shape[:-1]


def test_twice_the_same_call_gives_the_same_bits(place):
    weight, hessian = (tensor.float() for tensor in problem(rows_on(place, 50), 300))
    one, two = (call(place, weight, hessian, sparsity=0.6) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_autocast_around_the_call_changes_no_bit(place):
    weight, hessian = (tensor.float() for tensor in problem(20, 150))
    plain = call(place, weight, hessian, sparsity=0.6)
    with torch.autocast(place.device, dtype=torch.bfloat16):
        inside = call(place, weight, hessian, sparsity=0.6)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def indefinite():
    """Its Schur complement at column 3, seen from the last column, is 1 - 4 = -3."""
    hessian = torch.eye(6)
    hessian[3, 5] = hessian[5, 3] = 2.0
    return hessian


def with_entry(row, col, value):
    hessian = torch.eye(6)
    hessian[row, col] = value
    return hessian


@pytest.mark.parametrize(
    ("changes", "sentence"),
    (
        (
            {"hessian": indefinite(), "damping": 0.0},
            r"hessian is not positive definite after damping 0.0 \(pivot -3.0e\+00 at column 3\); "
            "raise damping or add calibration samples",
        ),
        ({"hessian": torch.zeros(6, 6)}, "no calibration samples were accumulated"),
        ({"hessian": with_entry(1, 4, torch.inf)}, "hessian holds NaN or infinity"),
        ({"hessian": with_entry(1, 1, torch.nan)}, "hessian holds NaN or infinity"),
        (
            {"hessian": indefinite() - torch.diag(torch.tensor([0, 0, 0, 1.0, 0, 0]))},
            r"not positive semi-definite, its diagonal has a zero beside 2.0e\+00 at \(3, 5\)",
        ),
        ({"hessian": torch.eye(5)}, r"weight is \(4, 6\) and hessian \(5, 5\)"),
        ({"hessian": torch.eye(6).expand(2, 6, 6)}, r"hessian \(2, 6, 6\)"),
        ({"hessian": torch.eye(6).double()}, "hessian is torch.float64 and weight torch.float32"),
        ({"hessian": torch.eye(6).half()}, "pass a float32 hessian, or both in float64"),
        ({"weight": torch.full((4, 6), torch.nan)}, "weight holds NaN or infinity"),
        ({"weight": torch.ones(6)}, r"weight is \(6,\)"),
        ({"sparsity": None}, "got none; pass exactly one of sparsity, pattern, mask"),
        ({"pattern": "2:4"}, "got sparsity and pattern"),
        ({"mask": torch.ones(4, 6, dtype=torch.bool)}, "got sparsity and mask"),
        ({"sparsity": None, "mask": torch.ones(4, 6)}, "mask has dtype torch.float32; pass bool"),
        ({"sparsity": None, "mask": torch.ones(6, 4).bool()}, r"mask has shape \(6, 4\)"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": None, "pattern": "2:4"}, "'2:4' does not divide the width 6"),
        ({"sparsity": None, "pattern": "2:3"}, "block_size 128 cuts groups of pattern '2:3'"),
        ({"block_size": 0}, "block_size is 0; pass at least 1"),
        ({"damping": -0.5}, "damping is -0.5; pass a finite number >= 0"),
        ({"damping": float("inf")}, "damping is inf"),
    ),
)
def test_bad_arguments_are_refused_with_their_values(place, changes, sentence):
    given = {"weight": torch.ones(4, 6), "hessian": torch.eye(6), "sparsity": 0.5} | changes
    weight, hessian = given.pop("weight"), given.pop("hessian")
    with pytest.raises(ValueError, match=f"^obs_prune: .*{sentence}"):
        call(place, weight, hessian, **given)


def test_an_error_in_a_batch_names_its_hessian(place):
    hessians = torch.stack([torch.eye(6), indefinite()])
    with pytest.raises(ValueError, match=r"hessian \[1\] is not positive definite"):
        call(place, torch.ones(2, 4, 6), hessians, sparsity=0.5)
