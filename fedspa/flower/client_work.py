"""A client's answer to a task: walk to where it begins, work on its blocks, keep the place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from torch import nn

from fedspa.blocks import views
from fedspa.flower.site import Site
from fedspa.flower.tasks import Task
from fedspa.members import Member
from fedspa.messages import BlockMessage, StatisticsMessage
from fedspa.model import linear_layers, weight_of
from fedspa.pruners import additive_kind
from fedspa.rounds import block_counts, embed_all, restore_arguments
from fedspa.schedule import message_dtype
from fedspa.settings import Settings
from fedspa.statistics import BlockStatistics
from fedspa.wire import Envelope, Expected, decode, encode
from fedspa.work import gather_and_send, pass_by, prune_and_send, walk_again

log = logging.getLogger("flwr")

# The sender of agreed blocks, and the task that they name: they go to every client as they are.
SERVER, AGREED = "server", "agreed"
Message = BlockMessage | StatisticsMessage


@dataclass(frozen=True)
class Outcome:
    """What a client answers: a frame for each block that it worked on, or the blocks it lacks."""

    frames: dict[int, bytes]
    lacks: tuple[int, ...] = ()


def answer(site: Site, task: Task, received: Mapping[int, bytes]) -> Outcome:
    """Take the agreed blocks that came with a task, and do its work.

    received: frames of agreed blocks
    raises:   ValueError where a frame is not what the server agreed on, or where this client's
              data or model cannot be worked with
    """
    try:
        return _answer(site, task, received)
    except (SafetensorError, FileNotFoundError) as error:
        log.warning("fedspa: what was kept cannot be read (%s), and is had again", error)
        site.reset()
        lacks = lacking(site, task)
        return Outcome({}, lacks) if lacks else _answer(site, task, {})


def _answer(site: Site, task: Task, received: Mapping[int, bytes]) -> Outcome:
    _check_drawn(site, task)
    receive(site, task, received)
    lacks = lacking(site, task)
    if lacks:
        return Outcome({}, lacks)
    begin, end = task.blocks
    if begin == end:
        return Outcome({})
    site.run.members[0].drawn.append(task.drawn)
    frames: dict[int, bytes] = {}
    envelope = Envelope(task.model, task.run, task.nonce)

    def keep(message: Message) -> None:
        frames[message.block] = encode(message, envelope)

    _walk_to(site, task)
    for index in range(begin, end):
        _work_on(site, task, index, keep)
        log.info("fedspa: round %d, block %d of this client is done", task.round, index)
    if end < task.together[1]:
        _keep_ahead(site, task, end)
    return Outcome(frames)


def _check_drawn(site: Site, task: Task) -> None:
    """Refuse more blocks than this client's capacity allows."""
    member, blocks = site.run.members[0], len(site.run.blocks)
    (most,) = block_counts([member], blocks, site.run.settings)
    if len(task.drawn) > most or not set(task.drawn) <= set(range(blocks)):
        raise ValueError(
            f"the server wants {len(task.drawn)} blocks of this client in a round, and its "
            f"capacity {member.client.capacity} allows {most} of {blocks}"
        )


def receive(site: Site, task: Task, received: Mapping[int, bytes]) -> None:
    """Bring agreed blocks to the disk; a frame that is not as agreed raises ValueError."""
    for index, frame in sorted(received.items()):
        if index not in task.holds:
            raise ValueError(f"the server sent block {index}, which its task does not speak of")
        message = decode(frame, _agreed(site, task, index))
        assert isinstance(message, BlockMessage)
        site.blocks.receive(index, message)
    if received:
        site.commit()


def lacking(site: Site, task: Task) -> tuple[int, ...]:
    """The agreed blocks that a task needs and this client does not have."""
    return tuple(b for b, version in task.holds.items() if site.kept.versions.get(b) != version)


def agreed_kind(settings: Settings) -> str:
    """What an agreed block travels as: "mask", or "weights"."""
    return "mask" if settings.aggregation == "mask" and not settings.scaling else "weights"


