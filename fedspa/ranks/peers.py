"""What a rank knows of the others: where they are, what they last said, and which are missed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

from torch.distributed import Store

from fedspa.ranks.processes import lives, mark, place

# What a rank says once its work is done, and once it does not use the store any more.
DONE = b"done"
AWAY = b"away"


@dataclass
class Peer:
    """Another rank: where it is, its last beat, and the seconds for which that has not changed."""

    place: str | None = None
    mark: str = ""
    beat: bytes = b""
    silent: float = 0.0

    @property
    def done(self) -> bool:
        """Whether it has finished, so that it is not missed."""
        return self.beat in (DONE, AWAY)


class Peers:
    """This rank's beats and its look at the others', in a store; RuntimeErrors are the store's.

    On a host whose ranks see each other's processes the table of processes decides, at once and
    also where a long native call holds up a rank's beats; silence decides where no rank of a whole
    host is heard of.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank = store, rank
        self._here = place(rank)
        self._others = {other: Peer() for other in range(size) if other != rank}
        self._beats = 0
        self._last_word = b""
        self._speaking = Lock()
        self.beat()
        here = self._here if self._here.startswith("rank") else f"{self._here}\n{mark(os.getpid())}"
        store.set(f"place/{rank}", here)

    def beat(self, last_word: bytes = b"") -> None:
        """Say that this rank lives, or its last word, which no later beat takes back."""
        with self._speaking:
            self._beats += 1
            self._last_word = last_word or self._last_word
            self._store.set(f"beat/{self._rank}", (self._last_word or b"%d" % self._beats).decode())

    def greet(self, elapsed: float) -> None:
        """Look for those that have not come yet. elapsed: seconds since the last look."""
        for rank, peer in self._others.items():
            if peer.place is not None:
                continue
            peer.silent += elapsed
            if self._store.check([f"place/{rank}"]):
                where, _, peer.mark = self._store.get(f"place/{rank}").decode().partition("\n")
                peer.place, peer.silent = where, 0.0

    def listen(self, elapsed: float = 0.0) -> None:
        """Read the beats of those that have come. elapsed: seconds since the last look."""
        come = [rank for rank, peer in self._others.items() if peer.place is not None]
        if not come:
            return
        beats = self._store.multi_get([f"beat/{rank}" for rank in come])
        for rank, beat in zip(come, beats, strict=True):
            peer = self._others[rank]
            peer.silent = peer.silent + elapsed if beat == peer.beat else 0.0
            peer.beat = bytes(beat)

    def done(self) -> bool:
        """Whether every other rank has finished."""
        return all(peer.done for peer in self._others.values())

    def readers(self, patience: float, arrival: float) -> list[int]:
        """Who may still use the store, or may yet come to."""
        lost = {*self.vanished(), *self.silent(patience), *self.missing(arrival)}
        return [r for r, peer in self._others.items() if peer.beat != AWAY and r not in lost]

    def gone(self) -> list[int]:
        """The ranks whose processes are gone from this host though they had not finished."""
        if not self.vanished():
            return []
        # A process that ended well had said so before it was gone, but maybe after the last look.
        self.listen()
        return self.vanished()

    def vanished(self) -> list[int]:
        """The same, by what is known without asking the store."""
        return [
            rank
            for rank, peer in self._others.items()
            if peer.place == self._here and not peer.done and not lives(peer.mark)
        ]

    def silent(self, patience: float) -> list[int]:
        """The ranks of other hosts of which no rank was heard for more than `patience` seconds."""
        heard: dict[str, float] = {}
        for peer in self._others.values():
            if peer.place is not None:
                heard[peer.place] = min(peer.silent, heard.get(peer.place, peer.silent))
        heard[self._here] = 0.0
        return [
            rank
            for rank, peer in self._others.items()
            if peer.place is not None and not peer.done and heard[peer.place] > patience
        ]

    def missing(self, arrival: float) -> list[int]:
        """The ranks that have not come within `arrival` seconds."""
        return [r for r, p in self._others.items() if p.place is None and p.silent > arrival]


def name_ranks(ranks: Sequence[int], size: int | None = None) -> str:
    """Ranks in words: "rank 2 of 4", "ranks 0, 1 and 3 of 4"."""
    *most, last = map(str, ranks)
    of = "" if size is None else f" of {size}"
    return f"ranks {', '.join(most)} and {last}{of}" if most else f"rank {last}{of}"
