"""Peak bytes: the operators need what they return and little more, whatever the clients."""

import os
import re
from pathlib import Path

import pytest
import torch

from fedspa_kernels import (
    accumulate_hessian_,
    compress,
    decompress,
    expand_mask,
    l0_average,
    l0_average_compressed,
    obs_prune,
    smallest_mask,
    wanda_prune,
)

OPERATORS = ("l0_average",)
ROWS, COLS = 4608, 2048
# One float32 matrix: 36 MiB, more than any allocator keeps for later (glibc stops at 32).
MATRIX = 4 * ROWS * COLS
# What is neither counted nor avoidable: histograms, a page here and there, threads' stacks.
SLACK = 6 * 2**20


@pytest.fixture
def compiled(place, request):
    """A place whose memory tells something, and in reasonable time."""
    if place.backend == "reference":
        pytest.skip("the reference is written to be read")
    if place.device == "cpu" and place.backend == "triton":
        pytest.skip("an interpreted kernel's memory is NumPy's")
    if request.config.getoption("--native-library"):
        pytest.skip("CUDA on the CPU is for small sizes")
    return place


def status(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_bytes(place, run):
    """How much more memory is in use at the worst moment of a call than before it."""
    if place.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    result = run()
    return status("VmHWM") - before, result


def check(place, run, most):
    """Run once to load and to make threads, and then count."""
    if place.device == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of the resident memory cannot be reset here")
    run()
    peak, _ = peak_bytes(place, run)
    assert peak <= most + SLACK, f"{peak / MATRIX:.2f} matrices, allowed {most / MATRIX:.2f}"


@pytest.fixture
def matrix(compiled):
    return torch.randn(ROWS, COLS, device=compiled.device)


def test_wanda_needs_the_weight_and_the_mask_that_it_returns(compiled, matrix):
    norms = torch.ones(COLS, device=compiled.device)
    for how in ({"sparsity": 0.5}, {"sparsity": 0.5, "group": "layer"}, {"pattern": "2:4"}):
        check(
            compiled,
            lambda how=how: wanda_prune(matrix, norms, **how, backend=compiled.backend),
            1.25 * MATRIX,
        )


def test_columns_become_rows_by_a_copy_of_each(compiled, matrix):
    norms = torch.ones(COLS, device=compiled.device)
    check(
        compiled,
        lambda: wanda_prune(matrix, norms, sparsity=0.5, group="column", backend=compiled.backend),
        3.5 * MATRIX,
    )


def test_selection_needs_its_mask(compiled, matrix):
    for scores in (matrix, matrix.view(1, -1), matrix.view(-1, 4)):
        check(
            compiled,
            lambda scores=scores: smallest_mask(scores, 2, backend=compiled.backend),
            0.25 * MATRIX,
        )


def test_expansion_needs_its_mask(compiled, matrix):
    votes = torch.randint(0, 17, matrix.shape, dtype=torch.int32, device=compiled.device)
    check(
        compiled,
        lambda: expand_mask(votes, 16, sparsity=0.6, scores=matrix, backend=compiled.backend),
        0.25 * MATRIX,
    )


def test_averaging_sixteen_clients_needs_one_average_and_one_tensor_of_votes(compiled, matrix):
    weights, mask = [matrix + client for client in range(16)], matrix > 0
    check(compiled, lambda: l0_average(weights, [mask] * 16, backend=compiled.backend), 2 * MATRIX)
    packed = [compress(weight, mask, backend=compiled.backend) for weight in weights]
    check(
        compiled,
        lambda: l0_average_compressed(packed, matrix.shape, backend=compiled.backend),
        2 * MATRIX,
    )


def test_compression_needs_the_bits_and_the_values(compiled, matrix):
    mask = matrix > 0
    compressed = compress(matrix, mask, backend=compiled.backend)
    stored = compressed.bits.nbytes + compressed.values.nbytes
    check(compiled, lambda: compress(matrix, mask, backend=compiled.backend), stored)
    check(
        compiled,
        lambda: decompress(compressed, matrix.shape, backend=compiled.backend),
        MATRIX,
    )


def test_a_hessian_grows_in_place(compiled, matrix):
    hessian = torch.zeros(COLS, COLS, device=compiled.device)
    for inputs in (matrix, matrix.bfloat16()):
        # Halves are converted for a CPU's product, a few thousand tokens at a time; a GPU's panel
        # is a product of its own.
        most = 0 if inputs.dtype == torch.float32 else hessian.nbytes + MATRIX
        check(
            compiled,
            lambda inputs=inputs: accumulate_hessian_(hessian, inputs, backend=compiled.backend),
            most,
        )


def test_obs_needs_its_results_the_change_and_three_squares(compiled, matrix):
    hessian = matrix.T @ matrix
    check(
        compiled,
        lambda: obs_prune(matrix, hessian, sparsity=0.5, backend=compiled.backend),
        # Weight, mask, change and one panel of it; the factor, its copy and the workspace.
        2.25 * MATRIX + MATRIX * 512 / COLS + 3 * hessian.nbytes,
    )