def shapes_of(block: nn.Module) -> dict[str, tuple[int, int]]:
    """The shape (rows, cols) of every layer of a block."""
    layers = linear_layers(block)
    return {name: (weight_of(x).shape[0], weight_of(x).shape[1]) for name, x in layers.items()}


def _agreed(site: Site, task: Task, index: int) -> Expected:
    settings, module = site.run.settings, site.run.blocks.modules[index]
    kind = agreed_kind(settings)
    return Expected(
        envelope=Envelope(task.model, task.run, AGREED),
        sender=SERVER,
        round=task.holds[index],
        block=index,
        samples=0,
        shapes=shapes_of(module),
        kind=kind,
        dtype=None if kind == "mask" else message_dtype(settings) or site.source.dtype,
    )


def _walk_to(site: Site, task: Task) -> None:
    """Bring the hidden states to where a task's first block begins, from the nearest place."""
    run, start, begin = site.run, task.together[0], task.blocks[0]
    if not run.pruner.needs_inputs:
        return
    at = _restored_ahead(site, task)
    if at is None:
        _walk_agreed(site, task, start)
        at = start
    for index in range(at, begin):
        # Its answer was lost, or the server was: what comes of it is the same again.
        _work_on(site, task, index, lambda message: None)


def _walk_agreed(site: Site, task: Task, start: int) -> None:
    """Walk through what was agreed on up to where an exchange begins, and keep that place."""
    run, base = site.run, site.kept.base
    found = base and base["round"] == task.round and base["block"] <= start
    at = base["block"] if base and found and _restored(site, base) else None
    if at == start:
        return
    # Generations that are written from here on may take the numbers of those ahead.
    site.kept.ahead = []
    if at is None:
        site.kept.base = None
    site.commit()
    if at is None:
        embed_all(run)
        at = 0
    for index in range(at, start):
        walk_again(run, index, index)
        site.trim()
    site.kept.base = site.place(round=task.round, block=start)
    site.commit()


def _restored_ahead(site: Site, task: Task) -> int | None:
    """Take up the last place that this client walked ahead to, if there is one; its block."""
    start, begin = task.together[0], task.blocks[0]
    for place in reversed(site.kept.ahead):
        fits = (place["round"], place["start"]) == (task.round, start) and place["block"] <= begin
        if fits and _restored(site, place):
            return int(place["block"])
    return None


def _restored(site: Site, place: dict[str, Any]) -> bool:
    if place["setup"] != site.setup:
        return False
    try:
        site.hidden.restore(place["hidden"])
    except RuntimeError as error:
        log.warning("fedspa: %s; this client walks from further back", error)
        return False
    restore_arguments(site.run)
    return True


def _keep_ahead(site: Site, task: Task, end: int) -> None:
    """Keep the place behind this client's own blocks; the former one too, if it is asked again."""
    if not site.run.pruner.needs_inputs:
        return
    place = site.place(round=task.round, start=task.together[0], block=end)
    site.kept.ahead = [*site.kept.ahead[-1:], place]
    site.commit()


def _work_on(site: Site, task: Task, index: int, send: Callable[[Message], None]) -> None:
    """One block of this client's, and on through what it made of it within an exchange."""
    run, (member,) = site.run, site.run.members
    ahead = index + 1 != task.together[1]
    with run.blocks.open(index) as block:
        if index not in member.drawn[-1]:
            if ahead:
                pass_by(run, block, member, index)
        elif run.settings.aggregation == "statistics":
            sums = _sums(site, task, block, member, index)
            gather_and_send(run, block, member, task.round, index, sums, send, ahead=ahead)
        else:
            prune_and_send(run, block, member, task.round, index, send, ahead=ahead)
    site.trim()


def _sums(site: Site, task: Task, block: nn.Module, member: Member, index: int) -> BlockStatistics:
    """What this client makes its message with; the server adds it to the others'."""
    kind = additive_kind(site.run.pruner)
    # In fixed point there must be room for as many as are asked, whoever they are.
    clients = [member.name] * task.asked.get(index, 1)
    return BlockStatistics(views(block), kind, task.round, index, clients, site.run.open_sum)
