"""What the server checks of a client's frame before it is added to anything."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from fedspa.blocks import views
from fedspa.flower.client_work import shapes_of
from fedspa.members import Member, Run
from fedspa.messages import BlockMessage, StatisticsMessage
from fedspa.pruners import additive_kind
from fedspa.schedule import message_dtype, round_target
from fedspa.triangle import triangle_size
from fedspa.wire import (
    Envelope,
    Expected,
    decode,
    judge_definite,
    judge_finite,
    judge_mean_squares,
    judge_statistics,
    judge_weights,
    mean_squares,
    square_limits,
)
from fedspa.work import support_of
from fedspa_kernels.arguments import parse_pattern

Message = BlockMessage | StatisticsMessage
# Pruners that leave the weights that they keep as they are.
UNCHANGED = ("magnitude", "wanda")
# Of a frame beside its numbers.
HEADER = 2**20 + 2**10


class Checks:
    """The checks of one block's frames, which are `readable`; a client's when its turn comes."""

    def __init__(
        self, run: Run, block: nn.Module, round_index: int, index: int, norm_bound: float
    ) -> None:
        """block: as it is before this round."""
        self._run = run
        self._block = block
        self._place = round_index, index
        self._bound = norm_bound
        self._support = support_of(run, index)
        self._squares: dict[str, dict[tuple[str, ...], float]] = {}
        self._groups: Counter[tuple[str, ...]] = Counter()

    def compare(self, member: Member, frame: bytes, envelope: Envelope) -> None:
        """Look at the size of a client's statistics first: the others' are its measure."""
        message = self._decoded(member, frame, envelope)
        assert isinstance(message, StatisticsMessage)
        self._squares[member.name] = mean_squares(message, additive_kind(self._run.pruner))
        self._groups.update(self._squares[member.name].keys())

    def checked(self, member: Member, frame: bytes, envelope: Envelope) -> Message:
        """A client's message on the block's device; raises ValueError where it is not believed."""
        message = self._decoded(member, frame, envelope)
        round_index, index = self._place
        if isinstance(message, BlockMessage):
            message = _moved(message, self._run.blocks.device)
            target = round_target(self._run.settings, round_index, member.client.sparsity)
            judge_weights(
                message,
                views(self._block),
                target,
                self._support,
                self._bound,
                unchanged=self._run.settings.pruner in UNCHANGED,
            )
            return message
        most = member.client.tokens.numel()
        for statistic in message.statistics:
            if statistic.tokens > most:
                raise ValueError(
                    f"{member.name!r}, block {index}: its statistics count {statistic.tokens} "
                    f"tokens, and its windows have {most}"
                )
            self._judge_group(member, statistic.layers)
        limits = square_limits(list(self._squares.values()), self._bound)
        judge_mean_squares(message, self._squares[member.name], limits)
        moved = tuple(
            replace(statistic, values=statistic.values.to(self._run.blocks.device))
            for statistic in message.statistics
        )
        return replace(message, statistics=moved)

    def definite(self, member: Member, frame: bytes, envelope: Envelope) -> None:
        """Raise ValueError unless a client's hessians can be factorised as the sum must be."""
        message = self._decoded(member, frame, envelope)
        if isinstance(message, StatisticsMessage) and additive_kind(self._run.pruner) == "hessian":
            judge_definite(message, self._run.settings.damping)

    def _judge_group(self, member: Member, layers: tuple[str, ...]) -> None:
        """Refuse layers of one statistic that most other clients have several for, or with others.

        All run one model, and so only one grouping is true; experts that no token reached are
        missing from it.
        """
        for other, votes in self._groups.items():
            if other != layers and set(other) & set(layers) and votes > self._groups[layers]:
                raise ValueError(
                    f"{member.name!r}, block {self._place[1]}: it sends one statistic for layers "
                    f"{layers}, and {votes} clients send one for {other}; all must run the same "
                    f"model"
                )

    def _decoded(self, member: Member, frame: bytes, envelope: Envelope) -> Message:
        round_index, index = self._place
        return decode(frame, _expected(self._run, member, round_index, index, envelope))


def readable(
    run: Run, member: Member, round_index: int, index: int, frame: bytes, envelope: Envelope
) -> None:
    """What can be said of a frame by itself, before the block and the others' are there.

    Raises ValueError where it is not what was asked for, or where its numbers cannot be.
    """
    message = decode(frame, _expected(run, member, round_index, index, envelope))
    if isinstance(message, StatisticsMessage):
        judge_statistics(message, additive_kind(run.pruner))
    else:
        judge_finite(message)


def _expected(
    run: Run, member: Member, round_index: int, index: int, envelope: Envelope
) -> Expected:
    settings, block = run.settings, run.blocks.modules[index]
    dtype: torch.dtype | None
    if settings.aggregation == "statistics":
        kind, dtype = additive_kind(run.pruner), getattr(torch, settings.statistics_dtype)
    elif settings.aggregation == "mask":
        kind, dtype = "mask", None
    else:
        weight = next(iter(views(block).values()))
        kind, dtype = "weights", message_dtype(settings) or weight.dtype
    return Expected(
        envelope=envelope,
        sender=member.name,
        round=round_index,
        block=index,
        samples=member.samples,
        shapes=shapes_of(block),
        kind=kind,
        dtype=dtype,
    )


def frame_limit(run: Run, index: int) -> int:
    """Bytes that a client's frame of a block has at most, whatever it kept."""
    return HEADER + int(_payload(run, index, kept=1.0))


def frame_size(run: Run, index: int, round_index: int) -> float:
    """Bytes that a client's frame of a block comes to when it keeps what it should."""
    target = round_target(run.settings, round_index)
    if target.sparsity is not None:
        return _payload(run, index, kept=1 - target.sparsity)
    assert target.pattern is not None
    kept, of = parse_pattern("settings", target.pattern, width=0)
    return _payload(run, index, kept=kept / of)


def _payload(run: Run, index: int, *, kept: float) -> float:
    settings, block = run.settings, run.blocks.modules[index]
    shapes = shapes_of(block).values()
    if settings.aggregation == "statistics":
        size = getattr(torch, settings.statistics_dtype).itemsize
        whole = additive_kind(run.pruner) == "hessian"
        return float(sum(size * (triangle_size(cols) if whole else cols) for _, cols in shapes))
    bits = sum(rows * -(-cols // 8) for rows, cols in shapes)
    if settings.aggregation == "mask":
        return float(bits)
    weight = next(iter(views(block).values()))
    size = (message_dtype(settings) or weight.dtype).itemsize
    return bits + kept * sum(rows * cols * size for rows, cols in shapes)


def _moved(message: BlockMessage, device: torch.device) -> BlockMessage:
    if device.type == "cpu":
        return message
    return replace(
        message,
        layers={
            name: replace(
                layer,
                bits=layer.bits.to(device),
                values=None if layer.values is None else layer.values.to(device),
            )
            for name, layer in message.layers.items()
        },
    )
