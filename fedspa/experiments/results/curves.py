"""Lines over sparsities, over exchanges, and over numbers of clients."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedspa.experiments.results.cells import partition_text, place_text, target_text
from fedspa.experiments.results.drawing import (
    BAND,
    GAP,
    INK,
    MUTED,
    End,
    Line,
    fixed,
    lines_of,
    logarithmic,
    table_of_panels,
)
from fedspa.experiments.results.places import at, find, methods, places, targets
from fedspa.experiments.results.summary import Place, Row, Target

# Per cent above centralised below which the axis is linear, so that it can hold 0.
LINEAR = 1.0
CURVED = "synchronize_every"


def sparsity(rows: Sequence[Row], order: Sequence[str] = ()) -> Figure | None:
    """Perplexity by sparsity: a column a number of clients, a row a partition; logarithmic.

    The clients' own models are a band from the best to the worst.
    """
    measured = [
        row
        for row in rows
        if row.plain and not isinstance(row.target, str) and math.isfinite(row.mean)
    ]
    shown = {
        place: at(measured, place)
        for place in places(measured)
        if len(targets(row for row in measured if row.place == place)) > 1
    }
    if not shown:
        return None
    everything = [row for here in shown.values() for row in here]
    names = methods([row for row in everything if row.kind != "standalone"], order)
    styles = lines_of(everything, names)

    def draw(axes: Axes, held: Held, clients: int) -> list[End] | None:
        here = next((shown[p] for p in shown if (_held(p), p.clients) == (held, clients)), None)
        if here is None:
            return None
        xs = [float(target) for target in targets(here)]
        logarithmic(axes, "y", [row.mean for row in everything])
        fixed(axes, "x", xs, [target_text(x) for x in xs])
        room = 0.06 * (xs[-1] - xs[0])
        axes.set_xlim(xs[0] - room, xs[-1] + room)
        axes.set_xlabel("sparsity")
        ends = _band(axes, here, xs)
        for name in names:
            points = [(x, row.mean) for x in xs if (row := find(here, name, x))]
            ends += _line(axes, points, name, styles[name])
        return ends

    counts = sorted({place.clients or 0 for place in shown})
    return table_of_panels(
        {_held(place): f"{_held_text(place)}\nperplexity" for place in shown},
        {count: f"{count} client{'' if count == 1 else 's'}" for count in counts},
        draw,
    )


def exchanges(rows: Sequence[Row], order: Sequence[str] = ()) -> Figure | None:
    """Perplexity by the number of exchanges: a column a target, a row a place; logarithmic."""
    curves = [
        replace(row, method=_other_axes(row))
        for row in rows
        if row.kind == "federated" and CURVED in dict(row.axes) and math.isfinite(row.mean)
    ]
    shown: dict[tuple[Place, Target], list[Row]] = {}
    for place in places(curves):
        for target in targets(row for row in curves if row.place == place):
            here = [row for row in curves if (row.place, row.target) == (place, target)]
            if len({row.exchanges for row in here}) > 1:
                shown[place, target] = here
    if not shown:
        return None
    names = methods([row for here in shown.values() for row in here], order)
    styles = lines_of(curves, names)
    beside = [row for row in rows if row.plain and row.kind in ("dense", "centralised")]
    styles |= lines_of(beside, methods(beside, order))

    def draw(axes: Axes, place: Place, target: Target) -> list[End] | None:
        here = shown.get((place, target))
        if here is None:
            return None
        lines = [row for row in beside if row.kind == "dense" or row.target == target]
        xs = sorted({row.exchanges for row in here})
        logarithmic(axes, "y", [row.mean for row in (*here, *lines)])
        logarithmic(axes, "x", xs)
        fixed(axes, "x", xs)
        axes.set_xlabel("exchanges")
        ends = []
        for row in lines:
            across = [(x, row.mean) for x in axes.get_xlim()]
            ends += _line(axes, across, row.method, styles[row.method])
        for name in names:
            points = sorted((row.exchanges, row.mean) for row in here if row.method == name)
            ends += _line(axes, points, name, styles[name])
        return ends

    return table_of_panels(
        {place: f"{place_text(place)}\nperplexity" for place, _ in shown},
        {target: target_text(target) for target in targets(r for h in shown.values() for r in h)},
        draw,
        # Each target has its own perplexities.
        gap=2.5 * GAP,
    )


def gaps(rows: Sequence[Row], order: Sequence[str] = ()) -> Figure | None:
    """Per cent above centralised by the number of clients: a column a target, a row a partition."""
    measured = []
    plain = [row for row in rows if row.plain and math.isfinite(row.mean)]
    pooled = {row.target: row.mean for row in plain if row.kind == "centralised"}
    for row in plain:
        if row.clients and row.target in pooled and not row.method.endswith("worst client"):
            measured.append(replace(row, mean=100 * (row.mean / pooled[row.target] - 1)))
    shown: dict[tuple[Held, Target], list[Row]] = {}
    for held in dict.fromkeys(map(_held, places(measured))):
        for target in targets(measured):
            here = [row for row in measured if (_held(row.place), row.target) == (held, target)]
            if len({row.clients for row in here}) > 1:
                shown[held, target] = here
    if not shown:
        return None
    everything = [row for here in shown.values() for row in here]
    names = methods(everything, order)
    styles = lines_of(everything, names)
    counts = sorted({row.clients or 0 for row in everything})

    def draw(axes: Axes, held: Held, target: Target) -> list[End] | None:
        here = shown.get((held, target))
        if here is None:
            return None
        logarithmic(axes, "x", counts)
        fixed(axes, "x", counts)
        _symmetric(axes, [row.mean for row in everything])
        axes.axhline(0, color=INK, linestyle="--", linewidth=1.0)
        axes.set_xlabel("clients")
        ends: list[End] = [(axes.get_xlim()[1], 0.0, "centralised", INK)]
        for name in names:
            points = sorted((row.clients or 0, row.mean) for row in here if row.method == name)
            ends += _line(axes, points, name, styles[name])
        return ends

    return table_of_panels(
        {_held(row.place): f"{_held_text(row.place)}\n% above centralised" for row in everything},
        {target: target_text(target) for target in targets(everything)},
        draw,
    )


Held = tuple[str | None, tuple[float, ...] | None]


def _held(place: Place) -> Held:
    return place.partition, place.capacities


def _held_text(place: Place) -> str:
    return partition_text(place.partition) + (", uneven" if place.capacities else "")


def _other_axes(row: Row) -> str:
    """The name of a curve: its method, and the axes that it does not run over."""
    return replace(row, axes=tuple(axis for axis in row.axes if axis[0] != CURVED)).label


def _band(axes: Axes, rows: Iterable[Row], xs: Sequence[float]) -> list[End]:
    """Shade the clients' own models, from the best to the worst; return where the shade ends."""
    ends: list[End] = []
    alone = [row for row in rows if row.kind == "standalone"]
    for named in dict.fromkeys(row.named for row in alone):
        best, worst = (
            [find(alone, f"{named}, {part} client", x) for x in xs] for part in ("best", "worst")
        )
        both = [(x, b.mean, w.mean) for x, b, w in zip(xs, best, worst, strict=True) if b and w]
        if both:
            across, lows, highs = zip(*both, strict=True)
            axes.fill_between(across, lows, highs, color=BAND, linewidth=0)
            x, low, high = both[-1]
            ends.append((x, math.sqrt(low * high), named, MUTED))
    return ends


def _line(axes: Axes, points: Sequence[tuple[float, float]], name: str, style: Line) -> list[End]:
    """Draw one method's line, where it has points; return where it ends."""
    if not points:
        return []
    xs, ys = zip(*points, strict=True)
    axes.plot(
        xs,
        ys,
        style.dashes,
        marker=style.marker,
        color=style.colour,
        markersize=3.5,
        linewidth=1.3,
        # Centralised is seen through what lies upon it.
        zorder=3 if style.marker else 3.5,
    )
    return [(xs[-1], ys[-1], name, style.colour)]


def _symmetric(axes: Axes, values: Sequence[float]) -> None:
    """A vertical axis that is logarithmic on both sides of a linear middle about 0."""
    axes.set_yscale("symlog", linthresh=LINEAR)
    low, high = min(0.0, *values), max(LINEAR, *values)
    axes.set_ylim(2 * low if low < -LINEAR else min(low, -0.1) - 0.1, 1.6 * high)
    decades = [LINEAR * 10.0**e for e in range(8)]
    ticks = [-d for d in decades] + [0.0] + decades
    fixed(axes, "y", sorted(t for t in ticks if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]))
