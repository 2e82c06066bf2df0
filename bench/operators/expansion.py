"""expand_mask: votes and scores in, a mask out."""

from functools import partial
from typing import Any

import torch

from bench.operators import draw
from bench.operators.case import Baseline, Case, Inputs, Sizes
from bench.peers import aggregation
from fedspa_kernels import expand_mask


def _inputs(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {
        "votes": draw.votes(sizes.clients, sizes.rows, sizes.cols, generator),
        "scores": draw.weight(sizes.rows, sizes.cols, dtype, generator).abs_(),
        "clients": sizes.clients,
    }


def _run(inputs: Inputs, backend: str | None, **how: Any) -> Any:
    return expand_mask(
        inputs["votes"], inputs["clients"], scores=inputs["scores"], **how, backend=backend
    )


def _check(inputs: Inputs, found: Any, expected: Any) -> str:
    return draw.equal(["mask"], found, expected)


def _least_bytes(sizes: Sizes, itemsize: int) -> float:
    """Votes (int32) and scores in, the mask (bool) out; a second pass is above the floor."""
    return (4 + itemsize + 1) * sizes.rows * sizes.cols


def _peers(**how: Any) -> dict[str, Baseline]:
    def expand(code: Any) -> Any:
        return lambda i: code(i["votes"], i["scores"], i["clients"], **how)

    # int64 keys, and a sort's values and indices.
    return {
        "pytorch": Baseline(expand(aggregation.expand_topk), copies=8),
        "argsort": Baseline(expand(aggregation.expand_argsort), copies=8),
    }


_CASE = partial(
    Case,
    "expand_mask",
    inputs=_inputs,
    check=_check,
    least_bytes=_least_bytes,
    uses=("clients",),
)
CASES = (
    _CASE("layer 50 %", run=partial(_run, sparsity=0.5), baselines=_peers(sparsity=0.5)),
    _CASE("2:4", multiple=4, run=partial(_run, pattern="2:4"), baselines=_peers(pattern=(2, 4))),
)
