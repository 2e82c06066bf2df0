"""What the server exchanges with clients elsewhere: tasks and agreed blocks out, results in.

Answers are put on the disk as they come, one client's at a time and a few where lines are slow, so
that memory does not grow with the clients; then they are checked and added block by block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Set
from dataclasses import replace

from torch import nn

from fedspa.flower import agreed_blocks, record
from fedspa.flower.answers import Answer
from fedspa.flower.arrivals import Arrivals
from fedspa.flower.assignments import Letter, letters, versions_for
from fedspa.flower.checks import Checks, frame_size
from fedspa.flower.client_work import AGREED
from fedspa.flower.courier import Courier
from fedspa.flower.intake import Intake, shortened
from fedspa.flower.letters import FINISH, WORK
from fedspa.flower.roster import Roster
from fedspa.flower.run_config import Network
from fedspa.flower.tasks import Task
from fedspa.members import Add, Member, Run
from fedspa.messages import BlockMessage, StatisticsMessage
from fedspa.schedule import exchanged_together
from fedspa.streaming.folder import folders_of
from fedspa.wire import Envelope, encode

log = logging.getLogger("flwr")

MIB = 2**20
# Seconds for a client that keeps no copy of the result to say that it has heard of the end.
FAREWELL = 60.0


class Exchange:
    """`members.Remote` for clients behind a network."""

    def __init__(
        self,
        roster: Roster,
        courier: Courier,
        network: Network,
        model: str,
    ) -> None:
        """model: digest of the checkpoint, which every frame names."""
        self.members = roster.members
        self._roster = roster
        self._courier = courier
        self._network = network
        self._model = model
        self._folder = folders_of(network.out).state
        self._run_id = ""
        # The blocks that were asked last: what has arrived of them, and who is left out of them.
        self._asked: tuple[int, range] = (-1, range(0))
        self._arrivals = Arrivals(self._folder, self.members)
        # Who gave no answer the last time is not waited for where the others are enough.
        self._silent: dict[str, str] = {}
        self._left_out: dict[int, dict[str, str]] = {}

    def collect(
        self,
        run: Run,
        block: nn.Module,
        asked: list[Member],
        round_index: int,
        index: int,
        together: range,
        add: Add,
    ) -> None:
        """See `members.Remote`."""
        if not asked:
            return
        self._open_run()
        round_asked, blocks = self._asked
        if round_asked != round_index or index not in blocks:
            count = self._network.blocks_per_message or self._fitting(run, round_index)
            blocks = range(index, min(index + count, together.stop))
            with run.clock.stage("wait"):
                self._ask(run, round_index, blocks, together)
        left_out = self._left_out[index]
        checks = Checks(run, block, round_index, index, self._network.norm_bound)
        arrived = [
            member
            for member in asked
            if self._arrivals.has(member.name, index) and member.name not in left_out
        ]
        with run.clock.stage("check"):
            for member in arrived if run.settings.aggregation == "statistics" else ():
                checks.compare(member, *self._frame(member.name, index))
        added = 0
        for member in arrived:
            try:
                with run.clock.stage("check"):
                    message = checks.checked(member, *self._frame(member.name, index))
                if isinstance(message, StatisticsMessage):
                    add(message)
            except ValueError as error:
                self._leave_out(member.name, index, str(error))
            else:
                # Sums of weights are of no use once adding to them has failed: nothing is left out.
                if isinstance(message, BlockMessage):
                    add(message)
                added += 1
        need = min(self._network.min_clients, len(asked))
        if added < need:
            why = "; ".join(f"{name!r}: {text}" for name, text in left_out.items())
            raise RuntimeError(
                f"round {round_index}, block {index}: {added} of {len(asked)} clients sent what "
                f"can be used, and min-clients is {need} ({why}); mend these clients and start the "
                f"run again, which goes on after the last finished block"
            )

    def blame(
        self, run: Run, block: nn.Module, asked: list[Member], round_index: int, index: int
    ) -> bool:
        """See `members.Remote`."""
        checks = Checks(run, block, round_index, index, self._network.norm_bound)
        left_out, before = self._left_out[index], len(self._left_out[index])
        for member in asked:
            if member.name not in left_out:
                try:
                    with run.clock.stage("check"):
                        checks.definite(member, *self._frame(member.name, index))
                except ValueError as error:
                    self._leave_out(member.name, index, str(error))
        return len(left_out) > before

    def _leave_out(self, name: str, index: int, why: str) -> None:
        self._left_out[index][name] = why = shortened(why)
        log.warning("fedspa: left out: %s", why)

    def agreed(self, run: Run, message: BlockMessage) -> dict[str, str]:
        """See `members.Remote`."""
        if self.sends_back(run):
            frame = encode(message, self._envelope(AGREED))
            agreed_blocks.write(self._folder, message.block, message.round, frame)
        left_out = self._left_out.pop(message.block, {})
        self._arrivals.remove(message.block)
        without = f", without {', '.join(map(repr, left_out))}" if left_out else ""
        log.info(
            "fedspa: round %d, block %d agreed on%s (%d of %d)",
            message.round,
            message.block,
            without,
            message.block + 1,
            len(run.blocks),
        )
        return left_out

    def sends_back(self, run: Run) -> bool:
        """See `members.Remote`: later blocks or rounds need them, or a client's own result."""
        later = exchanged_together(run.settings, len(run.blocks)) < len(run.blocks)
        wanted = any(self._roster.wants_result(member.name) for member in self.members)
        return later or run.settings.rounds > 1 or wanted

    def finish(self, run: Run) -> None:
        """See `members.Remote`; waits for everybody who is told of the end.

        A SuperNode of Flower 1.41 that is taking a message while its run ends sends every later
        answer one message too late: none is to be on its way then. Whoever has not answered what
        came before is told of nothing.
        """
        self._open_run()
        queues = {}
        for member in self.members:
            ever = {block for drawn in member.drawn for block in drawn}
            holds = {block: run.agreed[block] for block in sorted(ever) if block in run.agreed}
            if not self._roster.wants_result(member.name):
                holds = {}
            task = replace(self._task(member, holds), copies=self._roster.wants_result(member.name))
            queues[member.name] = self._letters(member, task, FINISH)
        with run.clock.stage("wait"):
            deadline = self._network.deadline
            # A copy takes its time; for the others, and where there was a failure, there is less.
            copying = {n for n in queues if self._roster.wants_result(n)} - self._silent.keys()
            seconds = {n: deadline if n in copying else min(FAREWELL, deadline) for n in queues}
            failed = self._exchange(queues, lambda: True, lambda answer: None, seconds)
        for name, why in failed.items():
            if self._roster.wants_result(name):
                log.warning("fedspa: %r did not get the end of the run: %s", name, why)

    def _ask(self, run: Run, round_index: int, blocks: range, together: range) -> None:
        """Let clients work on blocks, and put what they send on the disk."""
        self._arrivals.clear()
        drawing = {
            member.name: [b for b in member.drawn[-1] if b in blocks] for member in run.order
        }
        least = self._network.min_clients
        intake = Intake(run, round_index, drawing, self._arrivals, self._envelope, least)
        queues = {}
        for member in run.order:
            if drawing[member.name]:
                holds = versions_for(run, member, round_index, blocks, together)
                task = self._task(member, holds, blocks, together, intake.counts)
                queues[member.name] = self._letters(member, task, WORK)
        seconds = dict.fromkeys(queues, self._network.deadline)
        # Who was silent is asked, and not waited for again where the others are enough.
        silent = self._exchange(queues, intake.enough, intake.take, seconds, self._silent.keys())
        self._silent = {n: why for n, why in self._silent.items() if n not in queues} | silent
        self._asked = round_index, blocks
        self._left_out = {b: {} for b in blocks} | intake.left_out(silent)

    def _exchange(
        self,
        queues: Mapping[str, list[Letter]],
        enough: Callable[[], bool],
        take: Callable[[Answer], None],
        seconds: Mapping[str, float],
        silent: Set[str] = frozenset(),
    ) -> dict[str, str]:
        """Carry letters, and keep account of what clients have got; returns who failed, and why."""

        def requeue(letter: Letter, lacks: tuple[int, ...]) -> list[Letter]:
            for block in lacks:
                letter.member.holds.pop(block, None)
            return self._letters(letter.member, letter.task, letter.kind)

        def received(answer: Answer) -> None:
            member, task = answer.letter.member, answer.letter.task
            member.holds |= {block: task.holds[block] for block in answer.letter.frames}
            take(answer)

        return self._courier.carry(queues, enough, received, requeue, seconds, silent)

    def _task(
        self,
        member: Member,
        holds: dict[int, int],
        blocks: range = range(0),
        together: range = range(0),
        asked: dict[int, int] | None = None,
    ) -> Task:
        return Task(
            nonce="",
            run=self._run_id,
            model=self._model,
            digest=member.digest,
            round=len(member.drawn) - 1,
            drawn=member.drawn[-1],
            together=(together.start, together.stop),
            blocks=(blocks.start, blocks.stop),
            asked=asked or {},
            holds=holds,
            seconds=self._network.deadline + self._network.patience,
        )

    def _letters(self, member: Member, task: Task, kind: str) -> list[Letter]:
        return letters(member, task, kind, self._folder, self._network.message_mib * MIB)

    def _fitting(self, run: Run, round_index: int) -> int:
        """How many blocks fit into one message; at least one."""
        largest = max(frame_size(run, index, round_index) for index in range(len(run.blocks)))
        return max(1, int(self._network.message_mib * MIB / largest))

    def _open_run(self) -> None:
        """Find the run's id beside the committed state, or make one; a restart has removed it."""
        if not self._run_id:
            self._run_id = record.opened(self._folder, self._roster.introductions)

    def _frame(self, name: str, index: int) -> tuple[bytes, Envelope]:
        """What a client sent of a block, and what it must say of itself."""
        frame, nonce = self._arrivals.read(name, index)
        return frame, self._envelope(nonce)

    def _envelope(self, nonce: str) -> Envelope:
        return Envelope(self._model, self._run_id, nonce)
