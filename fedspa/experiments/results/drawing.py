"""What a grid's pictures share: colours, panels, logarithmic axes, labels at lines.

They stand on a white surface of their own, so that they are legible on a dark page too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fedspa import charts
from fedspa.experiments.results.summary import Row

INK, MUTED, GRID, SURFACE, BAND = "#1c2126", "#5b6570", "#dfe3e8", "#ffffff", "#e3e6ea"
# Shades by what clients send; the methods of one aggregation take one after the other.
SHADES = {
    "l0": ("#1f5fbf", "#0a7fa8", "#0b2f66"),
    "mean": ("#7a3fc4", "#a23fa8", "#431b77"),
    "mask": ("#b8430b", "#8f6400", "#6e2600"),
    "statistics": ("#13794a", "#577500", "#073f25"),
}
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
STYLE = charts.STYLE | {
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "figure.facecolor": SURFACE,
    "font.size": 8.5,
}
# Inches.
LEFT, RIGHT, TOP, BOTTOM, GAP, ROW_GAP = 0.78, 1.9, 0.32, 0.48, 0.18, 0.42
WIDTH, HIGH, WIDEST = 9.25, 2.5, 3.9
# Points: between two labels, and from a panel's edge to its labels.
LINE, REACH = 10.5, 16.0
# Ticks of a decade, by how much a logarithmic axis spans.
STEPS: tuple[tuple[float, tuple[float, ...]], ...] = (
    (2.5, (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)),
    (8, (1, 1.5, 2, 3, 4, 5, 7)),
    (60, (1, 2, 5)),
    (600, (1, 3)),
    (math.inf, (1,)),
)


# x, y, name and colour of the last point of a line.
End = tuple[float, float, str, str]
L = TypeVar("L")
C = TypeVar("C")


@dataclass(frozen=True)
class Line:
    """How one method is drawn."""

    colour: str
    marker: str = ""
    dashes: str = "-"


# By kind, and by the client that a standalone line is of.
REFERENCES = {
    "dense": Line(MUTED, dashes=":"),
    "mean": Line(MUTED, dashes="-."),
    "best client": Line(MUTED, dashes=":"),
    "centralised": Line(INK, dashes="--"),
}


def lines_of(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Line]:
    """Give each method its colour and marker; references are grey or black, without a marker."""
    by_name = {row.method: row for row in rows}
    found: dict[str, Line] = {}
    taken = dict.fromkeys(SHADES, 0)
    for name in names:
        row = by_name[name]
        if row.kind == "federated":
            shades = SHADES.get(row.aggregation, SHADES["l0"])
            index = taken.get(row.aggregation, 0)
            taken[row.aggregation] = index + 1
            federated = sum(line.marker != "" for line in found.values())
            marker = MARKERS[federated % len(MARKERS)]
            found[name] = Line(shades[index % len(shades)], marker)
        else:
            part = row.method.removeprefix(f"{row.named}, ")
            found[name] = REFERENCES.get(part, REFERENCES.get(row.kind, REFERENCES["dense"]))
    return found


def panels(
    columns: int, rows: int, gap: float = GAP, right: float = RIGHT
) -> tuple[Figure, list[list[Axes]]]:
    """Lay panels in rows, with room to the right of each row for the names of its lines."""
    # A single column would be needlessly wide.
    width = min((WIDTH - LEFT - right - gap * (columns - 1)) / columns, WIDEST)
    across = LEFT + right + columns * width + gap * (columns - 1)
    total = TOP + BOTTOM + rows * HIGH + (rows - 1) * ROW_GAP
    figure = Figure(figsize=(across, total))
    places = []
    for row in range(rows):
        below = (BOTTOM + (rows - 1 - row) * (HIGH + ROW_GAP)) / total
        lefts = [(LEFT + column * (width + gap)) / across for column in range(columns)]
        places.append(
            [figure.add_axes((left, below, width / across, HIGH / total)) for left in lefts]
        )
    for line in places:
        for axes in line:
            axes.grid(linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
            axes.spines[["top", "right"]].set_visible(False)
    return figure, places


def logarithmic(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Make one axis logarithmic over the values, with a few ticks that are written out."""
    finite = [value for value in values if math.isfinite(value) and value > 0]
    low, high = min(finite, default=1.0), max(finite, default=10.0)
    room = max((high / low) ** 0.06, 1.08)
    low, high = low / room, high * room
    scale = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    steps = next(steps for most, steps in STEPS if high < most * low)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**e for e in exponents for step in steps if low <= step * 10.0**e <= high]
    fixed(axes, which, ticks)
    scale.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def fixed(axes: Axes, which: str, ticks: Sequence[float], texts: Sequence[str] = ()) -> None:
    """Put ticks exactly here, and none between them."""
    scale = axes.xaxis if which == "x" else axes.yaxis
    scale.set_major_locator(FixedLocator(list(ticks)))
    scale.set_minor_locator(NullLocator())
    named = dict(zip(ticks, texts, strict=False))
    scale.set_major_formatter(FuncFormatter(lambda value, _: named.get(value, short(value))))


