"""A watch over the ranks: one that dies ends all others with a sentence that names it.

Every rank beats in a store and looks at the others' beats, in a thread of its own: a collective
may hang for ever where a rank has died. Slow is not dead: a rank computes for as long as it likes,
since its watch beats for it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress

from torch.distributed import Store

from fedspa.ranks.peers import AWAY, DONE, Peers, name_ranks

_POLL = 0.05


class Watch:
    """Two threads: one talks to the store, one ends the process where nothing else would.

    store: a connection that nobody else uses; a wait on a shared one would hold up the beats.
    agent: whether a torchrun serves the store; else rank 0 does, which then stays until the others
        have read why the run ends. period: seconds between beats. patience: seconds of silence
        after which a host, or the store, is taken for dead. arrival: the same until all have come.

    Time in which this process itself did not run, as on a suspended machine, counts as two periods.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        agent: bool,
        period: float,
        patience: float,
        arrival: float,
    ) -> None:
        self._store, self._rank, self._size, self._agent = store, rank, size, agent
        self._serves = rank == 0 and not agent
        self._period, self._patience, self._arrival = period, patience, arrival
        # What the main thread has to end by itself, and to say more, once a rank is dead.
        self._grace = 2.5 * period
        self._stalled = 0.0
        self._all_came = False
        self._store_gone = False
        self._sentence: str | None = None
        self._known = threading.Event()  # why the run ends
        self._departing = threading.Event()  # this rank is about to use the store for the last time
        self._departed = threading.Event()
        self._peers = Peers(store, rank, size)
        self._threads = [
            threading.Thread(target=run, name=f"fedspa-watch{run.__name__}", daemon=True)
            for run in (self._talk, self._guard)
        ]
        for thread in self._threads:
            thread.start()

    def all_came(self) -> None:
        """Learn where the others are, once every rank is known to have joined."""
        self._peers.greet(0.0)
        self._all_came = True

    def who_ended(self) -> str | None:
        """Why the run ends, once that is known; None where no rank turns out to be dead."""
        self._known.wait(self._patience + 2 * self._period)
        return self._sentence

    def fail(self, reason: str) -> str:
        """Tell the others that this rank ends; returns why the run ends, which may be another's.

        A process that is already gone comes first: that this one ends is then its consequence.
        """
        own = f"{name_ranks([self._rank], self._size)} ended: {reason}"
        if self._sentence is None and not self._store_gone:
            try:
                gone = self._peers.gone()
                self._announce(self._killed(gone) if gone else own)
            except RuntimeError:
                self._store_gone = True
        self._conclude(own)
        self._depart()
        assert self._sentence is not None
        return self._sentence

    def finish(self) -> None:
        """Wait until every rank has finished, then stop watching.

        raises: RuntimeError where a rank ends before it has finished
        """
        try:
            self._peers.beat(DONE)
            while not self._peers.done() and not self._known.wait(_POLL):
                self._peers.listen()
        except RuntimeError:
            if self.who_ended() is None:
                raise
        self._depart()
        if self._sentence is not None:
            raise RuntimeError(self._sentence)

    # The thread that talks to the store, in which it may block for ever.

    def _talk(self) -> None:
        before = time.monotonic()
        while not self._departing.wait(self._period) and not self._known.is_set():
            now = time.monotonic()
            elapsed, before = min(now - before, 2 * self._period), now
            try:
                self._exchange(elapsed)
            except RuntimeError:
                self._store_gone = True
                self._name_server()
            self._stalled = 0.0
        if not self._departing.is_set():
            self._say_away()

    def _exchange(self, elapsed: float) -> None:
        """Beat, then look whether somebody has ended."""
        peers = self._peers
        peers.beat()
        if self._store.check(["ended"]):
            return self._conclude(self._store.get("ended").decode())
        peers.greet(elapsed)
        peers.listen(elapsed)
        if gone := peers.gone():
            self._announce(self._killed(gone))
        elif silent := peers.silent(self._patience):
            self._announce(
                f"{name_ranks(silent, self._size)} ended, or cannot be reached: nothing was heard "
                f"from there for {self._patience:g} s"
            )
        elif missing := peers.missing(self._arrival):
            self._announce(
                f"{name_ranks(missing, self._size)} did not come within {self._arrival:g} s; start "
                f"as many processes as WORLD_SIZE says, with the same MASTER_ADDR and MASTER_PORT"
            )
        return None

    def _name_server(self) -> None:
        """Say that the store's server ended: by its rank, if its process is seen to be gone."""
        # The connections of a process are closed a moment before it leaves the table.
        looks = 0 if self._agent else 4
        for _ in range(looks):
            if 0 in self._peers.vanished():
                return self._conclude(self._killed([0]))
            if self._departing.wait(self._period / 4):
                return None
        return self._conclude(self._unanswered())

    # The thread that never blocks.

    def _guard(self) -> None:
        before = time.monotonic()
        while not self._known.is_set() and not self._departed.wait(self._period / 2):
            now = time.monotonic()
            self._stalled += min(now - before, 2 * self._period)
            before = now
            # Before all have come, looking up the names of their hosts may hold up the server.
            patience = self._patience if self._all_came else self._arrival
            if self._stalled > patience + self._period:
                self._conclude(self._unanswered())
        # The main thread may compute on, or hang in a collective; an error ends it by itself.
        ended = self._departed.wait(self._grace)
        if not ended and self._departing.is_set():
            ended = self._departed.wait(self._linger() + self._period)
        if not ended:
            self._end_process()

    def _end_process(self) -> None:
        try:
            print(f"Error: {self._sentence}", file=sys.stderr, flush=True)
            if self._serves:
                self._wait_for_readers()
        finally:
            # Nothing milder ends a process whose main thread hangs in a collective.
            os._exit(1)

    # Ends.

    def _announce(self, sentence: str) -> None:
        """Say why the run ends, to all; the first sentence holds for every rank."""
        self._conclude(self._store.compare_set("ended", "", sentence).decode())

    def _conclude(self, sentence: str) -> None:
        self._sentence = self._sentence or sentence
        self._known.set()

    def _depart(self) -> None:
        """Use the store for the last time; the process that serves it stays for the others."""
        talk, guard = self._threads
        self._departing.set()
        talk.join(2 * self._period)
        self._say_away()
        if self._serves:
            self._wait_for_readers()
        self._departed.set()
        guard.join(self._period)

    def _say_away(self) -> None:
        """This rank does not use the store any more; where the store is gone, nobody reads this."""
        if not self._store_gone:
            with suppress(RuntimeError):
                self._peers.beat(AWAY)

    def _wait_for_readers(self) -> None:
        """Wait until nobody uses the store, or for as long as a reader may take."""
        until = time.monotonic() + self._linger()
        while self._peers.readers(self._patience, self._arrival) and time.monotonic() < until:
            time.sleep(_POLL)
            self._peers.greet(0.0)
            self._peers.listen()

    def _linger(self) -> float:
        """Seconds that the store is served after the end; ranks that still start need longer."""
        return self._grace + 2 * self._period if self._all_came else self._patience

    # Sentences.

    def _killed(self, ranks: list[int]) -> str:
        return (
            f"{name_ranks(ranks, self._size)} ended: the process is gone without a word (killed, "
            f"or out of memory?)"
        )

    def _unanswered(self) -> str:
        who = name_ranks([0], self._size)
        who = f"torchrun on the host of {who}" if self._agent else who
        return f"{who} ended, or cannot be reached: the store that it serves does not answer"
