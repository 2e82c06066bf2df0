"""Sends letters to clients and waits for their answers: deadlines, failures, second tries."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace

from flwr.app import Message
from flwr.serverapp import Grid

from fedspa.flower.answers import Answer, Failed, read_answer
from fedspa.flower.assignments import Letter
from fedspa.flower.letters import write_letter
from fedspa.flower.mailbox import Mailbox
from fedspa.flower.overdue import Overdue
from fedspa.flower.roster import LOOK, Roster
from fedspa.flower.run_config import Network
from fedspa.flower.tasks import FINAL, STRANGER, USELESS
from fedspa.flower.traffic import Sent, Traffic

log = logging.getLogger("flwr")

# Seconds between two looks at who is connected, and until a client that failed is asked again:
# at first, and twice as long every time, up to the last.
CENSUS, AGAIN, LONGEST = 3.0, 10.0, 320.0
# How often a client may say in one exchange that it lacks blocks, and answer what is of no use.
MOST_LACKS, MOST_USELESS = 3, 2


class Courier:
    """Carries letters over Flower's network."""

    def __init__(self, grid: Grid, mailbox: Mailbox, roster: Roster, network: Network) -> None:
        self._grid = grid
        self._mailbox = mailbox
        self._overdue = Overdue(mailbox)
        self._roster = roster
        self._network = network

    def carry(
        self,
        queues: Mapping[str, Sequence[Letter]],
        enough: Callable[[], bool],
        take: Callable[[Answer], None],
        requeue: Callable[[Letter, tuple[int, ...]], list[Letter]],
        seconds: Mapping[str, float],
        silent: Set[str],
    ) -> dict[str, str]:
        """Send every client its letters one after the other, and hand on the answers as they come.

        One that has not answered a letter of an earlier exchange is sent its own once it has.

        queues:  letters by the client's name
        enough:  whether what was taken suffices
        take:    is given each answer; raises ValueError where it is of no use
        requeue: the letters for a client that lacks agreed blocks, given its last letter
        seconds: for how long a client is waited for after each of its letters
        silent:  clients that are not waited for before they have answered something
        returns: by client why it has not answered
        raises:  RuntimeError where there are not enough within deadline and patience
        """
        queued = {name: list(letters) for name, letters in queues.items()}
        waited = {name: seconds[name] for name in queues if name not in silent}
        traffic = Traffic(queued, waited, seconds)
        try:
            self._carry(traffic, enough, take, requeue)
        finally:
            self._leave(traffic)
        return {name: self._why(traffic, name) for name in queues if name not in traffic.done}

    def _carry(
        self,
        traffic: Traffic,
        enough: Callable[[], bool],
        take: Callable[[Answer], None],
        requeue: Callable[[Letter, tuple[int, ...]], list[Letter]],
    ) -> None:
        queues, patience = traffic.queues, self._network.patience
        longest = max(map(len, queues.values()), default=0)
        hopeful = time.monotonic()
        end = hopeful + longest * self._network.deadline + patience
        census = 0.0
        for name in queues:
            if name not in self._overdue:
                self._send_next(traffic, name)
        while len(traffic.done) < len(queues):
            for message_id in list(traffic.open):
                self._take_answer(traffic, message_id, take, requeue)
            self._take_overdue(traffic)
            now = time.monotonic()
            if now > census:
                census = now + CENSUS
                self._take_census(traffic, now)
            if traffic.open or traffic.again or len(self._overdue):
                hopeful = now
            if enough():
                if not traffic.pending(now) or now > end:
                    break
            elif now > min(end, hopeful + patience):
                raise RuntimeError(self._too_few(traffic))
            if len(traffic.done) < len(queues):
                time.sleep(LOOK)

    def _leave(self, traffic: Traffic) -> None:
        """Note who has not answered yet: until then it is sent nothing else."""
        for message_id, sent in traffic.open.items():
            if sent.waited:
                until = sent.since + self._time_to_live
                self._overdue.add(sent.name, message_id, sent.node, until)
            else:
                self._mailbox.forget(message_id)

    def _take_overdue(self, traffic: Traffic) -> None:
        """Send on to those who have ended what they were at; who has answered is waited for."""
        for name, answered in self._overdue.cleared():
            if name in traffic.queues:
                if answered:
                    traffic.waited[name] = traffic.seconds[name]
                self._send_next(traffic, name)

    @property
    def _time_to_live(self) -> float:
        return self._network.deadline + self._network.patience

    def _send_next(self, traffic: Traffic, name: str) -> None:
        letter = traffic.queues[name][0]
        nonce = secrets.token_hex(16)
        task = replace(letter.task, nonce=nonce)
        frames = {str(block): path.read_bytes() for block, (path, _) in letter.frames.items()}
        node = self._roster.node_of(name)
        traffic.again.pop(name, None)
        content = write_letter(task.to_record(), frames)
        message = Message(content, node, letter.kind, ttl=self._time_to_live)
        (message_id,) = self._grid.push_messages([message])
        if not message_id:
            self._fail(traffic, name, "its node is not connected")
            return
        letter.member.bytes_down += sum(payload for _, payload in letter.frames.values())
        letter.member.wire_down += sum(map(len, frames.values()))
        traffic.open[message_id] = Sent(letter, nonce, node, time.monotonic())
        traffic.failed.pop(name, None)

    def _take_answer(
        self,
        traffic: Traffic,
        message_id: str,
        take: Callable[[Answer], None],
        requeue: Callable[[Letter, tuple[int, ...]], list[Letter]],
    ) -> None:
        """Take what has arrived for a message; when this returns, nothing holds its bytes."""
        for reply in self._mailbox.look(message_id):
            sent = traffic.open.pop(message_id)
            letter, name = sent.letter, sent.name
            if name in traffic.done or letter is not traffic.queues[name][0]:
                return
            try:
                answer = read_answer(reply, letter, sent.nonce)
                if not answer.lacks:
                    self._use(traffic, answer, take)
            except ValueError as error:
                # Of a letter that was given up, another is under way.
                if sent.waited:
                    self._fail(traffic, name, str(error), getattr(error, "code", ""))
                return
            if answer.lacks:
                self._resend(traffic, name, answer, requeue)
            elif letter.last:
                traffic.done.add(name)
                log.info(
                    "fedspa: %r has answered, %d of %d",
                    name,
                    len(traffic.done),
                    len(traffic.queues),
                )
            else:
                traffic.queues[name] = traffic.queues[name][1:]
                self._send_next(traffic, name)

    def _resend(
        self,
        traffic: Traffic,
        name: str,
        answer: Answer,
        requeue: Callable[[Letter, tuple[int, ...]], list[Letter]],
    ) -> None:
        traffic.lacks[name] += 1
        traffic.queues[name] = requeue(traffic.queues[name][-1], answer.lacks)
        if traffic.lacks[name] > MOST_LACKS:
            self._fail(traffic, name, "it lost what it was sent, again and again")
        else:
            self._send_next(traffic, name)

    def _use(self, traffic: Traffic, answer: Answer, take: Callable[[Answer], None]) -> None:
        """Hand on an answer; raises Failed where it is of no use, which is final in the end."""
        try:
            take(answer)
        except ValueError as error:
            name = answer.letter.member.name
            traffic.useless[name] += 1
            final = traffic.useless[name] > MOST_USELESS
            raise Failed(USELESS if final else "", str(error)) from None

    def _take_census(self, traffic: Traffic, now: float) -> None:
        """Give up letters to nodes that have left; ask clients again that failed, or are back."""
        back = self._roster.welcome_back()
        online = self._roster.online()
        gone = {*self._overdue.drop(back), *self._overdue.left(online)}
        for name in gone & traffic.queues.keys():
            self._fail(traffic, name, "its node left")
        for sent in traffic.open.values():
            name = sent.name
            if sent.waited and (name in back or self._roster.node_of(name) not in online):
                # An answer that still comes is taken.
                sent.waited = False
                if name not in traffic.done:
                    self._fail(traffic, name, "its node left")
        for name in traffic.failed.keys() - traffic.done:
            again = now > traffic.again.get(name, now) and self._roster.node_of(name) in online
            if name in back or again:
                self._send_next(traffic, name)

    def _fail(self, traffic: Traffic, name: str, why: str, code: str = "") -> None:
        traffic.failed[name] = why
        if code == STRANGER:
            self._roster.ask_again(name)
        if code not in FINAL:
            pause = traffic.pauses.get(name, AGAIN)
            traffic.pauses[name] = min(2 * pause, LONGEST)
            traffic.again[name] = time.monotonic() + pause
        log.warning("fedspa: %r: %s", name, why)

    def _why(self, traffic: Traffic, name: str) -> str:
        if name in traffic.failed:
            return traffic.failed[name]
        if any(sent.name == name for sent in traffic.open.values()):
            return f"no answer within {self._network.deadline:g} s"
        return "it has not answered an earlier task yet"

    def _too_few(self, traffic: Traffic) -> str:
        missing = [name for name in traffic.queues if name not in traffic.done]
        why = "; ".join(f"{name!r}: {self._why(traffic, name)}" for name in missing)
        return (
            f"{len(traffic.done)} of {len(traffic.queues)} clients answered, and min-clients is "
            f"{self._network.min_clients} for every block ({why}); mend these clients and start "
            f"the run again, which goes on after the last finished block"
        )
