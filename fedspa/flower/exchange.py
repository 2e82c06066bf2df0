"""What the server exchanges with clients elsewhere: tasks and agreed blocks out, results in.

Answers are put on the disk as they come, one client's at a time, so that memory holds a single
message whatever the number of clients; then they are checked and added block by block.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping

from torch import nn

from fedspa.flower import agreed_blocks
from fedspa.flower.arrivals import Arrivals
from fedspa.flower.assignments import Letter, letters, versions_for
from fedspa.flower.checks import Checks, frame_limit
from fedspa.flower.client_work import AGREED
from fedspa.flower.courier import Answer, Courier
from fedspa.flower.letters import FINISH, WORK
from fedspa.flower.run_config import Network
from fedspa.flower.tasks import Task
from fedspa.members import Add, Member, Run
from fedspa.messages import BlockMessage
from fedspa.streaming.disk import write_whole
from fedspa.streaming.folder import folders_of
from fedspa.wire import Envelope, encode

log = logging.getLogger("flwr")

RUN_FILE = "network-run"
MIB = 2**20


def stored_run(network: Network) -> str:
    """The id of the run that a killed server left beside its output, or "" where there is none."""
    path = folders_of(network.out).state / RUN_FILE
    return "" if network.restart or not path.is_file() else path.read_text()


class Exchange:
    """`members.Remote` for clients behind a network."""

    def __init__(
        self,
        members: list[Member],
        courier: Courier,
        network: Network,
        model: str,
        wants_result: Callable[[str], bool],
    ) -> None:
        """model: digest of the checkpoint, which every frame names."""
        self.members = members
        self._courier = courier
        self._network = network
        self._model = model
        self._wants_result = wants_result
        self._folder = folders_of(network.out).state
        self._run_id = ""
        # The blocks that were asked last: what has arrived of them, and who is left out of them.
        self._asked: tuple[int, range] = (-1, range(0))
        self._arrivals = Arrivals(self._folder, members)
        # Who gave no answer the last time; nobody waits for these at the end.
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
            count = self._network.blocks_per_message or self._fitting(run)
            blocks = range(index, min(index + count, together.stop))
            with run.clock.stage("wait"):
                self._ask(run, round_index, blocks, together)
        left_out = self._left_out[index]
        checks = Checks(run, block, round_index, index, self._network.norm_bound)
        arrived = [member for member in asked if self._arrivals.has(member.name, index)]
        with run.clock.stage("check"):
            for member in arrived if run.settings.aggregation == "statistics" else ():
                checks.compare(member, *self._frame(member, index))
        added = 0
        for member in arrived:
            try:
                with run.clock.stage("check"):
                    message = checks.checked(member, *self._frame(member, index))
                add(message)
                added += 1
            except ValueError as error:
                left_out[member.name] = str(error)
                log.warning("fedspa: left out: %s", error)
            self._arrivals.remove(member.name, index)
        need = min(self._network.min_clients, len(asked))
        if added < need:
            why = "; ".join(f"{name!r}: {text}" for name, text in left_out.items())
            raise RuntimeError(
                f"round {round_index}, block {index}: {added} of {len(asked)} clients sent what "
                f"can be used, and min-clients is {need} ({why}); mend these clients and start the "
                f"run again, which goes on after the last finished block"
            )

    def agreed(self, run: Run, message: BlockMessage) -> dict[str, str]:
        """See `members.Remote`."""
        frame = encode(message, Envelope(self._model, self._run_id, AGREED))
        agreed_blocks.write(self._folder, message.block, message.round, message.nbytes, frame)
        left_out = self._left_out.pop(message.block, {})
        without = f", without {', '.join(map(repr, left_out))}" if left_out else ""
        log.info(
            "fedspa: round %d of %d, block %d of %d agreed on%s",
            message.round + 1,
            run.settings.rounds,
            message.block + 1,
            len(run.blocks),
            without,
        )
        return left_out

    def finish(self, run: Run) -> None:
        """See `members.Remote`; a client that cannot be reached is not waited for."""
        self._open_run()
        queues = {}
        for member in self.members:
            if member.name in self._silent:
                continue
            ever = {block for drawn in member.drawn for block in drawn}
            holds = {block: run.agreed[block] for block in sorted(ever) if block in run.agreed}
            if not self._wants_result(member.name):
                holds = {}
            task = self._task(member, holds)
            queues[member.name] = self._letters(member, task, FINISH)
        with run.clock.stage("wait"):
            failed = self._silent | self._exchange(queues, 0, lambda answer: None)
        for name, why in failed.items():
            log.warning("fedspa: %r did not get the end of the run: %s", name, why)

    def _ask(self, run: Run, round_index: int, blocks: range, together: range) -> None:
        """Let clients work on blocks, and put what they send on the disk."""
        self._arrivals.clear()
        drawing = {
            member.name: [b for b in member.drawn[-1] if b in blocks] for member in run.order
        }
        asked = {b: sum(b in mine for mine in drawing.values()) for b in blocks}
        queues = {}
        for member in run.order:
            if drawing[member.name]:
                holds = versions_for(run, member, round_index, blocks, together)
                task = self._task(member, holds, blocks, together, asked)
                queues[member.name] = self._letters(member, task, WORK)
        limits = {b: frame_limit(run, b) for b in blocks}
        refused: dict[str, str] = {}

        def take(answer: Answer) -> None:
            member, name = answer.letter.member, answer.letter.member.name
            if not answer.letter.last:
                return
            member.wire_up += sum(map(len, answer.frames.values()))
            try:
                self._arrivals.store(name, answer.nonce, answer.frames, drawing[name], limits)
            except ValueError as error:
                refused[name] = str(error)
                log.warning("fedspa: %r: %s", name, error)

        need = min(self._network.min_clients, len(queues))
        self._silent = self._exchange(queues, need, take)
        failed = self._silent | refused
        self._asked = round_index, blocks
        for b in blocks:
            self._left_out[b] = {
                name: failed.get(name, "it sent no frame of this block")
                for name, mine in drawing.items()
                if b in mine and not self._arrivals.has(name, b)
            }

    def _exchange(
        self,
        queues: Mapping[str, list[Letter]],
        need: int,
        take: Callable[[Answer], None],
    ) -> dict[str, str]:
        """Carry letters, and keep account of what clients have got; returns who failed, and why."""

        def requeue(answer: Answer) -> list[Letter]:
            letter = answer.letter
            for block in answer.lacks:
                letter.member.holds.pop(block, None)
            return self._letters(letter.member, letter.task, letter.kind)

        def received(answer: Answer) -> None:
            member, task = answer.letter.member, answer.letter.task
            member.holds |= {block: task.holds[block] for block in answer.letter.frames}
            take(answer)

        return self._courier.carry(queues, need, received, requeue)

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
            name=member.name,
            round=len(member.drawn) - 1,
            drawn=member.drawn[-1],
            together=(together.start, together.stop),
            blocks=(blocks.start, blocks.stop),
            asked=asked or {},
            holds=holds,
            seconds=self._network.deadline,
        )

    def _letters(self, member: Member, task: Task, kind: str) -> list[Letter]:
        return letters(member, task, kind, self._folder, self._network.message_mib * MIB)

    def _fitting(self, run: Run) -> int:
        """How many blocks fit into one message; at least one."""
        largest = max(frame_limit(run, index) for index in range(len(run.blocks)))
        return max(1, int(self._network.message_mib * MIB) // largest)

    def _open_run(self) -> None:
        if not self._run_id:
            path = self._folder / RUN_FILE
            if not path.is_file():
                write_whole(path, secrets.token_hex(16).encode())
            self._run_id = path.read_text()

    def _frame(self, member: Member, index: int) -> tuple[bytes, Envelope]:
        """What a client sent of a block, and what it must say of itself."""
        frame, nonce = self._arrivals.read(member.name, index)
        return frame, Envelope(self._model, self._run_id, nonce)
