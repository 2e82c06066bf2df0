"""What is taken of the answers about some blocks: frames that can be read go to the disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from fedspa.flower.answers import Answer
from fedspa.flower.arrivals import Arrivals
from fedspa.flower.checks import frame_limit, readable
from fedspa.members import Run
from fedspa.wire import Envelope

log = logging.getLogger("flwr")

LONGEST_REASON = 500
# What a frame must say of itself, given the nonce of the task that it answers.
EnvelopeOf = Callable[[str], Envelope]


class Intake:
    """The answers to one exchange's letters, and whether there are enough of them."""

    def __init__(
        self,
        run: Run,
        round_index: int,
        drawing: Mapping[str, list[int]],
        arrivals: Arrivals,
        envelope_of: EnvelopeOf,
        min_clients: int,
    ) -> None:
        """drawing: the blocks that are asked of each client."""
        self._run = run
        self._round = round_index
        self._drawing = drawing
        self._arrivals = arrivals
        self._envelope_of = envelope_of
        asked = {b for blocks in drawing.values() for b in blocks}
        self._asked = {b: {name for name, own in drawing.items() if b in own} for b in asked}
        self._need = {b: min(min_clients, len(names)) for b, names in self._asked.items()}
        self._limits = {b: frame_limit(run, b) for b in asked}
        self._usable: dict[int, set[str]] = {b: set() for b in asked}
        self._useless: dict[int, dict[str, str]] = {b: {} for b in asked}

    @property
    def counts(self) -> dict[int, int]:
        """By block how many clients are asked."""
        return {b: len(names) for b, names in self._asked.items()}

    def enough(self) -> bool:
        """Whether every block has frames of as many clients as it needs."""
        return all(len(self._usable[b]) >= need for b, need in self._need.items())

    def take(self, answer: Answer) -> None:
        """Put a client's frames on the disk; without those that are of no use, if that can be.

        Raises ValueError where it cannot, and where a frame was not asked for or is too large.
        """
        if not answer.letter.last:
            return
        member, frames = answer.letter.member, answer.frames
        name, own = member.name, self._drawing[member.name]
        member.wire_up += sum(map(len, frames.values()))
        self._check_sizes(frames, own)
        useless = {b: error for b in own if (error := self._unreadable(answer, b)) is not None}
        for b, error in useless.items():
            if len(self._asked[b] - self._useless[b].keys() - {name}) < self._need[b]:
                raise error
        self._arrivals.begin(name, answer.nonce)
        for b in own:
            if b in useless:
                self._useless[b][name] = shortened(str(useless[b]))
                log.warning("fedspa: left out: %s", self._useless[b][name])
            else:
                self._arrivals.store(name, b, frames[str(b)])
                self._usable[b].add(name)

    def left_out(self, silent: Mapping[str, str]) -> dict[int, dict[str, str]]:
        """By block whose frame it does not have, and why.

        silent: the same of those who gave no answer.
        """
        return {
            b: {
                name: self._useless[b].get(name) or silent[name]
                for name in self._drawing
                if name in names and not self._arrivals.has(name, b)
            }
            for b, names in self._asked.items()
        }

    def _check_sizes(self, frames: Mapping[str, bytes], own: list[int]) -> None:
        for block, frame in frames.items():
            if block not in map(str, own):
                raise ValueError(f"it sent a frame {block!r:.40}, and was asked for blocks {own}")
            if len(frame) > self._limits[int(block)]:
                raise ValueError(
                    f"its frame of block {block} has {len(frame)} bytes, and such a block comes to "
                    f"{self._limits[int(block)]} at most"
                )

    def _unreadable(self, answer: Answer, block: int) -> ValueError | None:
        """Why a frame is of no use, as far as it can be said of it alone; None where it is."""
        member, frame = answer.letter.member, answer.frames.get(str(block))
        if frame is None:
            return ValueError(f"{member.name!r}, block {block}: it sent no frame of this block")
        try:
            envelope = self._envelope_of(answer.nonce)
            readable(self._run, member, self._round, block, frame, envelope)
        except ValueError as error:
            return error
        return None


def shortened(why: str) -> str:
    """A reason as the log and the report have it."""
    return why[:LONGEST_REASON]
