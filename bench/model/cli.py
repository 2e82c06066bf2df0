"""`python -m bench model`: stage by stage, fedspa against the steps of its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from bench import ceilings, memory, results
from bench.model.measure import agreement, expected, measure, warm_up
from bench.model.pipelines import Job
from bench.shapes import find_model
from fedspa.progress import progress_bar
from fedspa.settings import Settings
from fedspa_kernels.arguments import parse_pattern

COUNT = click.IntRange(1)
SEED = 0


@click.command("model")
@click.option("--shape", required=True, help="Such as llama-2-7b; an unknown one lists the known.")
@click.option(
    "--blocks", type=COUNT, required=True, help="Blocks to measure; one shows no propagation."
)
@click.option("--clients", default="1,8", help="Numbers of clients, each a run.")
@click.option("--samples", type=COUNT, default=128, help="Windows in all, dealt to the clients.")
@click.option("--seqlen", type=COUNT, default=2048, help="Tokens of a window.")
@click.option("--batch-size", default="auto", help="Windows a forward pass of fedspa, or auto.")
@click.option("--pruner", type=click.Choice(["sparsegpt", "wanda"]), default="sparsegpt")
@click.option("--sparsity", type=float, help="Share of every matrix to prune.  [0.5]")
@click.option("--pattern", help="n:m, such as 2:4, in place of a sparsity.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="[cuda where there is one]")
@click.option("--peers/--no-peers", default=True, help="Measure the peers' steps as well.")
@click.option("--out", type=click.Path(path_type=Path), help="Result file.")
def command(**options: Any) -> None:
    """Time the pruning pipeline on blocks of a real shape, with random weights and tokens.

    Blocks are made on the device one at a time, so that any model fits whose block does. A CPU
    wants little work, such as --shape opt-1.3b --blocks 2 --samples 8 --seqlen 256 --dtype float32.
    """
    job, clients = _job(options)
    pipelines = ["fedspa", "peers"] if options["peers"] else ["fedspa"]
    for count in clients:
        _say_size(job, options["samples"], count, pipelines)
    out = options["out"] or Path(f"build/bench/model-{job.shape.name}-{job.device.type}.json")
    found = _measure_all(job, options["samples"], clients, pipelines, out)
    for count in clients:
        Console().print(_table([r for r in found if r["clients"] == count]))
    click.echo(f"{out}: {len(found)} results")


def _measure_all(
    job: Job, samples: int, clients: list[int], pipelines: list[str], out: Path
) -> list[dict[str, Any]]:
    """Every number of clients through every pipeline; the file is complete after each."""
    found: list[dict[str, Any]] = []
    limits = ceilings.measure(job.device)
    steps = len(pipelines) * job.blocks * sum(clients)
    with progress_bar(job.shape.name, steps, None) as advance:
        warm_up(pipelines, job)
        for count in clients:
            outcomes = {}
            for pipeline in pipelines:
                result, outcomes[pipeline] = measure(pipeline, job, samples, count, advance)
                found.append(result)
                if len(outcomes) == 2:
                    first, whole = agreement(outcomes["fedspa"], outcomes["peers"])
                    said = f"; masks agree in {first:.2%} of block 1 and {whole:.2%} of all blocks"
                    for result in found[-2:]:
                        result["check"] += said
                results.write(out, results.new("model", job.device.type, found, limits))
    return found


def _job(options: dict[str, Any]) -> tuple[Job, list[int]]:
    """What to run; ValueError where the options ask for something impossible."""
    shape = find_model(options["shape"])
    if options["blocks"] > shape.blocks:
        raise ValueError(
            f"--blocks is {options['blocks']}, and {shape.name} has {shape.blocks}; ask for 1 to "
            f"{shape.blocks}"
        )
    clients = _clients(options["clients"], options["samples"])
    device = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and PyTorch finds no GPU here; use --device cpu")
    sparsity, pattern = options["sparsity"], options["pattern"]
    if sparsity is None and pattern is None:
        sparsity = 0.5
    settings = Settings(
        pruner=options["pruner"],
        sparsity=sparsity,
        pattern=pattern,
        batch_size=_batch_size(options["batch_size"]),
        seed=SEED,
    )
    if pattern is not None:
        for width in (shape.hidden, shape.ffn):
            parse_pattern(f"--pattern for {shape.name}", pattern, width)
    dtype = getattr(torch, options["dtype"])
    job = Job(shape, options["blocks"], settings, dtype, torch.device(device), options["seqlen"])
    return job, clients


def _clients(text: str, samples: int) -> list[int]:
    try:
        clients = [int(number) for number in text.split(",")]
    except ValueError:
        clients = []
    if not clients or min(clients) < 1:
        raise ValueError(f"--clients is {text!r}; write numbers of at least 1, such as 1,8")
    if max(clients) > samples:
        raise ValueError(
            f"{max(clients)} clients cannot share --samples {samples}; give each a window"
        )
    return clients


def _batch_size(text: str) -> int | None:
    """None lets fedspa choose by the device."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--batch-size is {text!r}; give a number of windows, or auto")
    return int(text)


def _say_size(job: Job, samples: int, clients: int, pipelines: list[str]) -> None:
    """Say how much a run will be, and refuse what cannot fit; on a CPU the process would die."""
    wanted, operations = expected(job, samples, clients, pipelines)
    click.echo(
        f"{job.shape.name}, {job.blocks} of {job.shape.blocks} blocks, {clients} client"
        f"{'s' * (clients > 1)}, {samples} windows of {job.seqlen} tokens: about "
        f"{wanted / 2**30:.1f} GiB, and {operations / 1e12:.3g} TFLOP through fedspa",
        err=True,
    )
    free = memory.available(job.device)
    if free is not None and wanted > free:
        raise RuntimeError(
            f"{wanted / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free on "
            f"{job.device.type}; take fewer --samples or --clients, or a smaller --shape"
        )


def _table(found: list[dict[str, Any]]) -> Table:
    """Stage by pipeline for one number of clients, with their ratio."""
    one = found[0]
    target = one["pattern"] or f"{100 * one['sparsity']:g} %"
    table = Table(
        title=f"{one['model']}, {one['pruner']} {target}, {one['clients']} client"
        f"{'s' * (one['clients'] > 1)}, {one['blocks']} of {one['of_blocks']} blocks",
        caption="\n".join(f"{result['pipeline']}: {result['check']}" for result in found),
    )
    table.add_column("seconds")
    for heading in [result["pipeline"] for result in found] + ["ratio"] * (len(found) > 1):
        table.add_column(heading, justify="right")
    for stage in one["stages"]:
        table.add_row(stage, *_cells([result["stages"].get(stage, 0.0) for result in found]))
    sums = [sum(s for name, s in r["stages"].items() if name != "build") for r in found]
    table.add_section()
    table.add_row("all but build", *_cells(sums))
    if all(result["extrapolated"] for result in found):
        how = "measured" if one["blocks"] == one["of_blocks"] else "extrapolated"
        totals = [result["extrapolated"]["seconds"] for result in found]
        table.add_row(f"{one['of_blocks']} blocks, {how}", *_cells(totals))
    for where in ("host", "device"):
        peaks = [result["peak_bytes"][where] for result in found]
        if any(peaks):
            table.add_row(f"peak GiB, {where}", *(f"{(peak or 0) / 2**30:.2f}" for peak in peaks))
    return table


def _cells(seconds: list[float]) -> list[str]:
    cells = [f"{value:.3f}" for value in seconds]
    if len(seconds) == 2:
        cells.append(f"{seconds[1] / seconds[0]:.1f}×" if seconds[0] else "")
    return cells
