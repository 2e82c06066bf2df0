"""ℓ0 averaging as a stream."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedspa_kernels import dispatch
from fedspa_kernels.arguments import check_devices, check_floats, check_mask
from fedspa_kernels.bitmask import decompress, unpack_mask
from fedspa_kernels.l0 import reference
from fedspa_kernels.results import Average, Compressed

# Entries: with their divisors they stay in a CPU's cache, and no temporary asks for new pages.
PART = 2**18


class L0Accumulator:
    """Takes one client at a time and holds two tensors (three with importances), not C.

    average() returns what `l0_average` of the same clients in the same order returns, bit for bit.
    An importance, such as a client's number of samples, makes it Σ n·m·w / Σ n·m.
    """

    def __init__(
        self, shape: Sequence[int], device: torch.device | str | int | None = None
    ) -> None:
        """Start from no clients, for weights of this shape on this device."""
        self._total = torch.zeros(tuple(shape), dtype=torch.float32, device=device)
        self._votes = torch.zeros(tuple(shape), dtype=torch.int32, device=device)
        self._importance: Tensor | None = None  # Σ n·m; the votes are the same while every n is 1
        self._clients = 0

    @property
    def total(self) -> Tensor:
        """Σ importance·m·w so far, float32; not a copy."""
        return self._total

    @property
    def votes(self) -> Tensor:
        """Σ m so far, int32, whatever the importances; not a copy."""
        return self._votes

    @property
    def clients(self) -> int:
        """How many clients were added."""
        return self._clients

    @torch.no_grad()
    def add(self, weight: Tensor, mask: Tensor | None = None, *, importance: float = 1.0) -> None:
        """Add a client's weight: float32, float16 or bfloat16; mask None means weight != 0.

        raises: ValueError where shape, dtype or device do not fit, or the importance is not finite
                and positive; the sums are then as before
        """
        self._check(weight, mask, importance)
        if self._importance is None and importance != 1:
            self._importance = self._votes.float()
        sums = (self._total, self._votes, self._importance)
        dispatch.run("l0_add_", weight.device, None, *sums, weight, mask, importance)
        self._clients += 1

    @torch.no_grad()
    def add_compressed(self, compressed: Compressed, *, importance: float = 1.0) -> None:
        """Add a client's compressed weight; a kept weight that is 0 counts as kept.

        raises: ValueError as `add` and `decompress` do
        """
        if not self._total.dim():
            raise ValueError(
                "L0Accumulator: a 0-dimensional tensor has no compressed form; use add"
            )
        weight = decompress(compressed, self._total.shape)
        self.add(weight, unpack_mask(compressed.bits, weight.shape[-1]), importance=importance)

    @torch.no_grad()
    def merge(
        self,
        sum_: Callable[[Sequence[Tensor]], object],
        clients: int,
        *,
        weighted: bool = False,
    ) -> None:
        """Take in the clients of other accumulators, as of other processes.

        sum_: adds what it is given to the same tensors of all accumulators, in place, as an
            all-reduce does. clients: how many all of them were given.
        weighted: whether any of them was given an importance that is not 1.
        """
        if weighted and self._importance is None:
            self._importance = self._votes.float()
        sums = [self._total, self._votes]
        sum_(sums if self._importance is None else [*sums, self._importance])
        self._clients = clients

    @torch.no_grad()
    def average(self, dtype: torch.dtype = torch.float32) -> Average:
        """Return Average(weight, votes), new tensors, of the clients so far.

        raises: ValueError where no client was added
        """
        return Average(self.weight(dtype), self._votes.clone())

    @torch.no_grad()
    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight of `average` alone, a new tensor.

        raises: ValueError where no client was added
        """
        if not self._clients:
            raise ValueError("L0Accumulator: there are no clients; add at least one")
        kept = self._votes if self._importance is None else self._importance
        if self._total.device.type == "cpu":
            return _divide_in_parts(self._total, kept, dtype)
        return reference.divide(self._total, kept).to(dtype)

    def _check(self, weight: Tensor, mask: Tensor | None, importance: float) -> None:
        check_floats("L0Accumulator", weight=weight)
        check_devices("L0Accumulator", total=self._total, weight=weight, mask=mask)
        if weight.shape != self._total.shape:
            raise ValueError(
                f"L0Accumulator: weight is {tuple(weight.shape)} and the sum "
                f"{tuple(self._total.shape)}; pass one shape"
            )
        if weight.dtype == torch.float64:
            raise ValueError("L0Accumulator: weight is float64 and sums are float32; convert it")
        if mask is not None:
            check_mask("L0Accumulator", mask, weight.shape)
        if not (importance > 0 and math.isfinite(importance)):
            raise ValueError(f"L0Accumulator: importance is {importance}; pass a finite number > 0")


def _divide_in_parts(total: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Return total / kept in a dtype, 0 where nobody kept anything, for contiguous sums on a CPU.

    There the total is 0, and any divisor will do. A choice between quotient and 0 took twice as
    long, and whole temporaries longer again.
    """
    average = total.new_empty(total.shape, dtype=dtype)
    parts = (tensor.view(-1).split(PART) for tensor in (total, kept, average))
    for total_part, kept_part, average_part in zip(*parts, strict=True):
        # Whole votes become float32 once, as a quotient of mixed dtypes does entry by entry.
        divisor = kept_part.masked_fill(kept_part == 0, 1).float()
        average_part.copy_(total_part / divisor)
    return average
