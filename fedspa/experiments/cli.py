"""`fedspa experiment`: run a grid, go on with one, and write its tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from transformers.utils import logging

from fedspa.experiments.experiment_file import Experiment, read_experiment
from fedspa.experiments.results.expectations import check
from fedspa.experiments.store import RESULTS_FILE, Record, read_records, succeeded
from fedspa.experiments.workers import pending, run_experiment
from fedspa.loading import check_device
from fedspa.progress import progress_bar

RESULTS = Path("runs/experiments")


@click.command("experiment", context_settings={"show_default": True})
@click.argument("file")
@click.option("--out", type=click.Path(path_type=Path), help=f"[default: {RESULTS}/NAME]")
@click.option("--workers", type=click.IntRange(1), default=1, help="Processes; they share cores.")
@click.option("--device", default="cpu", help='Such as "cuda".')
@click.option("--list", "only_list", is_flag=True, help="Say what would be run, and end.")
@click.option("--tables-only", is_flag=True, help="Run nothing: tables of what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
@click.option("--quiet", is_flag=True, help="No progress and no tables.")
def command(file: str, out: Path | None, only_list: bool, **options: Any) -> None:
    """Run the grid of FILE: a TOML file, or a shipped grid's name such as smollm2.

    Results are appended to results.jsonl in --out as they come. The same command goes on with
    what has no result there yet. Ends with 1 where a case failed or an expectation is not met.
    """
    experiment = read_experiment(file)
    out = out or RESULTS / experiment.name
    if out.exists() and not out.is_dir():
        raise ValueError(f"experiment: output {out} is a file; name a folder with --out")
    records = read_records(out / RESULTS_FILE)
    if only_list:
        _list(experiment, records, options["as_json"])
        return
    if not options["tables_only"]:
        _run(experiment, out, records, options)
        records = read_records(out / RESULTS_FILE)
    found = [records[case.key] for case in experiment.cases if case.key in records]
    if not found:
        raise ValueError(f"experiment: {out} holds no result of {file}; run it first")
    click.get_current_context().exit(_conclude(experiment, found, out, options))


def _run(
    experiment: Experiment, out: Path, records: Mapping[str, Record], options: Mapping[str, Any]
) -> None:
    """Run what is missing; ends with 130 where the user interrupts it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_device(options["device"])
    missing = pending(experiment.cases, records)
    titles = {case.key: case.title for case in experiment.cases}
    show = not options["quiet"]
    if show and len(missing) < len(experiment.cases):
        there = len(experiment.cases) - len(missing)
        click.echo(f"{there} of {len(experiment.cases)} results are in {out} already", err=True)
    try:
        with progress_bar(experiment.name, len(missing), show) as advance:
            run_experiment(
                experiment,
                out,
                workers=options["workers"],
                device=options["device"],
                done=lambda record: advance(f"done: {_outcome(titles, record)}"),
            )
    except KeyboardInterrupt:
        click.echo(
            f"interrupted; what was finished is in {out}, and the same command goes on", err=True
        )
        click.get_current_context().exit(130)


def _outcome(titles: Mapping[str, str], record: Record) -> str:
    title = titles[record["key"]]
    if not succeeded(record):
        return f"{title}: failed"
    return f"{title}: {float(record['geometric_mean']):.2f}"


def _list(experiment: Experiment, records: Mapping[str, Record], as_json: bool) -> None:
    """Every case with its key, and how it stands."""
    states = {}
    for case in experiment.cases:
        record = records.get(case.key)
        states[case.key] = (
            "missing" if record is None else "done" if succeeded(record) else "failed"
        )
    if as_json:
        cases = [{"key": c.key, "state": states[c.key], **c.identity} for c in experiment.cases]
        click.echo(json.dumps(cases, indent=2))
        return
    several = len({case.model for case in experiment.cases}) > 1
    for case in experiment.cases:
        model = f"{case.model}: " if several else ""
        click.echo(f"{case.key}  {states[case.key]:7}  {model}{case.title}")
    done = sum(state == "done" for state in states.values())
    click.echo(f"{len(states)} cases, of which {len(states) - done} are to be run")


def _conclude(
    experiment: Experiment, records: Sequence[Record], out: Path, options: Mapping[str, Any]
) -> int:
    """Write tables and pictures, say what was found, and return the exit code."""
    # Imported here: matplotlib takes a second to load, and --list needs none of it.
    from fedspa.experiments.results.pictures import write_pictures
    from fedspa.experiments.results.tables import table, write_tables

    failed = [record for record in records if not succeeded(record)]
    order = list(dict.fromkeys(case.method for case in experiment.cases))
    written = [*write_tables(records, out, order), *write_pictures(records, out, order)]
    outcomes = check(records, experiment.expectations)
    if options["as_json"]:
        result = {
            "name": experiment.name,
            "out": str(out),
            "records": records,
            "failed": len(failed),
            "expectations": [{"met": o.met, "sentence": str(o)} for o in outcomes],
            "files": [str(path) for path in written],
        }
        click.echo(json.dumps(result, indent=2))
    elif not options["quiet"]:
        Console().print(table(records, order))
        for outcome in outcomes:
            click.echo(str(outcome))
        missing = len(experiment.cases) - len(records)
        if missing:
            click.echo(f"{missing} of {len(experiment.cases)} cases have not been run")
        click.echo(f"results, tables and pictures are in {out}")
    titles = {case.key: case.title for case in experiment.cases}
    for record in failed:
        click.echo(f"failed: {titles[record['key']]}: {record['error']}", err=True)
    return 1 if failed or not all(outcome.met for outcome in outcomes) else 0
