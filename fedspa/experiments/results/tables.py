"""The tables of a grid: Markdown for its documentation, CSV for other programs, text to look at."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedspa.experiments.results.cells import (
    COSTS,
    best_in_bold,
    cost_cells,
    count_cell,
    federation_cells,
    markdown,
    paragraphs,
    perplexity_cell,
    target_text,
    title,
    value_text,
)
from fedspa.experiments.results.comparisons import axis_tables, improvement_tables, world_tables
from fedspa.experiments.results.places import (
    competitions,
    families,
    find,
    methods,
    targets,
    usual_target,
)
from fedspa.experiments.results.summary import Record, Row, Target, latest, summarise
from fedspa.tables import text_table

if TYPE_CHECKING:
    from rich.table import Table

MOST_FAILURES = 10
FIELDS = ("mean", "spread", "sparsity", "bytes_up", "bytes_down", "exchanges", "seconds")


def write_tables(
    records: Collection[Record], folder: str | Path, order: Sequence[str] = ()
) -> list[Path]:
    """Write every table into tables.md and every row into results.csv; return their paths."""
    sections = {
        "Perplexity": main_tables(records, order),
        "By domain, and the costs": domain_tables(records, order),
        "Against the clients' own models, and against pooled data": improvement_tables(
            records, order
        ),
        "By setting": axis_tables(records, order),
        "Other federations": world_tables(records, order),
    }
    text = paragraphs(
        part for name, table in sections.items() if table for part in (f"## {name}", table)
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = folder / "tables.md"
    tables.write_text(f"# Results\n\n{text}", encoding="utf-8")
    results = folder / "results.csv"
    with open(results, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(csv_lines(records))
    return [tables, results]


def main_tables(
    records: Collection[Record],
    order: Sequence[str] = (),
    pruners: Collection[str] | None = None,
) -> str:
    """Perplexity by method and target, a table a place; the best federated method is in bold.

    order:   the methods as the experiment file names them
    pruners: of these alone; None: of all
    returns: Markdown; failed cases are told at its end
    """
    rows = summarise(records)
    parts = []
    for pruner, place, here in competitions(rows, pruners):
        columns = targets(here)
        names = methods(here, order)
        found = [[find(here, name, target) for name in names] for target in columns]
        cells = zip(*map(best_in_bold, found), strict=True)
        lines = [[name, *line] for name, line in zip(names, cells, strict=True)]
        parts.append(title(place, place.model, _several(pruner, rows)))
        parts.append(markdown(["perplexity", *map(target_text, columns)], lines))
    return paragraphs([*parts, failures(records)])


def domain_tables(
    records: Collection[Record],
    order: Sequence[str] = (),
    pruners: Collection[str] | None = None,
    target: Target = None,
) -> str:
    """Perplexity by domain, and what it cost, at one target; None: 60 %, or else the middle one.

    MB are 10^6 bytes of one client over the run; seconds are of pruning.
    """
    rows = summarise(records)
    parts = []
    for pruner, place, here in competitions(rows, pruners):
        chosen = usual_target(here) if target is None else target
        found = [find(here, name, chosen) for name in methods(here, order)]
        shown = [row for row in found if row is not None]
        domains = list(dict.fromkeys(domain for row in shown for domain in row.perplexity))
        lines = [
            [
                row.method,
                *(value_text(row.perplexity.get(domain)) for domain in domains),
                perplexity_cell(row),
                count_cell(100 * row.sparsity, decimals=4),
                *cost_cells(row),
            ]
            for row in shown
        ]
        headings = ["perplexity", *domains, "geometric mean", "sparsity %", *COSTS]
        parts.append(title(place, place.model, target_text(chosen), _several(pruner, rows)))
        parts.append(markdown(headings, lines))
    return paragraphs(parts)


def failures(records: Iterable[Record]) -> str:
    """Say which cases failed, and of how many; "" where none did."""
    cases = latest(records)
    failed = [record for record in cases if record.get("error")]
    if not failed:
        return ""
    lines = [f"{len(failed)} of {len(cases)} cases failed:", ""]
    lines += [f"- {_case_text(record)}: {record['error']}" for record in failed[:MOST_FAILURES]]
    if len(failed) > MOST_FAILURES:
        lines.append(f"- and {len(failed) - MOST_FAILURES} more")
    return "\n".join(lines)


def _case_text(record: Record) -> str:
    facts = [record["model"], record["method"]]
    if record.get("target") is not None:
        facts.append(target_text(record["target"]))
    facts += [
        f"{name} {record[name]}"
        for name in ("clients", "partition", "seed")
        if record.get(name) is not None
    ]
    return ", ".join(facts)


def table(records: Collection[Record], order: Sequence[str] = ()) -> Table:
    """Every method at every place, for a terminal: perplexity by target."""
    rows = summarise(records)
    columns = targets(rows)
    several = len({row.model for row in rows}) > 1
    lines = []
    for row in _by_method(rows, order):
        same = [r for r in rows if _without_target(r) == _without_target(row)]
        where = ["", "", ""] if row.clients is None else federation_cells(row.place)
        cells = [perplexity_cell(find(same, row.method, target)) for target in columns]
        # Dense is the same at every target; without any it still has a number to show.
        cells = cells or [perplexity_cell(row)]
        place = " ".join(filter(None, where))
        lines.append([row.label, *([row.model] if several else []), place, *cells])
    headings = ["method", *(["model"] if several else []), "clients"]
    return text_table(
        [*headings, *(map(target_text, columns) if columns else ["dense"])], lines, None
    )


def _by_method(rows: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """One row of those that differ in their target alone, by place, then method."""
    names = methods(rows, order)
    found = list({_without_target(row): row for row in rows}.values())
    return sorted(
        found,
        key=lambda row: (
            row.clients or 0,
            row.partition or "",
            row.capacities or (),
            row.model,
            names.index(row.method),
        ),
    )


def _without_target(row: Row) -> tuple[object, ...]:
    return row.place, row.method, row.kind, row.pruner, row.axes


def csv_lines(records: Iterable[Record]) -> list[list[str]]:
    """The heading and one line a row, with plain numbers; empty where there is none."""
    rows = summarise(records)
    domains = list(dict.fromkeys(domain for row in rows for domain in row.perplexity))
    heading = [
        *("model", "target", "clients", "partition", "capacities", "method", "kind", "settings"),
        *("seeds", "failed", "perplexity", *FIELDS[1:]),
        *(f"perplexity of {domain}" for domain in domains),
    ]
    lines = [heading]
    for row in rows:
        values = [row.model, row.target, row.clients, row.partition]
        values += [" ".join(f"{capacity:g}" for capacity in row.capacities or ())]
        values += [row.method, row.kind, json.dumps(dict(row.axes)) if row.axes else ""]
        values += [" ".join(str(seed) for seed in row.seeds if seed is not None), row.failed]
        # What was not counted is empty; an undefined perplexity was measured and says nan.
        counted = [getattr(row, name) for name in FIELDS]
        values += [None if math.isnan(value) else value for value in counted]
        if row.seeds:
            values[-len(FIELDS)] = row.mean
        values += [row.perplexity.get(domain) for domain in domains]
        lines.append(["" if value is None else str(value) for value in values])
    return lines


def _several(pruner: str, rows: Sequence[Row]) -> str:
    """The pruner's name where tables of several follow one another."""
    return pruner if len(families(rows)) > 1 else ""
