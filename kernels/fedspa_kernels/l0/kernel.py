"""What the kernels of this family compute, and how the operators call them.

All tensors are contiguous; weights are float32, float16 or bfloat16. Nothing is ever stacked: the
kernels read every client's tensor where it lies.

l0_average(weights, masks) -> (average, votes)
    weights, masks: lists of C tensors of one shape; masks may be empty: m = (w != 0)
    average: Σ m·w / Σ m in float32, in the clients' order, in the weights' dtype; 0 without votes
    votes:   Σ m, int32

l0_average_compressed(bits, values, offsets, n, segment) -> (average (rows, n), votes (rows, n))
    lists of C tensors, as in bitmask/kernel.py: (rows, ceil(n/8)), (kept,) and (segments,)

l0_add_(total, votes, kept, weight, mask, importance) -> None
    total (float32) += importance·m·w, votes (int32) += m, kept (float32, or None) += importance·m;
    mask may be None: m = (w != 0)
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedspa_kernels.bitmask.kernel import SEGMENT, rows_of, segment_offsets
from fedspa_kernels.bitmask.values import check_count
from fedspa_kernels.checks import refuse


def l0_average(
    kernels: Any, weights: list[Tensor], masks: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Average dense clients in one pass."""
    return kernels.l0_average(
        [weight.contiguous() for weight in weights], [mask.contiguous() for mask in masks or ()]
    )


def l0_average_compressed(
    kernels: Any, bits: list[Tensor], values: list[Tensor], shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Average compressed clients in one pass, after one over the bits that finds the values."""
    if not math.prod(shape):
        for client, client_values in enumerate(values):
            check_count("l0_average_compressed", 0, client_values, f" of client {client}")
        return values[0].new_empty(shape), values[0].new_empty(shape, dtype=torch.int32)
    clients, n = [], 0
    for client_bits in bits:
        row_bits, n = rows_of(client_bits, shape)
        clients.append(row_bits)
    offsets, ends = zip(*(segment_offsets(kernels, client, n) for client in clients), strict=True)
    counted = torch.stack(ends)
    there = torch.tensor([len(client_values) for client_values in values])
    # All counts in one answer: each would wait for the GPU on its own.
    wrong = counted != there.to(counted.device, non_blocking=True)
    if not refuse(wrong, partial(_explain_counts, counted, values)):
        # The kernel moves a value for each bit: with more bits than values, beyond their end.
        pairs = zip(clients, wrong, strict=True)
        clients = [client_bits.masked_fill(is_wrong, 0) for client_bits, is_wrong in pairs]
    values = [client_values.contiguous() for client_values in values]
    average, votes = kernels.l0_average_compressed(clients, values, list(offsets), n, SEGMENT)
    return average.view(*shape), votes.view(*shape)


def _explain_counts(counted: Tensor, values: list[Tensor]) -> None:
    for client, kept in enumerate(counted.tolist()):
        check_count("l0_average_compressed", kept, values[client], f" of client {client}")


def l0_add_(
    kernels: Any,
    total: Tensor,
    votes: Tensor,
    kept: Tensor | None,
    weight: Tensor,
    mask: Tensor | None,
    importance: float,
) -> None:
    """Add one client to the sums."""
    mask = None if mask is None else mask.contiguous()
    kernels.l0_add_(total, votes, kept, weight.contiguous(), mask, importance)
