"""The products and the factor that a CPU's sweep is made of; on a GPU its library has both."""

from functools import partial

import pytest
import torch

from fedspa_kernels import native
from fedspa_kernels.obs.factor import by_panels, damped_factor, whole
from fedspa_kernels.obs.product import FULL, LOWER, UPPER, product

OPERATORS = ("obs_prune",)
# float32 sums of up to 1,100 products of numbers of order 1, against float64.
TOLERANCE = 1e-4
# A factor of a matrix with a condition number of some 1e3, in units of its entries.
FACTOR = 1e-3


@pytest.fixture
def kernels(place):
    if not (place.backend == "native" and hasattr(native.KERNELS, "multiply_")):
        pytest.skip("these are C++ for the CPU")
    return native.KERNELS


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SIZES = [(1, 1, 1), (7, 3, 5), (8, 32, 32), (9, 33, 31), (33, 513, 33), (40, 1100, 300), (3, 0, 4)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_product_is_that_of_float64(kernels, size, transposed):
    rows, depth, cols = size
    left = numbers(2, rows, depth + 3, seed=1)[..., :depth]  # rows with gaps
    right = numbers(2, cols, depth, seed=2).mT if transposed else numbers(2, depth, cols, seed=2)
    start = numbers(2, rows, cols, seed=3)
    exact = left.double() @ right.double()
    for plus, subtract, expected in (
        (None, False, exact),
        (start, False, start + exact),
        (start, True, start - exact),
    ):
        out = torch.full_like(start, torch.nan)
        kernels.multiply_(out, left, right, plus, subtract, FULL)
        assert (out - expected).abs().max() <= TOLERANCE
    # In place, and the same bits.
    kernels.multiply_(start, left, right, start, True, FULL)
    assert torch.equal(start, out)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 127, 128, 600])
def test_a_triangle_is_multiplied_without_its_zeros(kernels, size):
    left, square = numbers(1, 11, size), numbers(1, size, size, seed=1)
    for triangle, right in ((UPPER, square.triu()), (LOWER, square.tril())):
        out = torch.full_like(left, torch.nan)
        kernels.multiply_(out, left, right, None, False, triangle)
        assert (out - product(left.double(), right.double())).abs().max() <= TOLERANCE


def test_threads_do_not_change_a_bit(kernels):
    left, right = numbers(1, 300, 700), numbers(1, 700, 200, seed=1)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = torch.full((1, 300, 200), torch.nan)
            kernels.multiply_(out, left, right, None, False, FULL)
            results.append(out)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("cols", [1, 2, 17, 127, 128, 129, 255, 256, 300])
def test_a_factor_by_panels_is_that_of_the_library(kernels, cols):
    matrices = 2 if cols > 1 else 1
    inputs = numbers(matrices, 3 * cols, cols)
    inputs[1:, :, cols // 2] = 0
    hessians = inputs.mT @ inputs
    below = torch.ones(cols, cols, dtype=torch.bool).tril(-1)
    torn = hessians.masked_fill(below, torch.nan)  # only the upper triangle is read
    names = ["first", "second"][:matrices]
    ours = damped_factor(torn, 0.01, names, partial(by_panels, kernels))
    exact = damped_factor(hessians.double(), 0.01, names)
    scale = exact.upper.abs().max()
    assert (ours.upper.triu() - exact.upper.triu()).abs().max() <= FACTOR * scale
    assert ours.inverses is not None
    for index, begin in enumerate(range(0, cols, 128)):
        end = min(begin + 128, cols)
        block = exact.upper[:, begin:end, begin:end].triu()
        inverse = ours.inverses[index, :, : end - begin, : end - begin].double()
        identity = torch.eye(end - begin, dtype=torch.float64)
        assert (block @ inverse - identity).abs().max() <= 10 * FACTOR


def test_a_matrix_without_a_factor_says_so(kernels):
    square = torch.eye(300).repeat(2, 1, 1)
    square[1, 200, 200] = -1
    damp, dead = torch.zeros(2), torch.zeros(2, 300, dtype=torch.bool)
    _, _, failed = by_panels(kernels, square, damp, dead)
    _, _, expected = whole(square, damp, dead)
    assert (failed != 0).tolist() == (expected != 0).tolist() == [False, True]
