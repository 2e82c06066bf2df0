"""Measure jobs one after the other within a time, and leave a result file after each."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from bench import ceilings, results
from bench.operators.measure import LONGEST, described, measure_case
from bench.operators.plan import Job, jobs
from bench.operators.table import line, show

# Of a job's equal part of the time, the race; the rest is inputs, check and first calls.
RACE, MOST_RACE = 0.4, 2.0
# What is kept of the time for every job that is still to come.
LEAST_JOB = 0.6
# A slow baseline is called twice before the race and once in it, and of such there may be two.
SLOW_CALLS = 6


class Share(NamedTuple):
    """Seconds that a job may take: for its race, and for one call of a baseline."""

    race: float
    longest: float


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose what is measured."""
    for option in (
        click.option("--clients", type=click.IntRange(1), multiple=True, help="Repeatable."),
        click.option("--dtype", "dtypes", multiple=True, help="float32, bfloat16 or float16."),
        click.option("--shape", "shapes", multiple=True, help="A name, a size, or all."),
        click.option("--operator", "operators", multiple=True, help="A name; repeatable."),
    ):
        command = option(command)
    return command


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/bench/cpu.json"))
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=15.0)
@options
def command(out: Path, minutes: float, **choice: Any) -> None:
    """Measure every operator on the CPU, as `make bench` does, but without pytest."""
    raise SystemExit(run_jobs(jobs("cpu", **choice), "cpu", out, 60 * minutes))


def run_jobs(todo: Sequence[Job], device: str, out: Path, seconds: float) -> int:
    """Measure, print and write; return 0, or 1 where a job failed or had no time left."""
    start = time.monotonic()
    found: list[dict[str, Any]] = []
    rates = ceilings.measure(device)
    document = results.new("operators", device, found, rates)
    # What is there by now stays, and need not be searched for garbage before every race.
    gc.collect()
    gc.freeze()
    for number, (job, share) in enumerate(shares(todo, start + seconds), 1):
        found.append(_run(job, device, rates, share))
        click.echo(f"[{number}/{len(todo)}] {job.name}: {line(found[-1])}")
        results.write(out, document)
        if device == "cuda":
            # After the file is written: where a kernel has broken the GPU, this raises.
            torch.cuda.empty_cache()
    show(found, rates)
    click.echo(f"{len(found)} results in {out}, {time.monotonic() - start:.0f} s")
    return int(any("failed" in result for result in found))


def shares(todo: Sequence[Job], end: float) -> Iterator[tuple[Job, Share | None]]:
    """Give each job its part of the seconds that are left, and None when there are none.

    For the races the parts are equal. For slow baselines the first jobs have whatever the others
    do not need at the least: a time that is too short takes nothing from what comes first.
    """
    for number, job in enumerate(todo):
        left, others = end - time.monotonic(), len(todo) - number - 1
        if left < LEAST_JOB:
            yield job, None
            continue
        equal = left / (others + 1)
        spare = max(equal, left - LEAST_JOB * others)
        yield job, Share(min(MOST_RACE, RACE * equal), min(LONGEST, spare / SLOW_CALLS))


def _run(job: Job, device: str, rates: dict[str, Any], share: Share | None) -> dict[str, Any]:
    """Measure one job; what it raises becomes its result, and the next one has its turn."""
    about = described(job.case, job.shape, job.sizes, job.dtype)
    if share is None:
        return {**about, "failed": "not measured, the time was over; allow more --minutes"}
    try:
        return measure_case(
            job.case,
            job.shape,
            job.sizes,
            job.dtype,
            device,
            rates,
            budget=share.race,
            longest=share.longest,
        )
    except Exception as error:
        failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    gc.collect()  # the frames of the error may hold the inputs, which the next job needs freed
    return {**about, "failed": failed}
