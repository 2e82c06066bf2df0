"""Looks for answers; while one is slow to arrive, all others are looked for."""

from __future__ import annotations

import logging
import threading
import time
from queue import SimpleQueue
from typing import Self

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

log = logging.getLogger("flwr")

# Seconds for an answer to arrive before others are taken in beside it.
ALONE = 10.0
# How many that are slower than that are taken in at a time.
AT_ONCE = 4
THREAD = "fedspa-mailbox"


class Mailbox:
    """The answers that come to a server.

    Flower hands out an answer whose upload has only begun, and waits for the rest of it: as long as
    a slow line takes, and for over an hour where a client wants it so. One answer at a time is
    taken in, since memory holds what is; one that takes longer than ALONE does not keep others
    from it, until so many are slow at once.
    """

    def __init__(self, grid: Grid, longest: float) -> None:
        """longest: seconds after which one that is slow does not count among them any more."""
        self._grid = grid
        self._longest = longest
        self._looker = _Looker(grid)
        self._slow: dict[str, _Looker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """End the threads; one that is looking ends once it has found it, or with the process."""
        for looker in (self._looker, *self._slow.values()):
            looker.end()

    def look(self, message_id: str) -> list[Message | None]:
        """What has come for a message: nothing yet, or its answer, None where that cannot be read.

        message_id: "" where nothing is on its way. Raises httpx.HTTPError where the network fails.
        """
        if not message_id or message_id not in self._slow and self._is_full():
            return []
        looker, wait = self._slow.pop(message_id, None), 0.0
        if looker is None:
            looker, wait = self._looker, ALONE
            looker.begin(message_id)
        if not looker.done.wait(wait):
            self._slow[message_id] = looker
            if looker is self._looker:
                self._looker = _Looker(self._grid)
            return []
        if looker is not self._looker:
            looker.end()
        return looker.found()

    def _is_full(self) -> bool:
        begun = time.monotonic() - self._longest
        return sum(looker.since > begun for looker in self._slow.values()) >= AT_ONCE

    def forget(self, message_id: str) -> None:
        """Look no more for a message, and keep nothing of what still comes for it."""
        looker = self._slow.pop(message_id, None)
        if looker is not None:
            looker.end()


class _Looker:
    """Looks for one answer after the other, in a thread that ends with the server's process.

    One thread for all, since memory that a thread gives back is its own to use again.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._asked: SimpleQueue[str | None] = SimpleQueue()
        self._found: list[Message | None] = []
        self._error: httpx.HTTPError | None = None
        self.done = threading.Event()
        self.since = 0.0
        threading.Thread(target=self._look, name=THREAD, daemon=True).start()

    def begin(self, message_id: str) -> None:
        self.since = time.monotonic()
        self.done.clear()
        self._asked.put(message_id)

    def end(self) -> None:
        """Let the thread end, once it has found what it is looking for."""
        self._asked.put(None)

    def found(self) -> list[Message | None]:
        """What was found, which is not kept here."""
        found, self._found = self._found, []
        error, self._error = self._error, None
        if error is not None:
            raise error
        return found

    def _look(self) -> None:
        while (message_id := self._asked.get()) is not None:
            try:
                self._found = list(self._grid.pull_messages([message_id]))
            except httpx.HTTPError as error:
                self._error = error
            except Exception as error:
                # Flower builds an answer from what a client sent, and checks little of it.
                log.warning("fedspa: an answer could not be read (%s)", type(error).__name__)
                self._found = [None]
            self.done.set()
