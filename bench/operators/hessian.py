"""accumulate_hessian_: half of a matrix product, since the square is symmetric."""

from typing import Any

import torch

from bench.operators import draw
from bench.operators.case import Baseline, Case, Inputs, Sizes
from bench.peers import llmcompressor, sparsegpt
from fedspa_kernels import accumulate_hessian_

# Sums of some thousand products in another order, in float32. Tensor cores round every 16 products
# towards 0: 512 times for 8,192 tokens, each by up to 2^-23. A lost token would make 1.2e-4.
TOLERANCE = {"cpu": 1e-5, "cuda": 6e-5}


def _inputs(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {
        "hessian": draw.hessian(sizes.cols, generator),
        "inputs": draw.inputs(sizes.tokens, sizes.cols, dtype, generator),
    }


def _run(inputs: Inputs, backend: str | None) -> Any:
    return accumulate_hessian_(inputs["hessian"], inputs["inputs"], backend=backend)


def _check(inputs: Inputs, found: Any, expected: Any) -> str:
    return draw.close("hessian", found, expected, TOLERANCE[found.device.type])


def _least_bytes(sizes: Sizes, itemsize: int) -> float:
    """The inputs once; the sums, float32, read and written."""
    return itemsize * sizes.tokens * sizes.cols + 8 * sizes.cols**2


def _operations(sizes: Sizes) -> float:
    """The upper triangle of tokens·cols² multiply-adds; the other one is its mirror."""
    return sizes.tokens * sizes.cols * (sizes.cols + 1)


def _pytorch(inputs: Inputs) -> Any:
    tokens = inputs["inputs"].float()
    return inputs["hessian"].addmm_(tokens.T, tokens)


def _product(inputs: Inputs) -> Any:
    """The whole product of this size in the inputs' own dtype, rounded to it: the floor."""
    return inputs["inputs"].T @ inputs["inputs"]


CASES = (
    Case(
        "accumulate_hessian_",
        "",
        _inputs,
        _run,
        _check,
        _least_bytes,
        _operations,
        {
            "pytorch": Baseline(_pytorch),
            "floor": Baseline(_product),
            "sparsegpt": Baseline(lambda i: sparsegpt.add_batch(i["hessian"], 128, i["inputs"])),
            "llm-compressor": Baseline(
                lambda i: llmcompressor.accumulate_hessian(i["hessian"], 128, i["inputs"]),
                llmcompressor.why_not,
            ),
        },
        uses=("tokens",),
        writes=("hessian",),
    ),
)
