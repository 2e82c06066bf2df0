"""Masks as bits, and weights as bits and kept values."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.operators import draw
from bench.operators.case import Baseline, Case, Inputs, Sizes
from fedspa_kernels import compress, decompress, pack_mask, unpack_mask


def _mask(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {"mask": draw.mask(sizes.rows, sizes.cols, generator)}


def _bits(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {"bits": pack_mask(_mask(sizes, dtype, generator)["mask"]), "n": sizes.cols}


def _dense(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    weight = draw.weight(sizes.rows, sizes.cols, dtype, generator)
    return {"weight": weight, **_mask(sizes, dtype, generator)}


def _compressed(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    dense = _dense(sizes, dtype, generator)
    stored = compress(dense["weight"], dense["mask"])
    return {"compressed": stored, "shape": (sizes.rows, sizes.cols)}


def _check(inputs: Inputs, found: Any, expected: Any, *, what: tuple[str, ...]) -> str:
    return draw.equal(what, found, expected)


def _mask_bytes(sizes: Sizes, itemsize: int) -> float:
    """A byte an entry, and a bit an entry: one of them in, the other out."""
    return (1 + 1 / 8) * sizes.rows * sizes.cols


def _compress_bytes(sizes: Sizes, itemsize: int) -> float:
    """The weight and its mask (bool) in, the bits and the kept half of the values out."""
    return (itemsize + 1 + 1 / 8 + itemsize / 2) * sizes.rows * sizes.cols


def _decompress_bytes(sizes: Sizes, itemsize: int) -> float:
    """The bits and the kept half of the values in, the weight out."""
    return (1 / 8 + itemsize / 2 + itemsize) * sizes.rows * sizes.cols


def pack(mask: Tensor) -> Tensor:
    """Bits from a mask (rows, n): the sum of powers of two, as one would write it."""
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    eights = pad(mask, (0, -mask.shape[1] % 8)).view(len(mask), -1, 8)
    return (eights * powers).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, n: int) -> Tensor:
    """A mask (rows, n) from its bits, as one would write it."""
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) & powers) != 0).flatten(1)[:, :n]


def _pytorch_compress(inputs: Inputs) -> Any:
    return pack(inputs["mask"]), inputs["weight"][inputs["mask"]]


def _pytorch_decompress(inputs: Inputs) -> Any:
    bits, values = inputs["compressed"]
    mask = unpack(bits, inputs["shape"][1])
    return values.new_zeros(inputs["shape"]).masked_scatter_(mask, values)


_CASE = partial(Case, variant="")
CASES = (
    _CASE(
        "pack_mask",
        inputs=_mask,
        run=lambda inputs, backend: pack_mask(inputs["mask"], backend=backend),
        check=partial(_check, what=("bits",)),
        least_bytes=_mask_bytes,
        half=False,
        baselines={"pytorch": Baseline(lambda inputs: pack(inputs["mask"]))},
    ),
    _CASE(
        "unpack_mask",
        inputs=_bits,
        run=lambda inputs, backend: unpack_mask(inputs["bits"], inputs["n"], backend=backend),
        check=partial(_check, what=("mask",)),
        least_bytes=_mask_bytes,
        half=False,
        baselines={"pytorch": Baseline(lambda inputs: unpack(inputs["bits"], inputs["n"]))},
    ),
    _CASE(
        "compress",
        inputs=_dense,
        run=lambda inputs, backend: compress(inputs["weight"], inputs["mask"], backend=backend),
        check=partial(_check, what=("bits", "values")),
        least_bytes=_compress_bytes,
        baselines={"pytorch": Baseline(_pytorch_compress)},
    ),
    _CASE(
        "decompress",
        inputs=_compressed,
        run=lambda inputs, backend: decompress(
            inputs["compressed"], inputs["shape"], backend=backend
        ),
        check=partial(_check, what=("weight",)),
        least_bytes=_decompress_bytes,
        baselines={"pytorch": Baseline(_pytorch_decompress)},
    ),
)
