"""wanda_scores and wanda_prune: a weight in, a weight and its mask out."""

from functools import partial
from typing import Any

import torch

from bench.operators import draw
from bench.operators.case import Baseline, Case, Inputs, Sizes
from bench.peers import llmcompressor, wanda
from fedspa_kernels import wanda_prune, wanda_scores


def _inputs(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {
        "weight": draw.weight(sizes.rows, sizes.cols, dtype, generator),
        "norms": draw.norms(sizes.cols, generator),
    }


def _scores(inputs: Inputs, backend: str | None) -> Any:
    return wanda_scores(inputs["weight"], inputs["norms"], backend=backend)


def _prune(inputs: Inputs, backend: str | None, **how: Any) -> Any:
    return wanda_prune(inputs["weight"], inputs["norms"], **how, backend=backend)


def _check_scores(inputs: Inputs, found: Any, expected: Any) -> str:
    return draw.equal(["scores"], found, expected)


def _check_pruned(inputs: Inputs, found: Any, expected: Any) -> str:
    return draw.equal(["weight", "mask"], found, expected)


def _scores_bytes(sizes: Sizes, itemsize: int) -> float:
    """The weight in, float32 scores out, the norms once."""
    return (itemsize + 4) * sizes.rows * sizes.cols + 4 * sizes.cols


def _prune_bytes(sizes: Sizes, itemsize: int) -> float:
    """The weight in and out, its mask (bool) out, the norms once."""
    return (2 * itemsize + 1) * sizes.rows * sizes.cols + 4 * sizes.cols


def _pytorch_scores(inputs: Inputs) -> Any:
    return inputs["weight"].float().abs() * inputs["norms"]


def _pytorch_row(inputs: Inputs) -> Any:
    """The k-th smallest of each row by selection: no sort. Ties are left to chance."""
    weight, scores = inputs["weight"], _pytorch_scores(inputs)
    threshold = scores.kthvalue(weight.shape[1] // 2, dim=1, keepdim=True).values
    mask = scores > threshold
    return weight * mask, mask


def _pytorch_layer(inputs: Inputs) -> Any:
    weight, scores = inputs["weight"], _pytorch_scores(inputs)
    mask = scores > scores.flatten().kthvalue(weight.numel() // 2).values
    return weight * mask, mask


def _pytorch_pattern(inputs: Inputs) -> Any:
    weight, scores = inputs["weight"], _pytorch_scores(inputs)
    kept = scores.view(len(weight), -1, 4).topk(2, dim=-1, sorted=False).indices
    mask = torch.zeros(*kept.shape[:2], 4, dtype=torch.bool, device=weight.device)
    mask = mask.scatter_(-1, kept, True).view(weight.shape)
    return weight * mask, mask


def _peers(**how: Any) -> dict[str, Baseline]:
    return {
        "sorted": Baseline(lambda i: wanda.prune(i["weight"], i["norms"], **how), copies=8),
        "llm-compressor": Baseline(
            lambda i: llmcompressor.wanda(i["weight"], i["norms"], **how),
            llmcompressor.why_not,
            copies=8,
        ),
    }


_CASE = partial(Case, "wanda_prune", inputs=_inputs, check=_check_pruned, least_bytes=_prune_bytes)
CASES = (
    Case(
        "wanda_scores",
        "",
        _inputs,
        _scores,
        _check_scores,
        _scores_bytes,
        baselines={"pytorch": Baseline(_pytorch_scores)},
    ),
    _CASE(
        "row 50 %",
        run=partial(_prune, sparsity=0.5),
        baselines={"pytorch": Baseline(_pytorch_row), **_peers(sparsity=0.5)},
    ),
    _CASE(
        "layer 50 %",
        run=partial(_prune, sparsity=0.5, group="layer"),
        baselines={"pytorch": Baseline(_pytorch_layer)},
    ),
    _CASE(
        "2:4",
        multiple=4,
        run=partial(_prune, pattern="2:4"),
        baselines={"pytorch": Baseline(_pytorch_pattern), **_peers(pattern=(2, 4))},
    ),
)
