"""What only a GPU can show: real sizes, streams, devices, and the memory checker.

`make test-gpu`, or `pytest -m gpu tests/kernels`, runs this and every other test on the GPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedspa_kernels import (
    accumulate_hessian_,
    compress,
    dispatch,
    expand_mask,
    l0_average,
    l0_average_compressed,
    obs_prune,
    smallest_mask,
    wanda_prune,
)

pytestmark = pytest.mark.gpu
OPERATORS = ("l0_average", "obs_prune")
ROOT = Path(__file__).parents[2]
# LLaMA-2-70B's output, gate and down projections, and one with no even size.
SHAPES = ((8192, 8192), (28672, 8192), (8192, 28672), (4097, 4099))
BYTES = 40 * 2**30

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture
def backend(place):
    """Each backend on the GPU; the others are tested elsewhere, and the reference is the truth."""
    if place.device != "cuda" or place.backend == "reference":
        pytest.skip("this is no kernel on a GPU")
    return place.backend


def weight_of(shape, seed=0):
    torch.manual_seed(seed)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wanda_on_real_sizes(backend, shape):
    weight, norms = weight_of(shape), torch.rand(shape[1], device="cuda")
    for group in ("row", "layer"):
        ours = wanda_prune(weight, norms, sparsity=0.6, group=group, backend=backend)
        scores = weight.float().abs().mul_(norms)
        scores = scores if group == "row" else scores.view(1, -1)
        gone = (~ours.mask).view(scores.shape)
        assert gone.sum(1).unique().tolist() == [int(scores.shape[1] * 0.6)]
        largest = scores.masked_fill(~gone, -1).amax(1)
        assert (scores.masked_fill(gone, torch.inf).amin(1) >= largest).all()
        assert torch.equal(ours.weight, weight * ours.mask)


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_averaging_and_expanding_64_clients_on_real_sizes(backend, shape):
    count = min(64, BYTES // (3 * 4 * shape[0] * shape[1]))
    assert count >= 16
    weights = [weight_of(shape, seed) for seed in range(count)]
    masks = [weight > 0.2 for weight in weights]
    average = l0_average(weights, masks, backend=backend)
    expected = l0_average(weights, masks, backend="reference")
    assert torch.equal(average.votes, expected.votes)
    assert torch.equal(average.weight, expected.weight)
    packed = [compress(*client, backend=backend) for client in zip(weights, masks, strict=True)]
    del weights, masks
    again = l0_average_compressed(packed, shape, backend=backend)
    assert torch.equal(again.weight, expected.weight) and torch.equal(again.votes, expected.votes)
    scores = average.weight.float().abs()
    ours = expand_mask(average.votes, count, sparsity=0.7, scores=scores, backend=backend)
    theirs = expand_mask(average.votes, count, sparsity=0.7, scores=scores, backend="reference")
    assert torch.equal(ours, theirs)


@needs_gpu
def test_selection_from_a_quarter_of_a_billion(backend):
    scores = weight_of((1, 28672 * 8192)).float()
    ours = smallest_mask(scores, 123_456_789, backend=backend)
    assert torch.equal(ours, smallest_mask(scores, 123_456_789, backend="reference"))


@needs_gpu
@pytest.mark.parametrize("cols", (4096, 8192, 4099))
def test_hessians_of_real_widths(backend, cols):
    inputs = weight_of((8192, cols))
    start = torch.zeros(cols, cols, device="cuda")
    hessian = accumulate_hessian_(start, inputs, backend=backend)
    exact = inputs.double().T @ inputs.double()
    # Unit normals: sums of 8192 products with float32 rounding errors of some 1e-7 of each.
    torch.testing.assert_close(hessian.double(), exact, atol=0.05, rtol=1e-4)
    assert torch.equal(hessian, hessian.T)


@needs_gpu
@pytest.mark.parametrize("shape", ((4096, 4096), (28672, 8192), (2048, 28672)), ids=str)
@pytest.mark.parametrize("how", ({"sparsity": 0.5}, {"pattern": "2:4"}), ids=str)
def test_obs_on_real_sizes_keeps_its_counts_and_its_loss(backend, shape, how):
    weight, cols = weight_of(shape), shape[1]
    inputs = weight_of((4096, cols), 1).float()
    hessian = inputs.T @ inputs
    pruned, mask, loss = obs_prune(weight, hessian, **how, backend=backend)
    if "sparsity" in how:
        assert all(int((~block).sum()) == block.numel() // 2 for block in mask.split(128, 1))
    else:
        assert (mask.view(-1, 4).sum(1) == 2).all()
    assert not pruned[~mask].any()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(cols, device="cuda")
    change = (weight.float() - pruned.float())[:512]
    expected = (change @ damped * change).sum(1)
    # The loss is that of the weight before it is rounded to bfloat16.
    torch.testing.assert_close(loss[:512], expected, rtol=0.05, atol=0)


@needs_gpu
def test_kernels_run_on_the_stream_that_is_current(backend):
    stream, weight = torch.cuda.Stream(), torch.zeros(4096, 4096, device="cuda")
    norms = torch.ones(4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a kernel on another stream would still see the zeros
        weight.copy_(weight_of((4096, 4096)))
        pruned = wanda_prune(weight, norms, sparsity=0.5, backend=backend)
        average = l0_average([weight, pruned.weight], backend=backend)
    stream.synchronize()
    assert torch.equal(pruned.weight, weight * pruned.mask) and pruned.weight.any()
    assert torch.equal(average.weight, weight)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_kernels_run_on_the_device_of_their_tensors(backend):
    weight = torch.randn(64, 130, device="cuda:1")
    hessian = weight.T @ weight
    for tensor in (
        *obs_prune(weight, hessian, sparsity=0.5, backend=backend),
        *l0_average([weight] * 3, backend=backend),
    ):
        assert tensor.device == weight.device


@needs_gpu
@pytest.mark.slow
def test_the_memory_checker_finds_nothing(request):
    checker = shutil.which("compute-sanitizer") or shutil.which("cuda-memcheck")
    if checker is None and request.config.getoption("--places"):
        pytest.fail("compute-sanitizer is not installed, and it must not be left out in silence")
    if checker is None:
        pytest.skip("compute-sanitizer is not installed")
    backends = set(dispatch.available("obs_prune", "cuda")) - {"reference"}
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels/test_properties.py"]
    places = ",".join(f"cuda-{backend}" for backend in sorted(backends))
    for tool in ("memcheck", "racecheck"):
        command = [checker, "--tool", tool, "--error-exitcode", "99", *tests, "--places", places]
        # PyTorch's own pools would hide what lies beyond a tensor.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, f"{tool}: {run.stdout[-3000:]}{run.stderr[-1000:]}"
