"""Looks for answers; while one is slow to arrive, all others are looked for."""

from __future__ import annotations

import logging
import threading

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

log = logging.getLogger("flwr")

# Seconds for an answer to arrive before others are taken in beside it.
ALONE = 10.0


class Mailbox:
    """The answers that come to a server.

    Flower hands out an answer whose upload has only begun, and waits for the rest of it: as long as
    a slow line takes, and for over an hour where a client wants it so. One answer at a time is
    taken in, so that memory holds one; those that take longer than ALONE come beside the others.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._slow: dict[str, _Pull] = {}

    def look(self, message_id: str) -> list[Message | None]:
        """What has come for a message: nothing yet, or its answer, None where that cannot be read.

        message_id: "" where nothing is on its way. Raises httpx.HTTPError where the network fails.
        """
        if not message_id:
            return []
        pull = self._slow.pop(message_id, None)
        if pull is None:
            pull = _Pull(self._grid, message_id)
            pull.thread.join(ALONE)
        if pull.thread.is_alive():
            self._slow[message_id] = pull
            return []
        return pull.found()


class _Pull:
    """One look for an answer, in a thread that does not keep the server's process from ending."""

    def __init__(self, grid: Grid, message_id: str) -> None:
        self._grid = grid
        self._message_id = message_id
        self._found: list[Message | None] = []
        self._error: httpx.HTTPError | None = None
        self.thread = threading.Thread(target=self._pull, daemon=True)
        self.thread.start()

    def found(self) -> list[Message | None]:
        if self._error is not None:
            raise self._error
        return self._found

    def _pull(self) -> None:
        try:
            self._found = list(self._grid.pull_messages([self._message_id]))
        except httpx.HTTPError as error:
            self._error = error
        except Exception as error:
            # Flower builds an answer from what a client sent, and checks little of it.
            log.warning("fedspa: an answer could not be read (%s)", type(error).__name__)
            self._found = [None]
