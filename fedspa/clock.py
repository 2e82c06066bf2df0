"""How long the stages of a run take, without waiting for a GPU after each of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StageClock:
    """Seconds by stage.

    A GPU works behind the host, so that the host's clock would time how fast work is sent. There
    events are recorded between the work, on the stream that it is sent to, and only read when the
    seconds are asked for.
    """

    def __init__(self, device: torch.device) -> None:
        """device: where the work is done."""
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        begin = self._mark()
        yield
        self._spans.append((name, begin, self._mark()))

    def seconds(self) -> dict[str, float]:
        """The sums so far, the stages in the order of their first end; waits for a GPU, once."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        sums: dict[str, float] = {}
        for name, begin, end in self._spans:
            sums[name] = sums.get(name, 0.0) + self._between(begin, end)
        return sums

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return end - begin
        return begin.elapsed_time(end) / 1000


def duration(seconds: float) -> str:
    """Spell seconds as a person would: 8.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
