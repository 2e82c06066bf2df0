"""A bar with the time left on a terminal, lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fedspa.events import BlockProgress, Clock, Tell, tell_json, tell_line

SECONDS_BETWEEN_LINES = 10.0
Advance = Callable[[str], None]


@contextmanager
def progress_bar(title: str, total: int, show: bool | None = None) -> Iterator[Advance]:
    """Yield a function that counts one step of `total` and says what the next one works on.

    show: True always, False never, None where stderr is a terminal. All of it goes to stderr.
    """
    terminal = sys.stderr.isatty()
    if show is False or (show is None and not terminal):
        yield lambda text: None
    elif terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[text]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, text="")
            yield lambda text: bar.update(task, advance=1, text=text)
    else:
        yield _lines(title, total)


def _lines(title: str, total: int) -> Advance:
    start = last = time.monotonic()
    done = 0

    def advance(text: str) -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if done == total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (now - start) / done * (total - done)
            print(f"{title}: {done}/{total}, {left:.0f} s left, {text}", file=sys.stderr)

    return advance


class _Written(ProgressColumn):
    """The progress in words, made anew as often as the bar is drawn."""

    def __init__(self, progress: BlockProgress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        """Text, not str: a client's name may look like rich's markup."""
        return Text(str(self._progress), no_wrap=True, overflow="ellipsis")


@contextmanager
def block_progress(
    blocks: int,
    rounds: int,
    clients: Mapping[str, int],
    *,
    first: tuple[int, int] = (0, 0),
    show: bool | None = None,
    events: bool = False,
    clock: Clock = time.monotonic,
) -> Iterator[BlockProgress]:
    """Show how a run gets on: a bar on a terminal, a line for every block elsewhere.

    clients: of every client by name the calibration tokens that go through a block; 0 where
        pruning needs none.
    first: the round and the block that the run starts with, where it resumes another.
    show: True always, False never, None where stderr is a terminal. All of it goes to stderr.
    events: JSON lines instead, as `events` describes them, wherever stderr leads.
    clock: seconds, of which only differences count.
    """
    terminal = sys.stderr.isatty()
    tell: Tell | None = tell_json if events else tell_line
    if show is False or (show is None and not terminal and not events):
        tell = None
    progress = BlockProgress(blocks, rounds, clients, first=first, tell=tell, clock=clock)
    bar = _bar(progress) if terminal and tell is tell_line else nullcontext()
    with bar:
        progress.start()
        yield progress
        progress.done()


@contextmanager
def _bar(progress: BlockProgress) -> Iterator[None]:
    """Draw a bar instead of what the progress told before."""
    columns = (TextColumn("pruning"), BarColumn(bar_width=16), _Written(progress))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=progress.rounds * progress.blocks)
        progress.tell = lambda event: bar.update(task, completed=progress.position)
        yield
