"""Masks as bits and sparse tensors as bits and values: what travels between client and server."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedspa_kernels import dispatch
from fedspa_kernels.arguments import check_devices, check_floats, check_mask
from fedspa_kernels.bitmask import kernel, reference
from fedspa_kernels.bitmask.values import check_padding
from fedspa_kernels.results import Compressed


def pack_mask(mask: Tensor, *, backend: str | None = None) -> Tensor:
    """Pack eight mask entries a byte along the last axis: numpy.packbits, bitorder="little".

    mask:    (..., n) bool
    returns: (..., ceil(n/8)) uint8; the bits beyond n are 0
    raises:  ValueError where the mask is not bool, or has no axis
    """
    return torch.ops.fedspa.pack_mask(mask, backend=backend)


def unpack_mask(bits: Tensor, n: int, *, backend: str | None = None) -> Tensor:
    """Unpack a mask: the inverse of pack_mask.

    bits:    (..., ceil(n/8)) uint8
    returns: (..., n) bool
    raises:  ValueError where bits are not uint8 or not that wide, or a bit beyond n is set
    """
    return torch.ops.fedspa.unpack_mask(bits, n, backend=backend)


def compress(
    weight: Tensor, mask: Tensor, *, kept: int | None = None, backend: str | None = None
) -> Compressed:
    """Store the kept weights alone; one that is kept and 0 is stored too.

    weight:  (..., n) float32, float16, bfloat16 or float64
    mask:    (..., n) bool, True = kept
    kept:    the number of True in the mask, where it is known: inside `checks.together` the call
             then waits for no device. None: it is counted, and waited for
    returns: Compressed(bits, values): (..., ceil(n/8)) uint8, and the kept values, one-dimensional,
             in row-major order, in the weight's dtype
    raises:  ValueError where shapes, dtypes or devices disagree, or kept is not the mask's number
    """
    return Compressed(*torch.ops.fedspa.compress(weight, mask, kept=kept, backend=backend))


def decompress(
    compressed: Compressed, shape: Sequence[int], *, backend: str | None = None
) -> Tensor:
    """Rebuild the weight: the kept values in their places, zeros elsewhere.

    compressed: what `compress` returned
    shape:      the weight's shape, (..., n)
    returns:    a tensor of that shape in the values' dtype
    raises:     ValueError where the bits do not fit the shape, or the values do not fit the bits
    """
    bits, values = compressed
    return torch.ops.fedspa.decompress(bits, values, list(shape), backend=backend)


def _check_axes(operator: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() == 0:
        raise ValueError(f"{operator}: {name} has no axis to pack along; pass it as shape (1,)")


def check_bits(operator: str, bits: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError where bits are not uint8, or not the packed mask of a shape."""
    if bits.dtype != torch.uint8:
        raise ValueError(f"{operator}: bits have dtype {bits.dtype}; pass uint8, as packed")
    if not shape or any(size < 0 for size in shape):
        raise ValueError(
            f"{operator}: the unpacked shape is {tuple(shape)}; pass sizes >= 0, at least one"
        )
    if bits.shape != (*shape[:-1], (shape[-1] + 7) // 8):
        raise ValueError(
            f"{operator}: bits are {tuple(bits.shape)}, and a mask of {tuple(shape)} packs to "
            f"{(*shape[:-1], (shape[-1] + 7) // 8)}; pass the shape that was packed"
        )


def _check_compress(weight: Tensor, mask: Tensor, kept: int | None) -> None:
    check_floats("compress", weight=weight)
    check_devices("compress", weight=weight, mask=mask)
    check_mask("compress", mask, weight.shape)
    _check_axes("compress", "weight", weight)
    if kept is not None and not 0 <= kept <= mask.numel():
        raise ValueError(
            f"compress: kept is {kept}, of a mask of {mask.numel()} entries; "
            "pass the number of True in it"
        )


def _check_decompress(bits: Tensor, values: Tensor, shape: Sequence[int]) -> None:
    check_floats("decompress", values=values)
    check_devices("decompress", bits=bits, values=values)
    check_bits("decompress", bits, shape)
    if values.dim() != 1:
        raise ValueError(f"decompress: values are {tuple(values.shape)}; pass one dimension")


def _check_pack(mask: Tensor) -> None:
    check_mask("pack_mask", mask, mask.shape)
    _check_axes("pack_mask", "mask", mask)


def _check_unpack(bits: Tensor, n: int) -> None:
    _check_axes("unpack_mask", "bits", bits)
    check_bits("unpack_mask", bits, (*bits.shape[:-1], n))


def _pack(mask: Tensor, *, backend: str | None = None) -> Tensor:
    _check_pack(mask)
    return dispatch.run("pack_mask", mask.device, backend, mask)


def _fake_pack(mask: Tensor, *, backend: str | None = None) -> Tensor:
    _check_pack(mask)
    return mask.new_empty((*mask.shape[:-1], (mask.shape[-1] + 7) // 8), dtype=torch.uint8)


def _unpack(bits: Tensor, n: int, *, backend: str | None = None) -> Tensor:
    _check_unpack(bits, n)
    check_padding("unpack_mask", [bits], n)
    return dispatch.run("unpack_mask", bits.device, backend, bits, n)


def _fake_unpack(bits: Tensor, n: int, *, backend: str | None = None) -> Tensor:
    _check_unpack(bits, n)
    return bits.new_empty((*bits.shape[:-1], n), dtype=torch.bool)


def _compress(
    weight: Tensor, mask: Tensor, *, kept: int | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check_compress(weight, mask, kept)
    return dispatch.run("compress", weight.device, backend, weight, mask, kept)


def _fake_compress(
    weight: Tensor, mask: Tensor, *, kept: int | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check_compress(weight, mask, kept)
    size = torch.library.get_ctx().new_dynamic_size() if kept is None else kept
    return _fake_pack(mask), weight.new_empty(size)


def _decompress(
    bits: Tensor, values: Tensor, shape: Sequence[int], *, backend: str | None = None
) -> Tensor:
    _check_decompress(bits, values, shape)
    check_padding("decompress", [bits], shape[-1])
    return dispatch.run("decompress", bits.device, backend, bits, values, shape)


def _fake_decompress(
    bits: Tensor, values: Tensor, shape: Sequence[int], *, backend: str | None = None
) -> Tensor:
    _check_decompress(bits, values, shape)
    return values.new_empty(shape)


dispatch.define("pack_mask(Tensor mask, *, str? backend=None) -> Tensor", _pack, _fake_pack)
dispatch.define(
    "unpack_mask(Tensor bits, SymInt n, *, str? backend=None) -> Tensor", _unpack, _fake_unpack
)
dispatch.define(
    "compress(Tensor weight, Tensor mask, *, SymInt? kept=None, str? backend=None)"
    " -> (Tensor, Tensor)",
    _compress,
    _fake_compress,
)
dispatch.define(
    "decompress(Tensor bits, Tensor values, SymInt[] shape, *, str? backend=None) -> Tensor",
    _decompress,
    _fake_decompress,
)

# Values are moved and not computed with, so that every dtype is taken.
for _name in ("pack_mask", "unpack_mask", "compress", "decompress"):
    dispatch.add(_name, "reference", getattr(reference, _name))
    dispatch.add_kernels(
        _name, getattr(kernel, _name), family="bitmask", refuses=dispatch.takes_all
    )
