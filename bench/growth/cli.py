"""The command: one point after the other, each stored when it is done, so that a run can go on."""

import time
from pathlib import Path
from typing import Any

import click
import torch

from bench import ceilings, results
from bench.growth.fit import curves
from bench.growth.page import sentences
from bench.growth.points import AXES, OPERATORS, Point, measure_point, points
from bench.loaded import identify
from bench.operators.measure import described
from bench.tables import duration

# What must be the same before results are added to a file.
SAME = ("kind", "commit", "device", "machine", "versions", "threads")


@click.command("growth")
@click.option("--axis", default=",".join(AXES), help="Axes, by comma.")
@click.option("--operator", default=",".join(OPERATORS), help="Operators, by comma.")
@click.option("--out", type=click.Path(path_type=Path), help="[build/bench/growth-DEVICE.json]")
@click.option("--minutes", type=click.FloatRange(0), help="Begin no further point after so long.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="[cuda where there is one]")
def command(
    axis: str, operator: str, out: Path | None, minutes: float | None, device: str | None
) -> None:
    """Measure time and peak memory of the operators along cols, rows, clients and tokens.

    Every point is stored at once. Points that the file already has, from the same commit and
    machine, are left as they are: the same command again completes a run that was ended.
    """
    chosen = points(axis.split(","), operator.split(","))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and PyTorch finds no GPU here; use --device cpu")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out = out or Path(f"build/bench/growth-{place.type}.json")
    document = _document(out, place)
    left = _measure_all(chosen, document, out, place, minutes)
    if left:
        click.echo(f"{left} points are left; the same command goes on with them.")
        return
    found = [{**result, "ceilings": document["ceilings"]} for result in document["results"]]
    for curve in curves(found):
        click.echo(
            f"{curve.operator} along {curve.axis} ({curve.what}): exponent of the time "
            f"{curve.time}, the floor's {curve.floor_time}, of the peak memory "
            f"{curve.peak or 'none, too small'}"
        )
    for sentence in sentences(curves(found)):
        click.echo(sentence)
    click.echo(f"{out}: {len(found)} results")


def _document(out: Path, place: torch.device) -> dict[str, Any]:
    """Return the file to add to, or a new one.

    raises: ValueError where the file is of another kind, commit or machine
    """
    if not out.exists():
        return results.new("growth", place.type, [], ceilings.measure(place))
    stored = results.read(out)
    now = results.new("growth", place.type, [], stored["ceilings"])
    for key in SAME:
        if stored[key] != now[key]:
            raise ValueError(
                f"{out} has {key} {stored[key]}, and this run has {now[key]}; remove the file or "
                f"choose another with --out"
            )
    return stored


def _measure_all(
    chosen: list[Point],
    document: dict[str, Any],
    out: Path,
    place: torch.device,
    minutes: float | None,
) -> int:
    """Measure what the file lacks, storing it after every point; return how many are left."""
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    start = time.monotonic()
    there = {identify(result) for result in document["results"]}
    missing = [point for point in chosen if identify(_described(point, dtype)) not in there]
    if len(missing) < len(chosen):
        click.echo(f"{out} has {len(chosen) - len(missing)} of {len(chosen)} points already.")
    for index, point in enumerate(missing):
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            return len(missing) - index
        result = measure_point(point, dtype, place, document["ceilings"])
        document["results"].append(result)
        results.write(out, document)
        peak = result["peak_bytes"].get("fedspa")
        memory = "" if peak is None else f", {peak / 1e6:,.1f} MB"
        click.echo(f"{point.name}: {duration(result['times']['fedspa']['median'])}{memory}")
    return 0


def _described(point: Point, dtype: torch.dtype) -> dict[str, Any]:
    shape = f"{point.sizes.rows}x{point.sizes.cols}"
    return {**described(point.case, shape, point.sizes, dtype), "axis": point.axis}
