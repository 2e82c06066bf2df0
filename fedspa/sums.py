"""Sums over clients: the only thing that the server does with statistics.

So a secure sum can take the place of the plain one (docs/privacy.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fedspa.pruners import Pruner, additive_kind
from fedspa_kernels import Pruned
from fedspa_kernels.checks import refuse

# Fixed point: 24 bits behind the point. A sum over all clients stays below 2^62, so that nothing
# wraps around; LIMIT is the largest number of one batch.
ONE = 2.0**24
ROOM = 2.0**62
LIMIT = 2.0**30
# The least that squares of one batch must come to on the mean: rounding is then 0.2 % of it.
COARSEST = 256 / ONE
# Rows that are rounded at a time, so that nothing of a hessian's size is written beside it.
PANEL = 256


class Sum(Protocol):
    """Adds up one run of numbers over clients; the only thing that is done with statistics.

    readable: whether what a client sends are its numbers, so that they can be checked one by one;
        of a secure sum only the total can.

    `send` runs at a client, `add` and `total` at the server.
    """

    readable: bool

    def send(self, client: str, values: Tensor) -> Tensor:
        """What a client sends for its values, (numbers,) float32, or int64 in fixed point."""
        ...

    def add(self, client: str, sent: Tensor) -> None:
        """Take in what a client sent."""
        ...

    def total(self) -> Tensor:
        """The sum of the values of all clients that were added, (numbers,) in their dtype."""
        ...


# Opens the sum of one statistic: given its place ("round 0, block 3, layer q_proj") and the clients
# that are expected to take part, in the order in which they will be added.
OpenSum = Callable[[str, Sequence[str]], Sum]


class PlainSum:
    """Numbers in a dtype, added in the order in which they come: floats in float32."""

    readable = True

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        self._total: Tensor | None = None

    def send(self, client: str, values: Tensor) -> Tensor:
        """The values in the dtype of messages."""
        return values.to(self._dtype)

    def add(self, client: str, sent: Tensor) -> None:
        """Add numbers as they came."""
        if self._total is None:
            wide = torch.float32 if sent.is_floating_point() else sent.dtype
            self._total = sent.to(wide, copy=True)
        else:
            self._total += sent

    def total(self) -> Tensor:
        """The sum; raises ValueError where no client was added."""
        if self._total is None:
            raise ValueError("a sum of no clients has no total; add at least one")
        return self._total


def plain_sums(dtype: str) -> OpenSum:
    """Sums of numbers that travel as one of `settings.STATISTICS_DTYPES`."""
    return lambda place, clients: PlainSum(getattr(torch, dtype))


@dataclass(frozen=True)
class FixedPoint:
    """Gathers what a pruner gathers, as whole multiples of 2^-24: int64, whose sums are exact.

    Each batch is rounded once. A sum then does not depend on the order of its batches nor on who
    holds which of them, so that the pruned model is that of the pooled data to the bit.

    clients: how many are added up.
    """

    pruner: Pruner
    clients: int = 1
    needs_inputs: bool = True

    def gather(self, statistic: Tensor | None, inputs: Tensor) -> Tensor:
        """Add a batch (tokens, cols) to a statistic of int64.

        Raises ValueError where a number does not fit, NaN and infinity included, where the sum
        leaves no room for the other clients, or where squares are too small to be rounded.
        """
        found = self.pruner.gather(None, inputs)
        largest = found.abs().amax()
        refuse(~(largest < LIMIT), partial(_explain_overflow, largest))
        squares = squares_of(found, additive_kind(self.pruner))
        if squares is not None:
            mean = squares.sum() / squares.count_nonzero().clamp(min=1)
            refuse((mean > 0) & (mean < COARSEST), partial(_explain_coarse, mean))
        if statistic is None:
            statistic = torch.zeros_like(found, dtype=torch.int64)
        for sums, part in zip(statistic.split(PANEL), found.split(PANEL), strict=True):
            sums += (part.double() * ONE).round_().long()
        # No entry of a hessian is larger than the largest of its diagonal.
        most = statistic if squares is None else squares_of(statistic, additive_kind(self.pruner))
        assert most is not None
        largest = most.abs().amax()
        refuse(largest >= ROOM / self.clients, partial(_explain_full, largest, self.clients))
        return statistic

    def prune(self, *_: Any) -> Pruned:
        """Nobody prunes with numbers in fixed point."""
        raise NotImplementedError("fixed point is for sums; unpack them, and prune with those")


def squares_of(values: Tensor, kind: str) -> Tensor | None:
    """What are sums of squares in a statistic of that kind, or None where nothing need be."""
    if kind == "hessian":
        return values.diagonal()
    return values if kind == "squares" else None


def _explain_coarse(mean: Tensor) -> None:
    raise ValueError(
        f"sums of squares of {float(mean):.3g} on the mean in one batch are too small for fixed "
        f"point, whose steps are {1 / ONE:.3g}; use statistics_dtype float32"
    )


def _explain_full(largest: Tensor, clients: int) -> None:
    raise ValueError(
        f"statistics of {float(largest) / ONE:.3g} leave no room in fixed point for those of "
        f"{clients} clients; use fewer windows, or statistics_dtype float32"
    )


def _explain_overflow(largest: Tensor) -> None:
    raise ValueError(
        f"statistics of magnitude {float(largest):.3g} in one batch do not fit into fixed point, "
        f"which takes up to {LIMIT:.3g}; check the text, or use statistics_dtype float32"
    )


def from_fixed(total: Tensor) -> Tensor:
    """A sum as float32, whether it was added in fixed point or not."""
    return total if total.is_floating_point() else (total.double() / ONE).float()
