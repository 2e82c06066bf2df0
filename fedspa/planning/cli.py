"""`fedspa plan`: what a run will need, whether it fits, and which setting to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from transformers.utils import logging

from fedspa.loading import DTYPES
from fedspa.machine import memory_now
from fedspa.planning.architecture import read_architecture
from fedspa.planning.duration import estimate
from fedspa.planning.job import ACTIVATIONS, SPLITS, Job
from fedspa.planning.quantities import (
    device_memory,
    free_disk,
    free_memory,
    parse_bytes,
)
from fedspa.planning.rates import measure
from fedspa.planning.table import plan_lines, plan_table, plan_values
from fedspa.planning.verdict import Room, judge
from fedspa.settings import (
    AGGREGATIONS,
    MESSAGE_DTYPES,
    PRUNERS,
    SCHEDULES,
    STATISTICS_DTYPES,
    Settings,
)

DEFAULT_SPARSITY = 0.5
COUNT = click.IntRange(1)


class _Size(click.ParamType):
    """Bytes, written such as 80GB or 80GiB."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        return value if isinstance(value, int) else parse_bytes(str(value))


SIZE = _Size()


@click.command("plan", context_settings={"show_default": True})
@click.argument("model")
@click.option("--clients", type=COUNT, default=1, help="Clients of a run.")
@click.option("--samples", type=COUNT, default=128, help="Calibration windows a client.")
@click.option("--seqlen", type=COUNT, default=2048, help="Tokens of a window.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="[cuda where there is one]")
@click.option("--device-memory", type=SIZE, help="One GPU's, such as 80GB.  [this machine's]")
@click.option("--host-memory", type=SIZE, help="Main memory, such as 512GB.  [what is free here]")
@click.option("--disk", type=SIZE, help="Space for the output.  [what is free under --out]")
@click.option("--out", type=click.Path(path_type=Path), default=".", help="Where it would go.")
@click.option("--pruner", type=click.Choice(PRUNERS), default="sparsegpt")
@click.option("--sparsity", type=float, help=f"Share to prune.  [default: {DEFAULT_SPARSITY}]")
@click.option("--pattern", help='Keep n of every m instead, such as "2:4".')
@click.option("--aggregation", type=click.Choice(AGGREGATIONS), default="l0")
@click.option("--schedule", type=click.Choice(SCHEDULES), help="[as in a run]")
@click.option("--synchronize-every", type=COUNT, help="Blocks between two exchanges.")
@click.option("--statistics-dtype", type=click.Choice(STATISTICS_DTYPES), default="float32")
@click.option("--message-dtype", type=click.Choice(MESSAGE_DTYPES), help="Weights in messages.")
@click.option("--block-size", type=COUNT, default=128, help="SparseGPT's columns.")
@click.option("--batch-size", type=COUNT, help="Windows in a forward pass; else by the device.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", help="Weights in memory.")
@click.option("--activations", type=click.Choice(ACTIVATIONS), default="auto")
@click.option("--split", type=click.Choice(SPLITS), help="What several ranks share.")
@click.option("--ranks", type=COUNT, default=1, help="Processes, each with a GPU of its own.")
@click.option("--calibrate", is_flag=True, help="Measure this machine for some seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, in bytes.")
def command(**options: Any) -> None:
    """Say what pruning MODEL needs: a checkpoint folder, of which the configuration is read.

    Or a model known by name, such as llama-2-70b. Ends with 1 where it does not fit.
    """
    logging.set_verbosity_error()
    job, room = _job(options)
    verdict = judge(job, room)
    rates = measure(job, options["out"]) if options["calibrate"] else None
    time = None if rates is None else estimate(job, verdict.placement, rates)
    if options["as_json"]:
        click.echo(json.dumps(plan_values(verdict, time, rates), indent=2))
    else:
        console = Console()
        console.print(plan_table(verdict, time))
        for line in plan_lines(verdict, time):
            console.print(line, soft_wrap=True, highlight=False)
    click.get_current_context().exit(0 if verdict.fits else 1)


def _job(options: dict[str, Any]) -> tuple[Job, Room]:
    """What to plan and for which machine; ValueError where the options contradict each other."""
    gpu = options["device_memory"] or device_memory()
    device = options["device"] or ("cpu" if gpu is None else "cuda")
    if device == "cuda" and gpu is None:
        raise ValueError(
            "plan: --device cuda, and PyTorch finds no GPU here; say what the one that is meant "
            "has, such as --device-memory 80GB"
        )
    sparsity = options["sparsity"]
    if sparsity is None and options["pattern"] is None:
        sparsity = DEFAULT_SPARSITY
    names = [
        *("pruner", "pattern", "aggregation", "schedule", "synchronize_every", "message_dtype"),
        *("statistics_dtype", "block_size"),
    ]
    settings = Settings(
        sparsity=sparsity,
        batch_size=options["batch_size"],
        **{name: options[name] for name in names},
    )
    job = Job(
        architecture=read_architecture(options["model"], options["dtype"]),
        settings=settings,
        clients=options["clients"],
        samples=options["samples"],
        seqlen=options["seqlen"],
        device=device,
        device_memory=gpu if device == "cuda" else None,
        activations=options["activations"],
        split=options["split"],
        ranks=options["ranks"],
        process=memory_now(),
    )
    disk = options["disk"] or free_disk(options["out"])
    room = Room(gpu=job.device_memory, host=options["host_memory"] or free_memory(), disk=disk)
    return job, room
