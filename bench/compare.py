"""`python -m bench compare A B`: what got faster or slower beyond noise.

A case counts where the medians differ by more than the noise and the intervals from the 20th to
the 80th percentile do not overlap. Only our own times are compared. A case that failed has none,
and is named with the reason.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench import results
from bench.loaded import OURS, Result, identify, machine_name, stage_seconds, total_seconds
from bench.tables import duration


@dataclass(frozen=True)
class Change:
    """One case in both files: seconds (p20, median, p80) before and after."""

    name: str
    before: tuple[float, float, float]
    after: tuple[float, float, float]

    @property
    def ratio(self) -> float:
        """How many times as long it takes now."""
        return self.after[1] / self.before[1]

    def beyond(self, noise: float) -> bool:
        """Whether the medians differ by more than the noise and the intervals lie apart."""
        apart = self.after[0] > self.before[2] or self.before[0] > self.after[2]
        return apart and max(self.ratio, 1 / self.ratio) > 1 + noise


def compare(
    before: dict[str, Any], after: dict[str, Any]
) -> tuple[list[Change], list[str], list[str]]:
    """Pair the cases of two documents: the changes, the slowest first, and what one alone has."""
    if before["kind"] != after["kind"]:
        raise ValueError(
            f"compare: one file holds results of kind {before['kind']}, the other of "
            f"{after['kind']}; compare two of the same kind"
        )
    olds, news = _timed(before), _timed(after)
    changes = [
        Change(name, _interval(olds[key], name), _interval(news[key], name))
        for key in olds.keys() & news.keys()
        for name in [describe(olds[key])]
    ]
    changes.sort(key=lambda change: (-change.ratio, change.name))
    only_before = sorted(describe(result) for key, result in olds.items() if key not in news)
    only_after = sorted(describe(result) for key, result in news.items() if key not in olds)
    return changes, only_before, only_after


def _timed(document: dict[str, Any]) -> dict[tuple[Any, ...], Result]:
    return {identify(result): result for result in document["results"] if "failed" not in result}


def failures(document: dict[str, Any], path: Path) -> list[str]:
    """Say of each case without a time that it is left out, and why there is none."""
    return [
        f"left out, no time in {path}: {describe(result)}: {result['failed']}"
        for result in document["results"]
        if "failed" in result
    ]


def describe(result: Result) -> str:
    """Name a case in a line."""
    if "model" in result:
        parts = [result["model"], result["pipeline"], result["pruner"]]
        parts += [f"{result[key]} {key}" for key in ("clients", "samples", "seqlen", "blocks")]
        parts.append(result["pattern"] or f"{result['sparsity']:.0%}")
    else:
        parts = [result["operator"], result["variant"], result["shape"]]
        parts += [f"{value} {size}" for size, value in result["sizes"].items() if value is not None]
        if "axis" in result:
            parts.append(f"along {result['axis']}")
    return ", ".join([*filter(None, parts), result["dtype"]])


def _interval(result: Result, name: str) -> tuple[float, float, float]:
    if "times" not in result:
        stages = [s for stage, s in result["stages"].items() if stage in stage_seconds(result)]
        if not stages or not all(isinstance(seconds, list) for seconds in stages):
            return (total_seconds(result),) * 3
        runs = sorted(map(sum, zip(*stages, strict=True)))
        return runs[0], total_seconds(result), runs[-1]
    times = result["times"].get(OURS)
    if times is None:
        raise ValueError(f"compare: {name} has no time of {OURS}; the file was changed by hand")
    return times["p20"], times["median"], times["p80"]


def differences(before: dict[str, Any], after: dict[str, Any], noise: float) -> list[str]:
    """Say what else than the code may have made a difference, a sentence each."""
    sentences = []
    if (one := machine_name(before)) != (other := machine_name(after)):
        sentences.append(f"The machines differ: {one} before, {other} after.")
    if before["threads"] != after["threads"]:
        sentences.append(
            f"The threads differ: {before['threads']} before, {after['threads']} after."
        )
    old, new = before["versions"], after["versions"]
    changed = [
        f"{package} {old.get(package, 'absent')} before, {new.get(package, 'absent')} after"
        for package in sorted(old.keys() | new.keys())
        if old.get(package) != new.get(package)
    ]
    if changed:
        sentences.append(f"The versions differ: {'; '.join(changed)}.")
    ratio = after["ceilings"]["copy"] / before["ceilings"]["copy"]
    if max(ratio, 1 / ratio) > 1 + max(noise, 0.1):
        sentences.append(
            f"The copy bandwidth measured beside the second is {ratio:.2f} times the first's: the "
            f"machine was not in the same state."
        )
    return sentences


@click.command("compare")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option(
    "--noise",
    default=0.05,
    type=click.FloatRange(0),
    show_default=True,
    help="Medians this close count as equal.",
)
@click.option("--fail-if-slower", is_flag=True, help="End with 1 where a case got slower.")
@click.pass_context
def command(
    ctx: click.Context, before: Path, after: Path, noise: float, fail_if_slower: bool
) -> None:
    """Say what got faster or slower from BEFORE to AFTER, beyond noise."""
    documents = results.read(before), results.read(after)
    changes, only_before, only_after = compare(*documents)
    for sentence in differences(*documents, noise):
        click.echo(sentence)
    counted = [change for change in changes if change.beyond(noise)]
    slower = [change for change in counted if change.ratio > 1]
    for line in _table(counted):
        click.echo(line)
    click.echo(
        f"{len(slower)} slower, {len(counted) - len(slower)} faster, "
        f"{len(changes) - len(counted)} as before (medians within {noise:.0%}, or p20–p80 overlap)."
    )
    for names, path, document in zip(
        (only_before, only_after), (before, after), documents, strict=True
    ):
        for name in names:
            click.echo(f"only in {path}: {name}")
        for sentence in failures(document, path):
            click.echo(sentence)
    if fail_if_slower and slower:
        ctx.exit(1)


def _table(changes: list[Change]) -> list[str]:
    rows = [("before", "after", "", "case")] if changes else []
    for change in changes:
        word = "slower" if change.ratio > 1 else "faster"
        factor = max(change.ratio, 1 / change.ratio)
        times = (duration(change.before[1]), duration(change.after[1]))
        rows.append((*times, f"{factor:.2f}× {word}", change.name))
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    return [
        "  ".join([*(cell.rjust(w) for cell, w in zip(row[:3], widths, strict=True)), row[3]])
        for row in rows
    ]
