"""smallest_mask: scores in, a mask out."""

from functools import partial
from typing import Any

import torch

from bench.operators import draw
from bench.operators.case import Baseline, Case, Inputs, Sizes
from fedspa_kernels import smallest_mask


def _rows(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {"scores": draw.weight(sizes.rows, sizes.cols, dtype, generator)}


def _layer(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {"scores": draw.weight(1, sizes.rows * sizes.cols, dtype, generator)}


def _run(inputs: Inputs, backend: str | None) -> Any:
    return smallest_mask(inputs["scores"], inputs["scores"].shape[1] // 2, backend=backend)


def _check(inputs: Inputs, found: Any, expected: Any) -> str:
    return draw.equal(["mask"], found, expected)


def _least_bytes(sizes: Sizes, itemsize: int) -> float:
    """Scores in, the mask (bool) out."""
    return (itemsize + 1) * sizes.rows * sizes.cols


def _topk(inputs: Inputs) -> Any:
    """Exactly k by selection, which of equal scores is left to chance."""
    scores = inputs["scores"]
    smallest = scores.topk(scores.shape[1] // 2, dim=1, largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, smallest, True)


_CASE = partial(
    Case,
    "smallest_mask",
    run=_run,
    check=_check,
    least_bytes=_least_bytes,
    baselines={"pytorch": Baseline(_topk, copies=8)},
)
CASES = (_CASE("half of each row", inputs=_rows), _CASE("half of the layer", inputs=_layer))
