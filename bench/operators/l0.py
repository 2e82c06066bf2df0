"""ℓ0 averages: every client's weight in, one average and its votes out."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from bench.operators import draw
from bench.operators.bitmask import unpack
from bench.operators.case import Baseline, Case, Inputs, Sizes
from bench.peers import aggregation
from fedspa_kernels import L0Accumulator, compress, dispatch, l0_average, l0_average_compressed

# A mask's least is a bit a weight: the bool that l0_average takes has eight times that.
BIT = 1 / 8


def _inputs(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {
        "weights": draw.weights(sizes.clients, sizes.rows, sizes.cols, dtype, generator),
        "masks": draw.masks(sizes.clients, sizes.rows, sizes.cols, generator),
    }


def _zeroed(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Weights that are 0 where they were pruned, and no masks."""
    clients = draw.weights(sizes.clients, sizes.rows, sizes.cols, dtype, generator)
    for weight in clients:
        weight.mul_(draw.mask(sizes.rows, sizes.cols, generator))
    return {"weights": clients}


def _compressed(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """The same clients as bits and values, one made after the other."""
    rows, cols = sizes.rows, sizes.cols
    drawn = (
        (draw.weight(rows, cols, dtype, generator), draw.mask(rows, cols, generator))
        for _ in range(sizes.clients)
    )
    return {"clients": [compress(*client) for client in drawn], "shape": (rows, cols)}


def _run(inputs: Inputs, backend: str | None) -> Any:
    return l0_average(inputs["weights"], inputs.get("masks"), backend=backend)


def _run_compressed(inputs: Inputs, backend: str | None) -> Any:
    return l0_average_compressed(inputs["clients"], inputs["shape"], backend=backend)


def _stream(inputs: Inputs, backend: str | None) -> Any:
    """Clients as they arrive; it has no argument for a backend, but the environment does."""
    first = inputs["weights"][0]
    with _backend_from_environment(backend):
        accumulator = L0Accumulator(first.shape, first.device)
        for weight, mask in zip(inputs["weights"], inputs["masks"], strict=True):
            accumulator.add(weight, mask)
        return accumulator.average(first.dtype)


@contextmanager
def _backend_from_environment(backend: str | None) -> Iterator[None]:
    """Choose the backend of calls that have no argument for it."""
    before = os.environ.get(dispatch.VARIABLE)
    if backend is not None:
        os.environ[dispatch.VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(dispatch.VARIABLE, None)
        else:
            os.environ[dispatch.VARIABLE] = before


def _check(inputs: Inputs, found: Any, expected: Any) -> str:
    return draw.equal(["weight", "votes"], found, expected)


def _least_bytes(sizes: Sizes, itemsize: int) -> float:
    """Of every client the weight and a bit of mask; the average, and the votes as int32."""
    n = sizes.rows * sizes.cols
    return sizes.clients * n * (itemsize + BIT) + n * (itemsize + 4)


def _least_bytes_zeroed(sizes: Sizes, itemsize: int) -> float:
    """Of every client the weight, which is its own mask; the average and the votes."""
    n = sizes.rows * sizes.cols
    return sizes.clients * n * itemsize + n * (itemsize + 4)


def _least_bytes_compressed(sizes: Sizes, itemsize: int) -> float:
    """Of every client the bits and the kept half of the values; the average and the votes."""
    n = sizes.rows * sizes.cols
    return sizes.clients * n * (itemsize / 2 + BIT) + n * (itemsize + 4)


def _least_bytes_stream(sizes: Sizes, itemsize: int) -> float:
    """Of every client weight and bits, with sum and votes read and written; then both once more."""
    n = sizes.rows * sizes.cols
    return sizes.clients * n * (itemsize + BIT + 16) + n * (8 + itemsize + 4)


def _streamed(inputs: Inputs) -> Any:
    return aggregation.l0_mean_streamed(inputs["weights"], inputs["masks"])


def _streamed_zeroed(inputs: Inputs) -> Any:
    """Running sums; the weights are 0 where their masks are, and need no product with them."""
    total = torch.zeros_like(inputs["weights"][0], dtype=torch.float32)
    votes = torch.zeros_like(total, dtype=torch.int32)
    for weight in inputs["weights"]:
        total += weight
        votes += weight != 0
    return (total / votes.clamp(min=1)).to(weight.dtype), votes


def _streamed_compressed(inputs: Inputs) -> Any:
    """Running sums over what each client's bits and values unpack to."""
    shape, values = inputs["shape"], inputs["clients"][0].values
    total = torch.zeros(shape, device=values.device)
    votes = torch.zeros(shape, dtype=torch.int32, device=values.device)
    for bits, values in inputs["clients"]:
        mask = unpack(bits, shape[1])
        total += values.new_zeros(shape).masked_scatter_(mask, values)
        votes += mask
    return (total / votes.clamp(min=1)).to(values.dtype), votes


_CASE = partial(Case, "l0_average", check=_check, uses=("clients",))
CASES = (
    _CASE(
        "masks",
        inputs=_inputs,
        run=_run,
        least_bytes=_least_bytes,
        baselines={
            "pytorch": Baseline(_streamed),
            # The stack, its float32, their product with the masks, and the masks as int64.
            "stacked": Baseline(
                lambda i: aggregation.l0_mean_stacked(i["weights"], i["masks"]), copies=6
            ),
        },
    ),
    _CASE(
        "zeros",
        inputs=_zeroed,
        run=_run,
        least_bytes=_least_bytes_zeroed,
        baselines={"pytorch": Baseline(_streamed_zeroed)},
    ),
    Case(
        "l0_average_compressed",
        "",
        _compressed,
        _run_compressed,
        _check,
        _least_bytes_compressed,
        baselines={"pytorch": Baseline(_streamed_compressed)},
        uses=("clients",),
    ),
    Case(
        "L0Accumulator",
        "stream",
        _inputs,
        _stream,
        _check,
        _least_bytes_stream,
        baselines={"pytorch": Baseline(_streamed)},
        uses=("clients",),
        door="l0_add_",
    ),
)
