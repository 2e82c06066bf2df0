"""FedSpaLLM's aggregation: average each weight over the clients that kept it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedspa_kernels import dispatch
from fedspa_kernels.arguments import check_devices, check_floats, check_mask
from fedspa_kernels.bitmask import check_bits
from fedspa_kernels.bitmask.values import check_padding
from fedspa_kernels.l0 import kernel, reference
from fedspa_kernels.l0.accumulator import L0Accumulator
from fedspa_kernels.results import Average, Compressed

__all__ = ["L0Accumulator", "l0_average", "l0_average_compressed"]


def l0_average(
    weights: Sequence[Tensor] | Tensor,
    masks: Sequence[Tensor] | Tensor | None = None,
    *,
    backend: str | None = None,
) -> Average:
    """Average over the clients that kept a weight: Σ m·w / Σ m, 0 where nobody kept it.

    Bai et al. 2025 (FedSpaLLM), the ℓ0-norm aggregation. Sums are float32, in the given order. A
    sequence is never stacked. `L0Accumulator` is the same, one client at a time.

    weights: C >= 1 tensors of one shape, or (C, ...); float32, float16 or bfloat16; or float64,
             the truth for tests
    masks:   likewise, bool, True = kept; None means w != 0
    returns: Average(weight, votes): the weights' dtype, and Σ m as int32
    raises:  ValueError where there are no clients, or shapes, dtypes, devices or numbers disagree
    """
    per_client = None if masks is None else list(masks)
    return Average(*torch.ops.fedspa.l0_average(list(weights), per_client, backend=backend))


def l0_average_compressed(
    clients: Sequence[Compressed], shape: Sequence[int], *, backend: str | None = None
) -> Average:
    """Average compressed clients as `l0_average` does with their masks, without unpacking them.

    clients: C >= 1 results of `compress`, of weights of one shape and dtype
    shape:   the weights' shape, (..., n)
    returns: Average(weight, votes): the values' dtype, and Σ m as int32
    raises:  ValueError where there are no clients, dtypes or devices disagree, or the bits of one
             do not fit the shape, or its values the bits
    """
    bits, values = [client.bits for client in clients], [client.values for client in clients]
    return Average(
        *torch.ops.fedspa.l0_average_compressed(bits, values, list(shape), backend=backend)
    )


def _check(weights: list[Tensor], masks: list[Tensor] | None) -> None:
    if not weights:
        raise ValueError("l0_average: there are no clients; pass at least one weight")
    if masks is not None and len(masks) != len(weights):
        raise ValueError(
            f"l0_average: {len(weights)} weights and {len(masks)} masks; pass a mask a client"
        )
    first = weights[0]
    check_floats("l0_average", weight=first)
    for client, weight in enumerate(weights):
        if weight.shape != first.shape or weight.dtype != first.dtype:
            raise ValueError(
                f"l0_average: weight of client {client} is {tuple(weight.shape)} {weight.dtype} "
                f"and that of client 0 {tuple(first.shape)} {first.dtype}; pass one shape and dtype"
            )
        mask = None if masks is None else masks[client]
        check_devices("l0_average", first=first, weight=weight, mask=mask)
        if mask is not None:
            check_mask("l0_average", mask, first.shape)


def _body(
    weights: list[Tensor], masks: list[Tensor] | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check(weights, masks)
    return dispatch.run("l0_average", weights[0].device, backend, weights, masks)


def _fake(
    weights: list[Tensor], masks: list[Tensor] | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check(weights, masks)
    shape = weights[0].shape
    return weights[0].new_empty(shape), weights[0].new_empty(shape, dtype=torch.int32)


def _check_compressed(bits: list[Tensor], values: list[Tensor], shape: Sequence[int]) -> None:
    operator = "l0_average_compressed"
    if not bits:
        raise ValueError(f"{operator}: there are no clients; pass at least one")
    if len(bits) != len(values):
        raise ValueError(
            f"{operator}: {len(bits)} times bits and {len(values)} times values; "
            "pass both for every client"
        )
    check_floats(operator, values=values[0])
    for client, (client_bits, client_values) in enumerate(zip(bits, values, strict=True)):
        check_devices(operator, first=values[0], bits=client_bits, values=client_values)
        check_bits(operator, client_bits, shape)
        if client_values.dim() != 1 or client_values.dtype != values[0].dtype:
            raise ValueError(
                f"{operator}: values of client {client} are {tuple(client_values.shape)} "
                f"{client_values.dtype}; pass one dimension, of one dtype for all clients"
            )


def _body_compressed(
    bits: list[Tensor], values: list[Tensor], shape: Sequence[int], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check_compressed(bits, values, shape)
    check_padding("l0_average_compressed", bits, shape[-1])
    return dispatch.run("l0_average_compressed", values[0].device, backend, bits, values, shape)


def _fake_compressed(
    bits: list[Tensor], values: list[Tensor], shape: Sequence[int], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check_compressed(bits, values, shape)
    return values[0].new_empty(shape), values[0].new_empty(shape, dtype=torch.int32)


dispatch.define(
    "l0_average(Tensor[] weights, Tensor[]? masks=None, *, str? backend=None) -> (Tensor, Tensor)",
    _body,
    _fake,
)
dispatch.define(
    "l0_average_compressed(Tensor[] bits, Tensor[] values, SymInt[] shape, *, str? backend=None)"
    " -> (Tensor, Tensor)",
    _body_compressed,
    _fake_compressed,
)
# l0_add_ is the step of L0Accumulator, which has its checks.
for _name in ("l0_average", "l0_average_compressed", "l0_add_"):
    dispatch.add(_name, "reference", getattr(reference, _name))
    dispatch.add_kernels(_name, getattr(kernel, _name), family="l0")
