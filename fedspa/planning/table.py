"""A plan as a table, and as plain values."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fedspa.clock import duration
from fedspa.planning.duration import Duration
from fedspa.planning.memory import STAGES, most
from fedspa.planning.quantities import written
from fedspa.planning.traffic import client_traffic
from fedspa.planning.verdict import Verdict, sentence, ways_out


def plan_table(verdict: Verdict, time: Duration | None) -> Table:
    """Stages by what they need; sizes in GB of 1e9 bytes."""
    job = verdict.job
    device = "one GPU" if job.device == "cuda" else "the CPU"
    split = f", {job.split} split over {job.ranks} ranks" if job.split else ""
    table = Table(
        title=f"{job.architecture.name}, {job.clients} client{'s' * (job.clients > 1)}, "
        f"{job.samples} × {job.seqlen} tokens each, on {device}{split}",
    )
    columns = ["host", "disk"] if job.device == "cpu" else ["gpu", "host", "disk"]
    table.add_column("stage")
    for column in columns:
        table.add_column(
            {"gpu": "GPU", "host": "main memory", "disk": "disk"}[column], justify="right"
        )
    table.add_column("fits")
    table.add_column("time", justify="right")
    for stage in STAGES:
        need = verdict.stages[stage]
        lacking = verdict.room.lacking(need)
        sizes = [_size(getattr(need, column)) for column in columns]
        table.add_row(stage, *sizes, _fits(lacking), _seconds(time, stage))
    table.add_section()
    worst = most(verdict.stages)
    sizes = [_size(getattr(worst, column)) for column in columns]
    table.add_row("all", *sizes, _fits(verdict.lacking), duration(time.total) if time else "")
    there = [getattr(verdict.room, column) for column in columns]
    table.add_row("there is", *("" if size is None else _size(size) for size in there), "", "")
    return table


def plan_lines(verdict: Verdict, time: Duration | None) -> list[str]:
    """What the table does not show, and the verdict in a sentence at the end."""
    job = verdict.job
    up, down = client_traffic(job)
    lines = [
        f"each client sends {written(up)} and receives {written(down)}, "
        f"{job.architecture.block_count} blocks",
        f"weights in {str(job.dtype).removeprefix('torch.')}, {job.batch} "
        f"window{'s' * (job.batch > 1)} in a forward pass",
    ]
    if job.needs_inputs:
        hidden = f"hidden states {written(job.hidden)}, {verdict.placement}"
        lines.append(f"{hidden}; what a killed run goes on with is on the disk")
    if not all(flight.traced for flight in job.flights):
        lines.append("this architecture does not run without weights: its batches are a bound")
    if time is None:
        lines.append("--calibrate measures this machine's rates, for the times")
    else:
        lines.append(f"blocks and hidden states move meanwhile: {duration(time.moving)}")
    return [*lines, sentence(verdict)]


def plan_values(verdict: Verdict, time: Duration | None, rates: Any) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, and operations or bytes a second."""
    job, worst = verdict.job, most(verdict.stages)
    up, down = client_traffic(job)
    return {
        "model": {
            "name": job.architecture.name,
            "blocks": job.architecture.block_count,
            "parameter_bytes": job.architecture.nbytes,
            "dtype": str(job.dtype).removeprefix("torch."),
        },
        "settings": job.settings.to_dict(),
        "clients": job.clients,
        "samples": job.samples,
        "seqlen": job.seqlen,
        "device": job.device,
        "split": job.split,
        "ranks": job.ranks,
        "batch_size": job.batch,
        "activations": verdict.placement if job.needs_inputs else None,
        "activation_bytes": job.hidden,
        "traced": all(flight.traced for flight in job.flights),
        "stages": {
            stage: vars(need) | {"seconds": None if time is None else time.stages[stage]}
            for stage, need in verdict.stages.items()
        },
        "needs": vars(worst),
        "has": vars(verdict.room),
        "lacking": verdict.lacking,
        "fits": verdict.fits,
        "ways_out": [] if verdict.fits else ways_out(verdict),
        "verdict": sentence(verdict),
        "client_bytes": {"up": up, "down": down},
        "seconds": None if time is None else time.total,
        "rates": None if rates is None else vars(rates),
    }


def _fits(lacking: dict[str, int]) -> str:
    return ", ".join(f"{where} lacks {written(size)}" for where, size in lacking.items()) or "yes"


def _seconds(time: Duration | None, stage: str) -> str:
    return "" if time is None else duration(time.stages[stage])


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f}"
