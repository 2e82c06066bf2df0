"""Tables that answer one question each: what federation gains, what a setting costs, and where."""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from fedspa.experiments.results.cells import (
    ABSENT,
    COSTS,
    best_in_bold,
    cost_cells,
    federation_cells,
    markdown,
    paragraphs,
    percent_cell,
    perplexity_cell,
    place_text,
    target_text,
    title,
)
from fedspa.experiments.results.places import (
    at,
    competitions,
    families,
    find,
    grid_and_world,
    methods,
    places,
    targets,
    usual_target,
)
from fedspa.experiments.results.summary import (
    Place,
    Record,
    Row,
    Target,
    axis_text,
    common_means,
    summarise,
)

# FedSpaLLM's authors: the federation improves on the clients' own models by more than this, in %.
CLAIMED = 30.0
COMPARED = ("l0", "statistics")


def improvement_tables(
    records: Iterable[Record],
    order: Sequence[str] = (),
    pruners: Collection[str] | None = None,
) -> str:
    """How much lower FedSpaLLM's and statistics' perplexity is than the clients' own, in per cent.

    Over 30 %, which FedSpaLLM's authors claim, is in bold. The last table has the distance to
    centralised pruning: what pooling the data would still gain.
    """
    rows = summarise(records)
    parts = []
    for part in ("mean", "best client"):
        heading = f"**Improvement over standalone, {part}, in %**"
        parts += _compared(heading, partial(_is_standalone, part), _below, rows, order, pruners)
    heading = "**Perplexity above centralised, in %**"
    parts += _compared(heading, _is_centralised, _above, rows, order, pruners)
    return paragraphs(parts)


def _is_standalone(part: str, row: Row) -> bool:
    return row.kind == "standalone" and row.method == f"{row.named}, {part}"


def _is_centralised(row: Row) -> bool:
    return row.kind == "centralised"


def _below(mine: Row, theirs: Row) -> float:
    own, other = common_means(mine, theirs)
    return 100 * (1 - own / other)


def _above(mine: Row, theirs: Row) -> float:
    own, other = common_means(mine, theirs)
    return 100 * (own / other - 1)


def _compared(
    heading: str,
    other: Callable[[Row], bool],
    percent: Callable[[Row, Row], float],
    rows: Sequence[Row],
    order: Sequence[str],
    pruners: Collection[str] | None,
) -> list[str]:
    """A heading and its table, a line a place and method; [] where there is nothing to compare."""
    found = competitions(rows, pruners)
    columns = targets(row for _, _, here in found for row in here)
    several = len({place.model for _, place, _ in found}) > 1, len(families(rows)) > 1
    claimed = percent is _below
    lines = []
    for pruner, place, here in found:
        ours = [row for row in here if row.kind == "federated" and row.aggregation in COMPARED]
        others = {row.target: row for row in here if other(row)}
        words = [place.model if several[0] else "", place_text(place), pruner if several[1] else ""]
        for name in methods(ours, order) if others else ():
            pairs = [(find(ours, name, target), others.get(target)) for target in columns]
            cells = [_percent(mine, theirs, percent, claimed) for mine, theirs in pairs]
            lines.append([", ".join(filter(None, words)), name, *cells])
    headings = ["federation", "method", *map(target_text, columns)]
    return [heading, markdown(headings, lines, words=2)] if lines else []


def _percent(
    mine: Row | None, theirs: Row | None, percent: Callable[[Row, Row], float], claimed: bool
) -> str:
    if mine is None or theirs is None:
        return ABSENT
    if not mine.seeds or not theirs.seeds:
        return "failed"
    value = percent(mine, theirs)
    text = percent_cell(value, signed=not claimed)
    return f"**{text}**" if claimed and value > CLAIMED else text


