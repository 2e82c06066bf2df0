"""The pictures of a grid: what its records hold, and no empty panel."""

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from fedspa.charts import svg_text
from fedspa.experiments.results.curves import exchanges, gaps, sparsity
from fedspa.experiments.results.drawing import STYLE
from fedspa.experiments.results.places import families
from fedspa.experiments.results.scatter import traffic
from fedspa.experiments.results.summary import Record, Row, summarise

# What each picture shows, by the name of its file.
CAPTIONS = {
    "sparsity": "Perplexity by sparsity and method",
    "exchanges": "Perplexity by the number of exchanges between clients and server",
    "clients": "Perplexity above centralised pruning, by the number of clients",
    "traffic": "Perplexity by the bytes that a client sends",
}
Draw = Callable[[Sequence[Row], Sequence[str]], Figure | None]


def write_pictures(
    records: Collection[Record], folder: str | Path, order: Sequence[str] = ()
) -> list[Path]:
    """Write one SVG a kind of picture, model and pruner for which there is something to draw.

    returns: their paths, sparsity.svg, exchanges.svg, and so on; with the model and the pruner in
             the name where there are several
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures(records, order).items():
        written.append(folder / f"{name}.svg")
        written[-1].write_text(svg(figure), encoding="utf-8")
    return written


def figures(records: Collection[Record], order: Sequence[str] = ()) -> dict[str, Figure]:
    """Draw every picture that the records hold, by its name."""
    rows = summarise(records)
    kinds: dict[str, Draw] = {
        "sparsity": sparsity,
        "exchanges": exchanges,
        "clients": gaps,
        "traffic": traffic,
    }
    drawn: dict[str, Figure] = {}
    models = list(dict.fromkeys(row.model for row in rows))
    with matplotlib.rc_context(STYLE):
        for model in models:
            of_model = [row for row in rows if row.model == model]
            found = families(of_model)
            for pruner, family in found.items():
                with_axes = [row for row in of_model if not row.plain and row.pruner == pruner]
                suffix = [_file_name(model)] * (len(models) > 1) + [pruner] * (len(found) > 1)
                for kind, draw in kinds.items():
                    figure = draw([*family, *with_axes], order)
                    if figure is not None:
                        drawn["-".join([kind, *suffix])] = figure
    return drawn


def caption(name: str) -> str:
    """What the picture of this name shows, for its alternative text."""
    kind, _, where = name.partition("-")
    return CAPTIONS[kind] + (f" ({where})" if where else "")


def _file_name(model: str) -> str:
    """A model's name as a part of a file's: its last part, letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).strip("-")


def svg(figure: Figure) -> str:
    """A figure as SVG: the same bytes for the same figure, and its text as text."""
    with matplotlib.rc_context(STYLE):
        drawing = svg_text(figure)
    return re.sub(r"[ \t]+$", "", drawing, flags=re.MULTILINE).rstrip() + "\n"
