"""Whether a run fits a machine, and which setting to change where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from fedspa.planning.job import Job
from fedspa.planning.memory import CONTEXT, Need, most, needs
from fedspa.planning.quantities import written
from fedspa.streaming.placement import SHARE

PLACEMENTS = {"cuda": ("gpu", "host", "disk"), "cpu": ("host", "disk")}
WHERE = {"gpu": "on the GPU", "host": "in main memory", "disk": "on disk"}
# How many ways out are named.
WAYS = 3


@dataclass(frozen=True)
class Room:
    """Bytes that a machine has: one GPU's, main memory, the output's disk; None: not known."""

    gpu: int | None
    host: int | None
    disk: int | None

    def lacking(self, need: Need) -> dict[str, int]:
        """For "gpu", "host" and "disk" how many bytes are missing, where any are."""
        wanted = {
            "gpu": need.gpu + CONTEXT if need.gpu else 0,
            "host": need.host,
            "disk": need.disk,
        }
        missing = {
            where: bytes_ - getattr(self, where)
            for where, bytes_ in wanted.items()
            if getattr(self, where) is not None
        }
        return {where: bytes_ for where, bytes_ in missing.items() if bytes_ > 0}


@dataclass(frozen=True)
class Verdict:
    """A run on a machine.

    placement: of the hidden states. stages: every stage's need. lacking: as `Room.lacking`.
    """

    job: Job
    room: Room
    placement: str
    stages: dict[str, Need]
    lacking: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether nothing is lacking."""
        return not self.lacking


def judge(job: Job, room: Room) -> Verdict:
    """Place the hidden states where the settings say, or at the first place where all fits.

    "auto" is as careful with GPU and main memory as a run is. Where they fit nowhere it is the
    place where the least is lacking.
    """
    wanted = PLACEMENTS[job.device] if job.activations == "auto" else (job.activations,)
    verdicts = [_at(job, room, placement) for placement in wanted]
    for verdict in verdicts[:-1]:
        if verdict.fits and _leaves_room(verdict):
            return verdict
    if verdicts[-1].fits:
        return verdicts[-1]
    return min(verdicts, key=lambda verdict: sum(verdict.lacking.values()))


def _at(job: Job, room: Room, placement: str) -> Verdict:
    stages = needs(job, placement)
    return Verdict(job, room, placement, stages, room.lacking(most(stages)))


def _leaves_room(verdict: Verdict) -> bool:
    """Whether a run would choose this place: see `placement.choose_placement`."""
    there = getattr(verdict.room, verdict.placement)
    if there is None:
        return True
    rest = getattr(most(verdict.stages), verdict.placement) - verdict.job.hidden
    return verdict.job.hidden <= SHARE[verdict.placement] * (there - rest)


def ways_out(verdict: Verdict) -> list[str]:
    """Options with which the run would fit, each tried; of a kind the one that changes least."""
    found: list[str] = []
    job = verdict.job
    others = (
        (replace(job, activations=placement), f"--activations {placement}")
        for placement in PLACEMENTS[job.device]
        if job.activations not in ("auto", placement)
    )
    placed = _first(others, verdict.room)
    # Where no place serves on its own, other changes are tried with all of them.
    both = job.activations != "auto" and not placed
    free = replace(job, activations="auto") if both else job
    also = "--activations auto " if both else ""
    for changes in _changes(free, also):
        found += _first(changes, verdict.room)
    found = [*placed, *found] or _first(_least(free, also), verdict.room)
    return found[:WAYS]


def _first(changes: Iterator[tuple[Job, str]], room: Room) -> list[str]:
    """How to ask for the first job that fits; empty where none does."""
    fitting = (how for job, how in changes if judge(job, room).fits)
    return list(islice(fitting, 1))


def _changes(job: Job, also: str) -> Iterator[Iterator[tuple[Job, str]]]:
    """Kinds of changes, of each other jobs and how to ask for them, which `also` begins."""
    yield ((_with(job, batch_size=n), f"{also}--batch-size {n}") for n in _smaller(job.batch))
    least = job.ranks if job.split == "samples" else 1
    yield (
        (replace(job, samples=n), f"{also}--samples {n}")
        for n in _smaller(job.samples)
        if n >= least
    )
    if job.split is None and job.device == "cuda":
        yield (
            (replace(job, split="samples", ranks=n), f"{also}--split samples --ranks {n}")
            for n in (2, 4, 8)
            if n <= job.samples
        )
    if job.settings.pruner == "sparsegpt":
        yield iter([(_with(job, pruner="wanda"), f"{also}--pruner wanda")])


def _least(job: Job, also: str) -> Iterator[tuple[Job, str]]:
    """All changes at once, where none alone is enough."""
    least = job.ranks if job.split == "samples" else 1
    small = _with(replace(job, samples=least), batch_size=1)
    yield small, f"{also}--batch-size 1 --samples {least}"
    if job.settings.pruner == "sparsegpt":
        yield _with(small, pruner="wanda"), f"{also}--batch-size 1 --samples {least} --pruner wanda"


def _with(job: Job, **settings: Any) -> Job:
    return replace(job, settings=replace(job.settings, **settings))


def _smaller(number: int) -> Iterator[int]:
    """Three quarters, half, three eighths, a quarter ..., down to 1."""
    found = number
    while found > 1:
        found, half = max(1, 3 * number // 4), max(1, number // 2)
        if found < number:
            yield found
        if half < found:
            yield half
        number = found = half


def sentence(verdict: Verdict) -> str:
    """The verdict in a sentence, with ways out where it does not fit."""
    job, worst = verdict.job, most(verdict.stages)
    where = {"gpu": "GPU memory", "host": "main memory", "disk": "disk"}
    if verdict.fits:
        parts = [f"{written(worst.host)} of main memory", f"{written(worst.disk)} of disk"]
        if job.device == "cuda":
            parts.insert(0, f"{written(worst.gpu)} of GPU memory")
        placed = "" if not job.needs_inputs else f", hidden states {WHERE[verdict.placement]}"
        return f"It fits: {', '.join(parts)}{placed}."
    short = ", ".join(
        f"{written(missing)} of {where[kind]}" for kind, missing in verdict.lacking.items()
    )
    ways = ways_out(verdict)
    if ways:
        return f"It does not fit: {short} lacking. It would with {', or with '.join(ways)}."
    return (
        f"It does not fit: {short} lacking, and no fewer samples, smaller batch, other place for "
        f"hidden states or other pruner makes it fit; {_last_way(verdict)}."
    )


def _last_way(verdict: Verdict) -> str:
    if "disk" in verdict.lacking:
        return "the output needs another disk: name a folder on it with --out"
    if verdict.job.device == "cuda" and "gpu" in verdict.lacking:
        return "one block does not fit this card: take one with more memory, or --device cpu"
    return "it needs a machine with more main memory"
