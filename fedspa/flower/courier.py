"""Sends letters to clients and waits for their answers: deadlines, failures, second tries."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedspa.flower.assignments import Letter
from fedspa.flower.letters import pull, read_letter, write_letter
from fedspa.flower.roster import LOOK, Roster
from fedspa.flower.run_config import Network
from fedspa.flower.tasks import DONE, FINAL, LACKS, REASONS, STRANGER

log = logging.getLogger("flwr")

# Seconds between two looks at who is connected, and until a client that failed is asked again:
# at first, and twice as long every time, up to the last.
CENSUS, AGAIN, LONGEST = 3.0, 10.0, 320.0
# How often a client may say in one exchange that it lacks blocks.
MOST_LACKS = 3


@dataclass(frozen=True)
class Answer:
    """What came back: done, or which agreed blocks the client lacks; with its frames by name."""

    letter: Letter
    nonce: str
    lacks: tuple[int, ...]
    frames: dict[str, bytes]


class _Failed(ValueError):
    """A client's failure, which it gave a code of; the words are the server's."""

    def __init__(self, code: str) -> None:
        super().__init__(REASONS.get(code, REASONS["failed"]))
        self.code = code


@dataclass
class _Open:
    """A letter under way: since when, and whether it is still waited for."""

    letter: Letter
    nonce: str
    since: float
    waited: bool = True


@dataclass
class _Exchange:
    """What is under way: letters by their message, all else by client."""

    queues: dict[str, list[Letter]]
    open: dict[str, _Open] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    # When a client that failed is asked again; one whose failure is final is not in it.
    again: dict[str, float] = field(default_factory=dict)
    pauses: dict[str, float] = field(default_factory=dict)
    lacks: dict[str, int] = field(default_factory=dict)


class Courier:
    """Carries letters over Flower's network."""

    def __init__(self, grid: Grid, roster: Roster, network: Network) -> None:
        self._grid = grid
        self._roster = roster
        self._network = network

    def carry(
        self,
        queues: Mapping[str, Sequence[Letter]],
        enough: Callable[[Set[str]], bool],
        take: Callable[[Answer], None],
        requeue: Callable[[Letter, tuple[int, ...]], list[Letter]],
        waited: Mapping[str, float],
    ) -> dict[str, str]:
        """Send every client its letters one after the other, and hand on the answers as they come.

        queues:  letters by the client's name
        enough:  whether these clients suffice, which have answered their last letter
        take:    is given each answer; raises ValueError where it is of no use
        requeue: the letters for a client that lacks agreed blocks, given its last letter
        waited:  for how many seconds after a letter its client is waited for; others are not
        returns: by client why it has not answered
        raises:  RuntimeError where there are not enough within deadline and patience
        """
        exchange = _Exchange({name: list(letters) for name, letters in queues.items()})
        longest = max((len(letters) for letters in queues.values()), default=0)
        end = time.monotonic() + longest * self._network.deadline + self._network.patience
        census = 0.0
        for name in queues:
            self._send_next(exchange, name)
        while len(exchange.done) < len(queues):
            for message_id in list(exchange.open):
                self._take_answer(exchange, message_id, take, requeue)
            now = time.monotonic()
            if now > census:
                census = now + CENSUS
                self._take_census(exchange, now)
            if enough(exchange.done):
                if not self._pending(exchange, waited, now):
                    break
            elif now > end:
                raise RuntimeError(self._too_few(exchange))
            if len(exchange.done) < len(queues):
                time.sleep(LOOK)
        return {name: self._why(exchange, name) for name in queues if name not in exchange.done}

    def _pending(self, exchange: _Exchange, waited: Mapping[str, float], now: float) -> bool:
        """Whether anybody has time left who is waited for."""
        return any(
            under_way.waited and now < under_way.since + waited.get(under_way.letter.member.name, 0)
            for under_way in exchange.open.values()
        )

    def _send_next(self, exchange: _Exchange, name: str) -> None:
        letter = exchange.queues[name][0]
        nonce = secrets.token_hex(16)
        task = replace(letter.task, nonce=nonce)
        frames = {str(block): path.read_bytes() for block, (path, _) in letter.frames.items()}
        time_to_live = self._network.deadline + self._network.patience
        node = self._roster.node_of(name)
        exchange.again.pop(name, None)
        content = write_letter(task.to_record(), frames)
        message = Message(content, node, letter.kind, ttl=time_to_live)
        (message_id,) = self._grid.push_messages([message])
        if not message_id:
            self._fail(exchange, name, "its node is not connected")
            return
        letter.member.bytes_down += sum(payload for _, payload in letter.frames.values())
        letter.member.wire_down += sum(map(len, frames.values()))
        exchange.open[message_id] = _Open(letter, nonce, time.monotonic())
        exchange.failed.pop(name, None)

    def _take_answer(
        self,
        exchange: _Exchange,
        message_id: str,
        take: Callable[[Answer], None],
        requeue: Callable[[Letter, tuple[int, ...]], list[Letter]],
    ) -> None:
        """Take what has arrived for a message; when this returns, nothing holds its bytes."""
        for reply in pull(self._grid, message_id):
            under_way = exchange.open.pop(message_id)
            letter, name = under_way.letter, under_way.letter.member.name
            if name in exchange.done:
                return
            try:
                answer = _read(reply, letter, under_way.nonce)
                if not answer.lacks:
                    take(answer)
            except ValueError as error:
                # Of a letter that was given up, another is under way.
                if under_way.waited:
                    self._fail(exchange, name, str(error), getattr(error, "code", ""))
                return
            if answer.lacks:
                self._resend(exchange, name, answer, requeue)
            elif letter.last:
                exchange.done.add(name)
                log.info(
                    "fedspa: %r has answered, %d of %d",
                    name,
                    len(exchange.done),
                    len(exchange.queues),
                )
            else:
                exchange.queues[name] = exchange.queues[name][1:]
                self._send_next(exchange, name)

    def _resend(
        self,
        exchange: _Exchange,
        name: str,
        answer: Answer,
        requeue: Callable[[Letter, tuple[int, ...]], list[Letter]],
    ) -> None:
        count = exchange.lacks[name] = exchange.lacks.get(name, 0) + 1
        exchange.queues[name] = requeue(exchange.queues[name][-1], answer.lacks)
        if count > MOST_LACKS:
            self._fail(exchange, name, "it lost what it was sent, again and again")
        else:
            self._send_next(exchange, name)

    def _take_census(self, exchange: _Exchange, now: float) -> None:
        """Give up letters to nodes that have left; ask clients again that failed, or are back."""
        back = self._roster.welcome_back()
        online = self._roster.online()
        for under_way in exchange.open.values():
            name = under_way.letter.member.name
            if under_way.waited and (name in back or self._roster.node_of(name) not in online):
                # An answer that still comes is taken.
                under_way.waited = False
                self._fail(exchange, name, "its node left")
        for name in list(exchange.failed):
            again = now > exchange.again.get(name, now) and self._roster.node_of(name) in online
            if name in back or again:
                self._send_next(exchange, name)

    def _fail(self, exchange: _Exchange, name: str, why: str, code: str = "") -> None:
        exchange.failed[name] = why
        if code == STRANGER:
            self._roster.ask_again(name)
        if code not in FINAL:
            pause = exchange.pauses.get(name, AGAIN)
            exchange.pauses[name] = min(2 * pause, LONGEST)
            exchange.again[name] = time.monotonic() + pause
        log.warning("fedspa: %r: %s", name, why)

    def _why(self, exchange: _Exchange, name: str) -> str:
        return exchange.failed.get(name, f"no answer within {self._network.deadline:g} s")

    def _too_few(self, exchange: _Exchange) -> str:
        missing = [name for name in exchange.queues if name not in exchange.done]
        why = "; ".join(f"{name!r}: {self._why(exchange, name)}" for name in missing)
        return (
            f"{len(exchange.done)} of {len(exchange.queues)} clients answered, and min-clients is "
            f"{self._network.min_clients} for every block ({why}); mend these clients and start "
            f"the run again, which goes on after the last finished block"
        )


def _read(reply: Message | None, letter: Letter, nonce: str) -> Answer:
    """A client's answer; raises ValueError where it has failed, in the server's own words."""
    record, frames = read_letter(reply)
    if record.get("nonce") != nonce:
        raise ValueError("it answered another task than it was asked")
    code = record.get("code")
    if code not in (DONE, LACKS):
        raise _Failed(str(code))
    lacks = _numbers(record.get("lacks"))
    known = len(set(lacks)) == len(lacks) and set(lacks) <= set(letter.task.holds)
    if (code == LACKS) != bool(lacks) or not known:
        raise ValueError("it lacks blocks that it was not to have")
    return Answer(letter, nonce, lacks, frames)


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError("it answered something else than a list of blocks")
    return tuple(values)
