"""The operators inside torch.compile: one graph, and the results of the eager call."""

import shutil

import pytest
import torch

from fedspa_kernels import (
    Compressed,
    accumulate_hessian_,
    decompress,
    expand_mask,
    l0_average,
    obs_prune,
    pack_mask,
    smallest_mask,
    unpack_mask,
    wanda_prune,
)

OPERATORS = (
    "accumulate_hessian_",
    "decompress",
    "expand_mask",
    "l0_average",
    "obs_prune",
    "pack_mask",
    "smallest_mask",
    "unpack_mask",
    "wanda_prune",
)
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(8, 16, generator=GENERATOR)
INPUTS = torch.randn(40, 16, generator=GENERATOR)
MASK = WEIGHT > 0
NORMS = torch.arange(1.0, 17.0)


def prune_the_smallest(weight, backend):
    return weight.masked_fill(smallest_mask(weight.abs(), 5, backend=backend), 0) * 2


def prune_by_wanda(weight, norms, backend):
    pruned = wanda_prune(weight + 1, norms, pattern="2:4", backend=backend)
    return pruned.weight * 2, pruned.mask


def pack_and_unpack(mask, backend):
    return unpack_mask(pack_mask(~mask, backend=backend), mask.shape[-1], backend=backend)


def average_and_expand(first, second, backend):
    average = l0_average([first * (first > 0), second], backend=backend)
    return average.weight * expand_mask(average.votes, 2, sparsity=0.5, backend=backend)


def rebuild(bits, values, backend):
    return decompress(Compressed(bits, values * 2), (8, 16), backend=backend) + 1


def calibrate_and_prune(weight, inputs, backend):
    hessian = inputs.new_zeros(16, 16)
    accumulate_hessian_(hessian, inputs, backend=backend)
    # What reads it after the call must not be moved before it.
    diagonal = hessian.diagonal() * 1
    return diagonal, *obs_prune(weight, hessian, sparsity=0.5, backend=backend)


CALLS = (
    (prune_the_smallest, (WEIGHT,)),
    (prune_by_wanda, (WEIGHT, NORMS)),
    (pack_and_unpack, (MASK,)),
    (average_and_expand, (WEIGHT, WEIGHT.flip(0))),
    (rebuild, (pack_mask(MASK), WEIGHT[MASK])),
    (calibrate_and_prune, (WEIGHT, INPUTS)),
)


def check(function, tensors, place, compiler):
    tensors = [tensor.to(place.device) for tensor in tensors]
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    # The same bits: the surrounding arithmetic is exact, or is done by the same kernels.
    result, expected = (call(*tensors, place.backend) for call in (compiled, function))
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


@pytest.mark.parametrize(("function", "tensors"), CALLS, ids=[call[0].__name__ for call in CALLS])
def test_one_graph_gives_the_bits_of_the_eager_call(place, function, tensors):
    check(function, tensors, place, "aot_eager")


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_the_default_compiler_gives_them_too(place):
    check(prune_by_wanda, (WEIGHT, NORMS), place, "inductor")