def axis_tables(
    records: Iterable[Record],
    order: Sequence[str] = (),
    axes: Collection[str] | None = None,
    aggregation: str | None = None,
) -> str:
    """Perplexity by the values of the settings that vary within methods, a table a place.

    axes: tables of these settings alone; None: of all. Dense and centralised stand beneath.
    aggregation: methods of this one alone; None: all.
    Costs are at 60 %, or else at the middle target.
    """
    rows = summarise(records)
    parts = []
    for place in places(rows):
        everything = at(rows, place)
        wanted = [row for row in everything if aggregation in (None, row.aggregation)]
        for names, here in _by_axes(wanted).items():
            if axes is None or set(axes) & set(names):
                costs_at = f"costs at {target_text(usual_target(here))}"
                only = len(targets(here)) < 2
                parts.append(title(place, place.model, "" if only else costs_at))
                parts.append(_axis_table(names, here, everything, order))
    return paragraphs(parts)


def _by_axes(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The federated rows, by the axes of their methods."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.kind == "federated" and not row.plain:
            found.setdefault(tuple(sorted(name for name, _ in row.axes)), []).append(row)
    return found


def _axis_table(
    names: tuple[str, ...], rows: Sequence[Row], everything: Sequence[Row], order: Sequence[str]
) -> str:
    columns = targets(rows)
    lines = []
    for method in methods(rows, order):
        mine = [row for row in rows if row.method == method]
        for axes in sorted({row.axes for row in mine}, key=_axis_rank):
            found = [
                find([row for row in mine if row.axes == axes], method, target)
                for target in columns
            ]
            costs = find([row for row in mine if row.axes == axes], method, usual_target(rows))
            lines.append(
                [
                    method,
                    *(axis_text(dict(axes)[name]) for name in names),
                    *map(perplexity_cell, found),
                    *(cost_cells(costs) if costs else [ABSENT] * len(COSTS)),
                ]
            )
    pruners = {row.pruner for row in rows}
    compared = [
        row
        for row in everything
        if row.kind == "dense" or (row.kind == "centralised" and row.pruner in pruners)
    ]
    for method in methods(compared, order):
        cells = [perplexity_cell(find(compared, method, target)) for target in columns]
        lines.append([method, *[""] * len(names), *cells, *[""] * len(COSTS)])
    headings = ["method", *names, *map(target_text, columns), *COSTS]
    return markdown(headings, lines, words=1 + len(names))


def _axis_rank(axes: tuple[tuple[str, object], ...]) -> list[tuple[int, float, str]]:
    """Numbers by size, texts by letters, null before both."""
    ranks = []
    for _, value in axes:
        if isinstance(value, int | float):
            ranks.append((1, float(value), ""))
        else:
            ranks.append((0, 0.0, "") if value is None else (2, 0.0, str(value)))
    return ranks


def world_tables(records: Iterable[Record], order: Sequence[str] = ()) -> str:
    """Perplexity in federations that were measured at one target: a line each, a column a method.

    Where no federation was measured at several targets, the main tables have them all.
    """
    rows = summarise(records)
    found = grid_and_world(rows)[1]
    parts = []
    for pruner, family in families(rows).items():
        for model in dict.fromkeys(place.model for place in found):
            here = [place for place in found if place.model == model]
            own = [row for row in family if row.place in here]
            for target in targets(own):
                name = pruner if len(families(rows)) > 1 else ""
                parts.append(title(None, model, target_text(target), name))
                parts.append(_world_table(family, here, target, order))
    return paragraphs(parts)


def _world_table(
    family: Sequence[Row], found: Sequence[Place], target: Target, order: Sequence[str]
) -> str:
    shown = {
        place: [row for row in at(family, place) if row.kind == "dense" or row.target == target]
        for place in found
        if any(row.place == place and row.target == target for row in family)
    }
    names = methods([row for here in shown.values() for row in here], order)
    lines = []
    for place, here in shown.items():
        clients, partition, capacities = federation_cells(place)
        held = ", ".join(filter(None, [partition, capacities]))
        lines.append([clients, held, *best_in_bold([find(here, name, target) for name in names])])
    return markdown(["clients", "who holds what", *names], lines, words=2)
