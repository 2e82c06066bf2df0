"""Sends letters to clients and waits for their answers: deadlines, failures, second tries."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedspa.flower.assignments import Letter
from fedspa.flower.letters import read_letter, write_letter
from fedspa.flower.roster import LOOK, Roster
from fedspa.flower.run_config import Network
from fedspa.flower.tasks import DONE, LACKS, REASONS

log = logging.getLogger("flwr")

# Seconds between two looks at who is connected, and until a client that failed is asked again.
CENSUS, AGAIN = 3.0, 10.0


@dataclass(frozen=True)
class Answer:
    """What came back: done, or which agreed blocks the client lacks; with its frames by name."""

    letter: Letter
    nonce: str
    lacks: tuple[int, ...]
    frames: dict[str, bytes]


@dataclass
class _Round:
    """What is under way of one exchange; by client where nothing else is said."""

    queues: dict[str, list[Letter]]
    # By message: its letter and nonce.
    open: dict[str, tuple[Letter, str]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    again: dict[str, float] = field(default_factory=dict)


class Courier:
    """Carries letters over Flower's network."""

    def __init__(self, grid: Grid, roster: Roster, network: Network) -> None:
        self._grid = grid
        self._roster = roster
        self._network = network

    def carry(
        self,
        queues: Mapping[str, Sequence[Letter]],
        need: int,
        take: Callable[[Answer], None],
        requeue: Callable[[Answer], list[Letter]],
    ) -> dict[str, str]:
        """Send every client its letters one after the other, and hand on the answers as they come.

        queues: letters by the client's name. need: how many clients must have answered their last.
        take: is given each answer. requeue: the letters for a client that lacks agreed blocks.
        returns: by client why it has not answered
        raises: RuntimeError where fewer than `need` answered within deadline and patience
        """
        network, now = self._network, time.monotonic()
        round_ = _Round({name: list(letters) for name, letters in queues.items()})
        deadline, census = now + network.deadline, 0.0
        for name in queues:
            self._send_next(round_, name)
        while len(round_.done) < len(queues):
            self._take_answers(round_, take, requeue)
            now = time.monotonic()
            if now > census:
                census = now + CENSUS
                self._take_census(round_, now)
            if now > deadline or not round_.open:
                if len(round_.done) >= need:
                    break
                if now > deadline + network.patience:
                    raise RuntimeError(self._too_few(round_, need))
            if len(round_.done) < len(queues):
                time.sleep(LOOK)
        late = f"no answer within {network.deadline:g} s"
        return {name: round_.failed.get(name, late) for name in queues if name not in round_.done}

    def _send_next(self, round_: _Round, name: str) -> None:
        letter = round_.queues[name][0]
        nonce = secrets.token_hex(16)
        task = replace(letter.task, nonce=nonce)
        frames = {str(block): path.read_bytes() for block, (path, _) in letter.frames.items()}
        message = Message(
            write_letter(task.to_record(), frames),
            self._roster.node_of(name),
            letter.kind,
            ttl=self._network.deadline + self._network.patience,
        )
        letter.member.bytes_down += sum(payload for _, payload in letter.frames.values())
        letter.member.wire_down += sum(map(len, frames.values()))
        (message_id,) = self._grid.push_messages([message])
        if message_id:
            round_.open[message_id] = letter, nonce
            round_.failed.pop(name, None)
        else:
            self._fail(round_, name, "its node is not connected")

    def _take_answers(
        self,
        round_: _Round,
        take: Callable[[Answer], None],
        requeue: Callable[[Answer], list[Letter]],
    ) -> None:
        """Take what has arrived, a message at a time: memory holds no more than one."""
        for message_id, (letter, nonce) in list(round_.open.items()):
            for reply in self._grid.pull_messages([message_id]):
                del round_.open[message_id]
                name = letter.member.name
                try:
                    answer = _read(reply, letter, nonce)
                except ValueError as error:
                    self._fail(round_, name, str(error))
                    continue
                if answer.lacks:
                    round_.queues[name] = requeue(answer)
                    self._send_next(round_, name)
                    continue
                take(answer)
                if letter.last:
                    round_.done.add(name)
                else:
                    round_.queues[name] = round_.queues[name][1:]
                    self._send_next(round_, name)

    def _take_census(self, round_: _Round, now: float) -> None:
        """Give up letters to nodes that have left; ask clients again that failed, or are back."""
        back = self._roster.welcome_back()
        online = self._roster.online()
        for message_id, (letter, _) in list(round_.open.items()):
            name = letter.member.name
            if name in back or self._roster.node_of(name) not in online:
                del round_.open[message_id]
                self._fail(round_, name, "its node left")
        for name in list(round_.failed):
            again = now > round_.again[name] and self._roster.node_of(name) in online
            if name in back or again:
                self._send_next(round_, name)

    def _fail(self, round_: _Round, name: str, why: str) -> None:
        round_.failed[name] = why
        round_.again[name] = time.monotonic() + AGAIN
        log.warning("fedspa: %r: %s", name, why)

    def _too_few(self, round_: _Round, need: int) -> str:
        late = f"no answer within {self._network.deadline:g} s"
        missing = [name for name in round_.queues if name not in round_.done]
        why = "; ".join(f"{name!r}: {round_.failed.get(name, late)}" for name in missing)
        return (
            f"{len(round_.done)} of {len(round_.queues)} clients answered, and min-clients is "
            f"{need} ({why}); mend these clients and start the run again, which goes on after the "
            f"last finished block"
        )


def _read(reply: Message, letter: Letter, nonce: str) -> Answer:
    """A client's answer; raises ValueError where it has failed, in the server's own words."""
    if reply.has_error():
        # Flower's text holds that of the client's exception.
        raise ValueError("its app crashed or could not be reached; its own log says more")
    record, frames = read_letter(reply.content)
    if record.get("nonce") != nonce:
        raise ValueError("it answered another task than it was asked")
    code = record.get("code")
    if code not in (DONE, LACKS):
        raise ValueError(REASONS.get(str(code), REASONS["failed"]))
    lacks = _numbers(record.get("lacks"))
    if (code == LACKS) != bool(lacks) or not set(lacks) <= set(letter.task.holds):
        raise ValueError("it lacks blocks that it was not to have")
    return Answer(letter, nonce, lacks, frames)


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError("it answered something else than a list of blocks")
    return tuple(values)