def short(value: float) -> str:
    """Write a tick: 0.1, 20, 3,000, 20k, 2M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= 0.9995 * unit:
            scale = 1e3 if name == "k" else unit
            return f"{value / scale:.3g}{name}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table_of_panels(
    lines: Mapping[L, str],
    columns: Mapping[C, str],
    draw: Callable[[Axes, L, C], list[End] | None],
    gap: float = GAP,
) -> Figure:
    """Draw a panel a line and column, name its lines to the right, and leave out empty panels.

    lines:   with the label of their vertical axis; columns: with the title above them
    draw:    draws one panel and returns where its lines end; None where there is nothing to draw
    """
    figure, grid = panels(len(columns), len(lines), gap)
    titled = set()
    for (line, label), row in zip(lines.items(), grid, strict=True):
        ends: dict[str, End] = {}
        kept = []
        for column, axes in zip(columns, row, strict=True):
            found = draw(axes, line, column)
            if found is None:
                figure.delaxes(axes)
                continue
            if column not in titled:
                axes.set_title(columns[column], fontsize=8.5)
                titled.add(column)
            kept.append(axes)
            # A line that is not in the last panel is still named there.
            ends = {name: (x, math.nan, name, ink) for name, (x, _, _, ink) in ends.items()}
            ends |= {end[2]: end for end in found}
        kept[0].set_ylabel(label)
        for axes in kept:
            axes.tick_params(labelleft=axes is kept[0] or gap > GAP)
        label_lines(kept[-1], list(ends.values()))
    return figure


def label_lines(axes: Axes, ends: Sequence[End]) -> None:
    """Write each line's name to the right of a panel, apart from one another.

    ends: the last point of each line; where y is nan the line is in another panel, and its name
          stands at the top
    """
    points = 72 / axes.figure.dpi
    low, high = points * axes.bbox.y0, points * axes.bbox.y1
    edge = points * axes.bbox.x1 + REACH
    anchors = []
    for x, y, name, colour in ends:
        inside = axes.get_ylim()[1] if math.isnan(y) else y
        across, up = points * axes.transData.transform((x, inside))
        anchors.append((up, across, x, inside, name, colour, not math.isnan(y)))
    anchors.sort(key=lambda anchor: anchor[0])
    heights = _apart([anchor[0] for anchor in anchors], low, high)
    for height, (up, across, x, y, name, colour, here) in zip(heights, anchors, strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(edge - across, height - up),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5)}
            if here
            else None,
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], low: float, high: float) -> list[float]:
    """Move ascending heights at least LINE apart, each group about its middle, within the panel."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _ends(groups[-1], low, high)[0] < _ends(groups[-2], low, high)[1]:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [
        _ends(group, low, high)[0] + LINE * (index + 0.5)
        for group in groups
        for index in range(len(group))
    ]


def _ends(group: Sequence[float], low: float, high: float) -> tuple[float, float]:
    size = LINE * len(group)
    start = sum(group) / len(group) - size / 2
    start = max(min(start, high + LINE / 2 - size), low - LINE / 2)
    return start, start + size
