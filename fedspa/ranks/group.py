"""The ranks of a run: how they divide work, add up what they found, and agree."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fedspa.ranks.peers import name_ranks
from fedspa.ranks.watch import Watch

SPLITS = ("samples", "clients")
Divisible = TypeVar("Divisible", bound=Sequence[Any] | Tensor)
_SUMMED = (torch.float32, torch.float64, torch.int32, torch.int64)


class Ranks:
    """This process among `size` equal ones, which all call the same methods in the same order.

    split: what they divide, None where there is but one. device: where this one computes.

    Used as a context: an exception in it is told to the others, which then end at once with a
    sentence that names this rank, as they do where it dies without a word. A method that waits for
    other ranks raises RuntimeError with that sentence, or the watch ends the process with it.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        split: str | None,
        device: torch.device | None,
        watch: Watch | None = None,
    ) -> None:
        self.rank, self.size, self.split, self.device = rank, size, split, device
        self._watch = watch

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes the output."""
        return self.rank == 0

    def mine(self, sequence: Divisible) -> Divisible:
        """This rank's contiguous part; sizes differ by at most one, and rank order is kept."""
        begin, end = (len(sequence) * rank // self.size for rank in (self.rank, self.rank + 1))
        return sequence[begin:end]  # type: ignore[return-value]

    def owner(self, loads: Sequence[float]) -> list[int]:
        """The rank that does each piece of work: the largest first, to whom has the least.

        loads: the work of each piece, in any unit. Equal on all ranks where the loads are.
        """
        held = [0.0] * self.size
        owners = [0] * len(loads)
        for piece in sorted(range(len(loads)), key=lambda piece: -loads[piece]):
            owners[piece] = min(range(self.size), key=held.__getitem__)
            held[owners[piece]] += loads[piece]
        return owners

    def check_enough(self, parts: int, what: str) -> None:
        """Refuse a division that leaves a rank without work: ValueError.

        parts: how many `what` ("clients", "samples of client a") are divided over the ranks.
        """
        if parts < self.size:
            raise ValueError(
                f"{self.size} ranks cannot divide {parts} {what}; start at most {parts} of them "
                f"(torchrun --nproc-per-node), or divide something else (--split)"
            )

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up each tensor over the ranks, in place; every rank gets the same bits.

        tensors: float32, float64, int32 or int64, of any strides, on the CPU or this rank's device;
            as many and of the same shapes on every rank. Raises ValueError for another dtype.
        """
        for tensor in tensors:
            if tensor.dtype not in _SUMMED:
                raise ValueError(f"sum_: {tensor.dtype} is not summed over ranks; use float32")
        for tensor in self._exchanged(tensors):
            dense = tensor.contiguous()
            with self.naming():
                dist.all_reduce(dense)
            if dense is not tensor:
                tensor.copy_(dense)

    @torch.no_grad()
    def share(self, owner_rank: int, tensors: Sequence[Tensor]) -> None:
        """Give every rank what `owner_rank` holds in each tensor, in place, of any dtype."""
        for tensor in self._exchanged(tensors):
            dense = tensor.contiguous()
            # As bytes, since neither gloo nor NCCL sends every dtype.
            with self.naming():
                dist.broadcast(dense.view(-1).view(torch.uint8), owner_rank)
            if dense is not tensor:
                tensor.copy_(dense)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks. value: plain and small; it is pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.naming():
            dist.all_gather_object(values, value)
        return values

    def check_same(self, topic: str, value: dict[str, str]) -> None:
        """Refuse to go on where ranks differ: ValueError, on all of them alike.

        topic: what is compared, as in "settings". value: what this rank has for each key.
        """
        values = self.gather(value)
        for key in dict.fromkeys(key for each in values for key in each):
            held: dict[str | None, list[int]] = {}
            for rank, each in enumerate(values):
                held.setdefault(each.get(key), []).append(rank)
            if len(held) > 1:
                told = ", ".join(
                    f"{'missing' if found is None else found} on {name_ranks(ranks)}"
                    for found, ranks in held.items()
                )
                raise ValueError(
                    f'ranks disagree on {topic}: "{key}" is {told}; start every rank with the same '
                    f"command and files"
                )

    def barrier(self) -> None:
        """Wait until every rank is here; work that a GPU still does is not waited for."""
        if self.size > 1:
            with self.naming():
                dist.all_reduce(torch.zeros(1))

    def close(self) -> None:
        """Wait until every rank has finished, and leave them; a second time it does nothing.

        raises: RuntimeError where a rank ends before it has finished
        """
        watch, self._watch = self._watch, None
        if watch is not None:
            # Together, since a connection that is closed early may lose what a slower rank awaits.
            watch.finish()
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        watch, self._watch = self._watch, None
        if watch is not None:
            _tell(watch, error)

    def _exchanged(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """The tensors that have anything to exchange."""
        return (tensor for tensor in tensors if self.size > 1 and tensor.numel())

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Let an error of a connection name the rank that ended."""
        try:
            yield
        except RuntimeError as error:
            ended = self._watch.who_ended() if self._watch is not None else None
            if ended is None:
                ended = (
                    f"{name_ranks([self.rank], self.size)} lost another one, though all of them "
                    f"are alive: {_line(error)}"
                )
            raise RuntimeError(ended) from error


def _tell(watch: Watch, error: BaseException) -> None:
    """Tell the others why this rank ends, and the user where that is another's fault."""
    ended = watch.fail(_line(error))
    if not isinstance(error, Exception) and _line(error) not in ended:
        # torchrun ends all ranks by a signal once one has died; the signal alone explains nothing.
        print(f"Error: {ended}", file=sys.stderr, flush=True)


def _line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines[0] else type(error).__name__
