"""Puts a grid's tables and pictures into a Markdown page, between markers; prose stays.

    <!-- results:main -->
    what stands here is replaced
    <!-- end:main -->

`python -m fedspa.experiments.results.document RESULTS.jsonl docs/results.md` does it.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import click

from fedspa.experiments.experiment_file import find_experiment, read_experiment
from fedspa.experiments.results.comparisons import axis_tables, improvement_tables, world_tables
from fedspa.experiments.results.pictures import CAPTIONS, caption, write_pictures
from fedspa.experiments.results.places import families
from fedspa.experiments.results.summary import Record, summarise
from fedspa.experiments.results.tables import domain_tables, main_tables
from fedspa.experiments.store import read_records

MARKER = re.compile(r"<!-- *(results|end):([^ >]*) *-->")
NOTHING = "No results yet.\n"
PICTURES = "pictures"


def write_document(
    records: Collection[Record],
    path: str | Path,
    pictures_folder: str | Path,
    order: Sequence[str] = (),
) -> None:
    """Replace what stands between the markers of a page by tables and pictures of the records.

    Names: main, domains, improvement (these of every pruner but Wanda, where there are others),
    wanda (its main tables), exchanges, statistics_dtype, fedprllm, axes (all of them), world;
    pictures, or one kind of them: picture-sparsity, picture-exchanges, picture-clients,
    picture-traffic.

    pictures_folder: where SVG files are written, if the page asks for pictures
    order:           the methods as the experiment file names them
    raises:          ValueError for a marker that is unknown or has no end; nothing is written then
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    makers = _makers(records, path, Path(pictures_folder), order)
    sections = _sections(text, path, list(makers))
    pieces, position = [], 0
    for name, start, end in sections:
        pieces += [text[position:start], f"\n\n{makers[name]() or NOTHING}\n"]
        position = end
    changed = "".join([*pieces, text[position:]])
    if changed != text:
        path.write_text(changed, encoding="utf-8")


def _makers(
    records: Collection[Record], page: Path, folder: Path, order: Sequence[str]
) -> dict[str, Callable[[], str]]:
    """What makes each named section."""
    pruners = list(families(summarise(records)))
    others = [pruner for pruner in pruners if pruner != "wanda"] or pruners
    paths: list[Path] = []

    def pictures(kind: str | None = None) -> str:
        if not paths:
            paths.extend(write_pictures(records, folder, order))
        return "\n".join(
            f"![{caption(drawn.stem)}]({_link(drawn, page)})\n"
            for drawn in paths
            if kind is None or drawn.stem.partition("-")[0] == kind
        )

    def axes(*names: str) -> str:
        return axis_tables(records, order, names)

    def world() -> str:
        """Other partitions and sizes, and clients that are not always there."""
        found = [world_tables(records, order), axes("participation", "dropout")]
        return "\n".join(filter(None, found))

    return {
        "main": partial(main_tables, records, order, others),
        "domains": partial(domain_tables, records, order, others),
        "improvement": partial(improvement_tables, records, order, others),
        "wanda": partial(main_tables, records, order, ["wanda"]),
        "exchanges": partial(axes, "synchronize_every"),
        "statistics_dtype": partial(axes, "statistics_dtype"),
        "fedprllm": partial(axis_tables, records, order, None, "mask"),
        "axes": partial(axis_tables, records, order),
        "world": world,
        PICTURES: pictures,
        **{f"picture-{kind}": partial(pictures, kind) for kind in CAPTIONS},
    }


def _sections(text: str, path: Path, known: Sequence[str]) -> list[tuple[str, int, int]]:
    """The name of each section, and where what it holds starts and ends."""
    sections = []
    opened: re.Match[str] | None = None
    for marker in MARKER.finditer(text):
        which, name = marker.groups()
        line = text.count("\n", 0, marker.start()) + 1
        if name not in known:
            raise ValueError(
                f"document: {path}, line {line}: there are no results named {name!r}; "
                f"there are {', '.join(known)}"
            )
        if which == "results":
            if opened is not None:
                break
            opened = marker
        elif opened is None or opened[2] != name:
            raise ValueError(
                f"document: {path}, line {line}: end:{name} ends nothing; "
                f"put results:{name} before it"
            )
        else:
            sections.append((name, opened.end(), marker.start()))
            opened = None
    if opened is not None:
        line = text.count("\n", 0, opened.start()) + 1
        raise ValueError(
            f"document: {path}, line {line}: results:{opened[2]} has no end; "
            f"put <!-- end:{opened[2]} --> behind it"
        )
    return sections


def _link(drawn: Path, page: Path) -> str:
    """A picture's path from the page's folder, with the slashes of a URL."""
    return Path(os.path.relpath(drawn.resolve(), page.resolve().parent)).as_posix()


@click.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("page", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--pictures",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the pictures; default: named as the page, beside it.",
)
@click.option("--experiment", help="The grid, whose cases are shown, in its order of methods.")
def main(results: Path, page: Path, pictures: Path | None, experiment: str | None) -> None:
    """Put the tables and pictures of RESULTS (JSON lines) between the markers of PAGE."""
    try:
        order: list[str] = []
        found = read_records(results)
        if experiment is not None:
            table = tomllib.loads(find_experiment(experiment).read_text(encoding="utf-8"))
            order = list(table.get("method", {}))
            asked = {case.key for case in read_experiment(experiment).cases}
            found = {key: record for key, record in found.items() if key in asked}
        records = list(found.values())
        write_document(records, page, pictures or page.with_suffix(""), order)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


if __name__ == "__main__":
    main()
