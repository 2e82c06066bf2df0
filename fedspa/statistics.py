"""The statistics of a decoder block: what a client sends of it, and what the server adds up.

SparseGPT's hessians and Wanda's squared norms are sums over calibration tokens. Their sum over
clients is that of the pooled data, and nothing else of a client is ever needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from fedspa.calibration import Calibration, shared_inputs
from fedspa.messages import StatisticMessage, StatisticsMessage
from fedspa.ranks import Ranks
from fedspa.sums import ROOM, OpenSum, PlainSum, Sum, from_fixed
from fedspa.triangle import pack_triangle, triangle_diagonal, triangle_size, unpack_triangle
from fedspa_kernels.checks import refuse, together

# What bfloat16 rounds a number by, at most, as a share of it.
ROUNDING = 2.0**-9


def raise_rounded_(hessian: Tensor) -> None:
    """Raise the diagonal of a hessian (cols, cols) by what bfloat16 may have taken, in place.

    Rounded entries may leave one of few tokens indefinite: by less than this share of its diagonal,
    since roundings of a row add up as noise does.
    """
    hessian.diagonal().mul_(1 + ROUNDING * hessian.shape[0] ** 0.5)


class BlockStatistics:
    """The statistics of one block, added up over its clients: memory of one block, whatever C."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        kind: str,
        round_index: int,
        block: int,
        clients: Sequence[str],
        open_sum: OpenSum,
    ) -> None:
        """weights: the block's layers (rows, cols). kind: of the statistic, one of `pruners.SUMS`.

        clients: that take part, in the order in which they will be added; `expected`.
        """
        self.clients = 0
        self.samples = 0
        self._weights = weights
        self._kind = kind
        self._place = (round_index, block)
        self.expected = tuple(clients)
        self._open_sum = open_sum
        self._senders: set[str] = set()
        self._rounded = False
        # Who sent a part of each sum.
        self._parts: dict[tuple[str, ...], set[str]] = {}
        self._sums: dict[tuple[str, ...], Sum] = {}
        self._shapes: dict[tuple[str, ...], tuple[int, ...]] = {}

    @torch.no_grad()
    def message(self, client: str, samples: int, found: Calibration) -> StatisticsMessage:
        """What a client sends of what it gathered; nothing of it is added yet.

        Of layers that none of its tokens reached (an expert's) it sends nothing.
        """
        sent = []
        reached = [name for name in self._weights if name in found.statistics]
        for names in shared_inputs(reached, found.statistics):
            statistic = found.statistics[names[0]]
            values = pack_triangle(statistic) if self._kind == "hessian" else statistic.flatten()
            key = tuple(names)
            values = self._sum(key).send(client, values)
            shape, tokens = tuple(statistic.shape), found.tokens[names[0]]
            sent.append(StatisticMessage(key, shape, tokens, values))
        return StatisticsMessage(client, *self._place, samples, tuple(sent))

    @torch.no_grad()
    def add(self, message: StatisticsMessage) -> None:
        """Add what one client sent.

        Raises ValueError, the sums then being as before, where it is of another block or of nobody
        who was expected, or comes a second time; where its layers or shapes are not this block's or
        not those of the clients before it; where it has counted no token; or where its numbers are
        not finite, or negative where squares are summed.
        """
        with together():
            self._check(message)
        for statistic in message.statistics:
            self._sum(statistic.layers).add(message.sender, statistic.values)
            self._shapes[statistic.layers] = statistic.shape
            self._rounded |= statistic.values.dtype == torch.bfloat16
            self._parts.setdefault(statistic.layers, set()).add(message.sender)
        self._senders.add(message.sender)
        self.clients += 1
        self.samples += message.samples

    def add_other_ranks(self, ranks: Ranks) -> None:
        """Add what the other ranks' clients sent; every rank then has the same sums."""
        own = self.clients, self.samples, self._rounded, self._described()
        described = ranks.gather(own)
        self.clients = sum(clients for clients, *_ in described)
        self.samples = sum(samples for _, samples, *_ in described)
        self._rounded = any(rounded for *_, rounded, _ in described)
        device = next(iter(self._weights.values())).device
        every = {key: of for *_, shapes in described for key, of in shapes.items()}
        self._check_groups(every, "other ranks' clients")
        for key, (shape, numbers, dtype) in every.items():
            total = torch.zeros(numbers, device=device, dtype=dtype)
            if key in self._shapes:
                total.copy_(self._sums[key].total())
            ranks.sum_([total])
            summed = PlainSum(dtype)
            summed.add("all ranks", total)
            self._sums[key], self._shapes[key] = summed, shape

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """The statistic of every layer as the pruner gathers it; layers of one input share it.

        The sums are let go. Raises ValueError where no client was added, where nobody's tokens
        reached a layer, or a total is not finite or negative; and where a client is missing whose
        part a sum that cannot be read needs.
        """
        if not self.clients:
            raise ValueError("no client sent statistics of this block, so it cannot be pruned")
        self._check_complete()
        found: dict[str, Tensor] = {}
        with together():
            for key, shape in self._shapes.items():
                total = self._sums.pop(key).total()
                self._check_values(f"the sum over {self.clients} clients", key, shape, total)
                total = from_fixed(total)
                whole = self._kind == "hessian"
                statistic = unpack_triangle(total, shape[0]) if whole else total.view(shape)
                if whole and self._rounded:
                    raise_rounded_(statistic)
                found |= dict.fromkeys(key, statistic)
        return found

    def _sum(self, layers: tuple[str, ...]) -> Sum:
        if layers not in self._sums:
            round_index, block = self._place
            place = f"round {round_index}, block {block}, layer {' and '.join(layers)}"
            self._sums[layers] = self._open_sum(place, self.expected)
        return self._sums[layers]

    def _described(self) -> dict[tuple[str, ...], tuple[tuple[int, ...], int, torch.dtype]]:
        totals = {key: self._sums[key].total() for key in self._shapes}
        return {key: (self._shapes[key], t.numel(), t.dtype) for key, t in totals.items()}

    def _check_complete(self) -> None:
        reached = {name for key in self._shapes for name in key}
        missed = [name for name in self._weights if name not in reached]
        if missed:
            raise ValueError(
                f"block {self._place[1]}, layer {' and '.join(missed)}: no calibration token of "
                f"any client reached it; add samples"
            )
        for key, sums in self._sums.items():
            missing = [n for n in self.expected if n not in self._parts.get(key, ())]
            if missing and not sums.readable:
                raise ValueError(
                    f"block {self._place[1]}, layer {' and '.join(key)}: "
                    f"{', '.join(map(repr, missing))} did not send their part of a sum that cannot "
                    f"be read without it; begin this block again without them"
                )

    def _check_place(self, message: StatisticsMessage) -> None:
        sender = message.sender
        if (message.round, message.block) != self._place:
            raise ValueError(
                f"{sender!r} sent statistics of round {message.round}, block {message.block}, and "
                f"these are the sums of round {self._place[0]}, block {self._place[1]}"
            )
        if sender in self._senders:
            raise ValueError(f"{sender!r} sent its statistics of block {message.block} twice")
        if sender not in self.expected:
            raise ValueError(
                f"{sender!r} sent statistics of block {message.block}, which was asked of "
                f"{', '.join(map(repr, self.expected))}"
            )

    def _check(self, message: StatisticsMessage) -> None:
        sender, block = message.sender, message.block
        self._check_place(message)
        layers = [name for statistic in message.statistics for name in statistic.layers]
        if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(self._weights):
            raise ValueError(
                f"{sender!r} sent statistics of layers {sorted(layers)} for block {block}, which "
                f"has {sorted(self._weights)}"
            )
        for statistic in message.statistics:
            which = f"{sender!r}, block {block}, layer {' and '.join(statistic.layers)}"
            if statistic.tokens < 1:
                raise ValueError(
                    f"{which}: its statistics count {statistic.tokens} tokens; a client without "
                    f"calibration tokens has nothing to send"
                )
            self._check_shape(which, statistic)
        groups = {statistic.layers: statistic.shape for statistic in message.statistics}
        self._check_groups({**self._shapes, **groups})
        for key, shape in groups.items():
            if self._shapes.get(key, shape) != shape:
                raise ValueError(
                    f"{sender!r}, block {block}, layer {' and '.join(key)}: its statistic has "
                    f"shape {shape}, those of the clients before it {self._shapes[key]}; all "
                    f"clients must run the same model and pruner"
                )
        for statistic in message.statistics:
            if self._sum(statistic.layers).readable:
                self._check_values(sender, statistic.layers, statistic.shape, statistic.values)

    def _check_shape(self, which: str, statistic: StatisticMessage) -> None:
        cols = self._weights[statistic.layers[0]].shape[1]
        wanted: dict[str, tuple[tuple[int, ...], int]] = {
            "hessian": ((cols, cols), triangle_size(cols)),
            "squares": ((cols,), cols),
        }
        shape, numbers = wanted.get(self._kind, (statistic.shape, prod(statistic.shape)))
        if statistic.shape != shape:
            raise ValueError(
                f"{which}: its statistic has shape {statistic.shape}, and the layer's {cols} "
                f"inputs need {shape}"
            )
        readable = self._sum(statistic.layers).readable
        if readable and statistic.values.shape != (numbers,):
            raise ValueError(
                f"{which}: it sent {tuple(statistic.values.shape)} numbers, and {shape} needs "
                f"{numbers}"
            )

    def _check_values(
        self, who: str, layers: tuple[str, ...], shape: tuple[int, ...], values: Tensor
    ) -> None:
        """Refuse numbers that cannot be sums; NaN goes through both extremes."""
        which = f"{who}, block {self._place[1]}, layer {' and '.join(layers)}"
        least, most = values.aminmax()
        # Whole numbers are finite, but must leave room for those of the others.
        finite = least.isfinite() & most.isfinite() & (least > -ROOM) & (most < ROOM)
        refuse(~finite, partial(_explain_infinite, which))
        if self._kind == "hessian":
            least = triangle_diagonal(values, shape[0]).amin()
        if self._kind != "sums":
            refuse(least < 0, partial(_explain_negative, which, least))

    def _check_groups(
        self, groups: Mapping[tuple[str, ...], object], others: str = "the clients before it"
    ) -> None:
        """Refuse groups of layers that overlap, which clients of one model do not have."""
        names = [name for key in groups for name in key]
        if len(set(names)) < len(names):
            raise ValueError(
                f"block {self._place[1]}: some clients send one statistic for layers for which "
                f"{others} send several: {sorted(groups)}; all clients must run the same model and "
                f"pruner"
            )


def _explain_infinite(which: str) -> None:
    raise ValueError(
        f"{which}: statistics are NaN, infinite or too large to be added; check the text, or leave "
        f"out who sent them"
    )


def _explain_negative(which: str, least: Tensor) -> None:
    raise ValueError(
        f"{which}: sums of squares go down to {float(from_fixed(least)):.3g}, and no sum of "
        f"squares is negative; leave out who sent them"
    )
