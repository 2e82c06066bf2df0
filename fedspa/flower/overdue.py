"""Letters that were not answered in time: their clients may still be at work on them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Set
from dataclasses import dataclass

from fedspa.flower.mailbox import Mailbox


@dataclass(frozen=True)
class _Letter:
    """A letter's message, the node that it went to, and until when Flower keeps it."""

    message_id: str
    node: int
    until: float


class Overdue:
    """By client the letter that it may be at work on.

    A node takes one letter after the other, and its client does not know which of them nobody waits
    for: what it is sent before it has answered, it would begin too late.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._letters: dict[str, _Letter] = {}

    def __len__(self) -> int:
        return len(self._letters)

    def __contains__(self, name: str) -> bool:
        return name in self._letters

    def add(self, name: str, message_id: str, node: int, until: float) -> None:
        """Note a letter that nobody waits for; until: on the monotonic clock."""
        self._letters[name] = _Letter(message_id, node, until)

    def drop(self, names: Set[str]) -> list[str]:
        """Forget the letters of clients that have started anew; whose there were."""
        dropped = [name for name in names if name in self._letters]
        for name in dropped:
            self._mailbox.forget(self._letters.pop(name).message_id)
        return dropped

    def left(self, online: Set[int]) -> list[str]:
        """Forget the letters at nodes that are not connected any more; whose they were."""
        return self.drop({name for name, one in self._letters.items() if one.node not in online})

    def cleared(self) -> Iterator[tuple[str, bool]]:
        """Forget letters that are answered or that ran out: whose, and whether it has answered."""
        for name, letter in list(self._letters.items()):
            # Of answers that nobody waits for none is kept while this waits for its caller.
            found = [bool(a and not a.has_error()) for a in self._mailbox.look(letter.message_id)]
            if found or time.monotonic() > letter.until:
                self._mailbox.forget(self._letters.pop(name).message_id)
                yield name, any(found)
