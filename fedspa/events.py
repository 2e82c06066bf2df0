"""How far a run of blocks is: an account that tells events, as lines of text or of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from fedspa.clock import duration
from fedspa.machine import gpu_memory_now, memory_now, peak_gpu_memory, peak_memory

# A plain dict with its kind under "event", and next to it only numbers and names:
# start, resumed:  round, block, blocks, rounds, clients, tokens (of calibration, of all clients)
# stage:           round, block, blocks, stage, client
# block:           round, block, blocks, rounds, seconds, tokens_per_second, seconds_left, memory,
#                  gpu_memory
# done:            blocks (of this process), seconds, tokens_per_second, peak_memory,
#                  peak_gpu_memory
# Rounds and blocks count from 0, as in the report; memory is in bytes.
Event = dict[str, Any]
Tell = Callable[[Event], None]
Clock = Callable[[], float]


class BlockProgress:
    """How far a run of blocks is, how fast it goes and how long it will take; tells events of it.

    A block's tokens are those of the clients that a stage was named with since the block before:
    a client whose hidden states have already gone as far as they must does not count.
    """

    def __init__(
        self,
        blocks: int,
        rounds: int,
        clients: Mapping[str, int],
        *,
        first: tuple[int, int] = (0, 0),
        tell: Tell | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """As for `block_progress`; tell: is given every event, as `events` describes them."""
        self.blocks, self.rounds, self.clients = blocks, rounds, clients
        self.round, self.block = first
        self.rate: float | None = None
        self.working_on = ""
        self.tell = tell
        self._clock = clock
        self._start = self._last = clock()
        self._done = 0
        self._tokens = 0
        self._seen: set[str] = set()

    def start(self) -> None:
        """Tell that the run begins, or goes on."""
        event: Event = {
            "event": "resumed" if self.finished else "start",
            "round": self.round,
            "block": self.block,
            "blocks": self.blocks,
            "rounds": self.rounds,
            "clients": len(self.clients),
            "tokens": sum(self.clients.values()),
        }
        self._told(event)

    def stage(self, name: str, client: str | None = None) -> None:
        """Say what is done now, such as "calibrate", and for which client."""
        if client is not None:
            self._seen.add(client)
        self.working_on = name if client is None else f"{name}, {client}"
        self._told(
            {
                "event": "stage",
                "round": self.round,
                "block": self.block,
                "blocks": self.blocks,
                "stage": name,
                "client": client,
            }
        )

    def block_done(self, round_index: int, index: int) -> None:
        """Count a block of a round; both from 0."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        tokens = sum(self.clients.get(client, 0) for client in self._seen)
        self.rate = _per_second(tokens, seconds)
        self._tokens += tokens
        self._done += 1
        self._seen.clear()
        self.working_on = ""
        self.round, self.block = round_index, index + 1
        left = self.seconds_left()
        self._told(
            {
                "event": "block",
                "round": round_index,
                "block": index,
                "blocks": self.blocks,
                "rounds": self.rounds,
                "seconds": round(seconds, 3),
                "tokens_per_second": self.rate,
                "seconds_left": None if left is None else round(left, 1),
                "memory": memory_now(),
                "gpu_memory": gpu_memory_now(),
            }
        )
        if self.block == self.blocks and round_index + 1 < self.rounds:
            self.round, self.block = round_index + 1, 0

    def done(self) -> None:
        """Tell that the run has come to its end."""
        seconds = self._clock() - self._start
        self._told(
            {
                "event": "done",
                "blocks": self._done,
                "seconds": round(seconds, 3),
                "tokens_per_second": _per_second(self._tokens, seconds),
                "peak_memory": peak_memory(),
                "peak_gpu_memory": peak_gpu_memory(),
            }
        )

    def _told(self, event: Event) -> None:
        if self.tell is not None:
            self.tell(event)

    def seconds_left(self) -> float | None:
        """From the mean of the blocks that this process did; None before the first of them."""
        if not self._done:
            return None
        rest = self.rounds * self.blocks - self.finished
        expected = (self._last - self._start) / self._done * rest
        return max(0.0, expected - (self._clock() - self._last))

    @property
    def finished(self) -> int:
        """Blocks done so far, of all rounds and of the run that this one resumes."""
        return self.round * self.blocks + self.block

    @property
    def position(self) -> float:
        """Blocks done so far, and of the one at work the share of the clients that began it."""
        begun = max(0, len(self._seen) - 1) / max(1, len(self.clients))
        return self.finished + min(begun, 1.0)

    def __str__(self) -> str:
        left = self.seconds_left()
        facts = [
            block_place(self.round, self.rounds, min(self.block, self.blocks - 1), self.blocks),
            tokens_rate(self.rate),
            "" if left is None else f"{duration(left)} left",
            memory(memory_now(), gpu_memory_now()),
            self.working_on,
        ]
        return ", ".join(filter(None, facts))


def _per_second(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 1) if tokens and seconds > 0 else None


def tell_json(event: Event) -> None:
    """Write an event as one line of JSON to stderr."""
    print(json.dumps(event), file=sys.stderr, flush=True)


def tell_line(event: Event) -> None:
    """Write one line to stderr when a block is done, and one at the end; else nothing."""
    if event["event"] == "block":
        facts = [
            duration(event["seconds"]),
            tokens_rate(event["tokens_per_second"]),
            memory(event["memory"], event["gpu_memory"]),
            f"{duration(event['seconds_left'])} left" if event["seconds_left"] else "",
        ]
        place = block_place(event["round"], event["rounds"], event["block"], event["blocks"])
        _write(place + ": ", facts)
    elif event["event"] == "done":
        most = memory(event["peak_memory"], event["peak_gpu_memory"])
        blocks = "1 block" if event["blocks"] == 1 else f"{event['blocks']} blocks"
        facts = [
            f"{blocks} in {duration(event['seconds'])}",
            tokens_rate(event["tokens_per_second"]),
            f"{most} at most" if most else "",
        ]
        _write("done: ", facts)


def _write(start: str, facts: list[str]) -> None:
    print(start + ", ".join(filter(None, facts)), file=sys.stderr, flush=True)


def block_place(round_index: int, rounds: int, block: int, blocks: int) -> str:
    """Where a run is, counted from 1: "block 12/80", after its round where there are several."""
    place = f"block {block + 1}/{blocks}"
    return place if rounds == 1 else f"round {round_index + 1}/{rounds}, {place}"


def tokens_rate(tokens_per_second: float | None) -> str:
    """Such as "84,500 tokens/s"; nothing where no tokens went through."""
    return "" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s"


def memory(host: int, gpu: int) -> str:
    """Bytes of main memory and of a GPU's, those that are known: "1.8 GB, 20.4 GB on the GPU"."""
    parts = [
        f"{host / 1e9:.1f} GB" if host else "",
        f"{gpu / 1e9:.1f} GB on the GPU" if gpu else "",
    ]
    return ", ".join(filter(None, parts))
