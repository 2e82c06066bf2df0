"""obs_prune_shared: three layers of one input, such as q, k and v, from one factorisation."""

from functools import partial
from typing import Any

import torch

from bench.operators import draw, obs
from bench.operators.case import Baseline, Case, Inputs, Sizes
from fedspa_kernels import Pruned, obs_prune, obs_prune_shared

LAYERS = 3


def _inputs(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Three weights of these sizes, and their Hessian."""
    return {
        "weights": draw.weights(LAYERS, sizes.rows, sizes.cols, dtype, generator),
        "hessian": draw.hessian(sizes.cols, generator),
    }


def _run(inputs: Inputs, backend: str | None, **how: Any) -> Any:
    return obs_prune_shared(inputs["weights"], inputs["hessian"], **how, backend=backend)


def _check(inputs: Inputs, found: list[Pruned], expected: list[Pruned]) -> str:
    pairs = zip(found, expected, strict=True)
    sentences = [obs.check_half(inputs, *pair) for pair in pairs]
    return f"each of {len(sentences)}: {sentences[0]}"


def _together(sizes: Sizes) -> Sizes:
    return sizes._replace(rows=LAYERS * sizes.rows)


def _least_bytes(sizes: Sizes, itemsize: int) -> float:
    """As for one layer with the rows of all."""
    return obs.least_bytes(_together(sizes), itemsize)


def _operations(sizes: Sizes) -> float:
    """As for one layer with the rows of all: one Cholesky."""
    return obs.operations(_together(sizes))


def _separate(inputs: Inputs) -> Any:
    """Ours, one layer after the other: three factorisations of the same matrix."""
    return [obs_prune(weight, inputs["hessian"], sparsity=0.5) for weight in inputs["weights"]]


def _floor(inputs: Inputs) -> Any:
    """One Cholesky, and for each of the three the product of `obs.floor`."""
    factor, weights = obs.cholesky(inputs["hessian"]), inputs["weights"]
    return [obs.product(weight, factor) for weight in weights]


CASES = (
    Case(
        "obs_prune_shared",
        "3 layers, 50 %",
        _inputs,
        partial(_run, sparsity=0.5),
        _check,
        _least_bytes,
        _operations,
        {"separate": Baseline(_separate), "floor": Baseline(_floor)},
        rate=torch.float32,
    ),
)
