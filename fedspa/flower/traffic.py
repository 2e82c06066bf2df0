"""What is on its way between a server and its clients in one exchange."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedspa.flower.assignments import Letter


@dataclass
class Sent:
    """A letter that was sent: where to, since when, and whether it is still waited for."""

    letter: Letter
    nonce: str
    node: int
    since: float
    waited: bool = True

    @property
    def name(self) -> str:
        """Its client's."""
        return self.letter.member.name


@dataclass
class Traffic:
    """The letters of one exchange.

    queues:  by client the letters that it has not answered, of which the first is sent
    waited:  for how many seconds after a letter its client is waited for; others are not
    seconds: the same of all, of those too who are not waited for yet
    open:    by message the letters that have no answer yet
    done:    who has answered the last of its letters
    failed:  who failed the last time, and why
    again:   when a client that failed is asked again; one whose failure is final is not in it
    pauses:  how long after its next failure
    lacks, useless: how often a client lacked blocks, or answered what is of no use
    """

    queues: dict[str, list[Letter]]
    waited: dict[str, float]
    seconds: Mapping[str, float]
    open: dict[str, Sent] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    again: dict[str, float] = field(default_factory=dict)
    pauses: dict[str, float] = field(default_factory=dict)
    lacks: Counter[str] = field(default_factory=Counter)
    useless: Counter[str] = field(default_factory=Counter)

    def pending(self, now: float) -> bool:
        """Whether anybody has time left who is waited for."""
        return any(
            sent.waited
            and sent.name not in self.done
            and now < sent.since + self.waited.get(sent.name, 0)
            for sent in self.open.values()
        )
