"""Measure jobs one after the other within a time, and leave a result file after each."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from bench import ceilings, results
from bench.operators.measure import LONGEST, described, measure
from bench.operators.plan import Job, jobs
from bench.operators.table import line, show

# Of a job's time, the race; the rest is inputs, check and first calls.
RACE, MOST_RACE = 0.4, 2.0
# What a job takes besides its slow baselines: at least two calls of each of these.
LEAST_JOB = 0.6


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
    for number, (job, share) in enumerate(shares(todo, device, start + seconds), 1):
        found.append(_run(job, device, rates, share))
        click.echo(f"[{number}/{len(todo)}] {job.name}: {line(found[-1])}")
        results.write(out, results.new("operators", device, found, rates))
    show(found, rates)
    click.echo(f"{len(found)} results in {out}, {time.monotonic() - start:.0f} s")
    return int(any("failed" in result for result in found))


def shares(todo: Sequence[Job], device: str, end: float) -> Iterator[tuple[Job, float]]:
    """Give each job its share of the seconds that are left, by what it is thought to take."""
    expected = [expected_seconds(job, device) for job in todo]
    for number, job in enumerate(todo):
        left = max(0.0, end - time.monotonic())
        yield job, left * expected[number] / sum(expected[number:])


def expected_seconds(job: Job, device: str) -> float:
    """About how long a job takes: its slow baselines are called twice."""
    here = [b for b in job.case.baselines.values() if not b.why_not()]
    slow = sum(baseline.seconds(job.sizes, device) for baseline in here)
    return LEAST_JOB + 2 * slow


def _run(job: Job, device: str, rates: dict[str, Any], share: float) -> dict[str, Any]:
    """Measure one job; what it raises becomes its result, and the next one has its turn."""
    about = described(job.case, job.shape, job.sizes, job.dtype)
    if share == 0:
        return {**about, "failed": "not measured, the time was over; allow more --minutes"}
    try:
        return measure(
            job.case,
            job.shape,
            job.sizes,
            job.dtype,
            device,
            rates,
            budget=min(MOST_RACE, RACE * share),
            # Of two slow baselines, each is called twice.
            longest=min(LONGEST, share / 4),
        )
    except Exception as error:
        text = " ".join(str(error).split())
        return {**about, "failed": f"{type(error).__name__}: {text[:300]}"}
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
