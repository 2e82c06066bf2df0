"""Perplexity against what a client sends."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedspa.experiments.results.cells import place_text, target_text
from fedspa.experiments.results.drawing import Line, lines_of, logarithmic, panels
from fedspa.experiments.results.places import at, methods, places, usual_target
from fedspa.experiments.results.summary import Place, Row

# Points: a letter of 8 points is about so wide, and a label so high.
GLYPH, LINE = 4.9, 9.0
Box = tuple[float, float, float, float]
PARTS = ("best client", "worst client")


def traffic(rows: Sequence[Row], order: Sequence[str] = ()) -> Figure | None:
    """Perplexity by megabytes up: one place of each partition, at one target; logarithmic.

    What sends nothing is a horizontal line.
    """
    plain = [row for row in rows if row.plain and row.method.split(", ")[-1] not in PARTS]
    target = usual_target(row for row in plain if row.kind == "federated")
    # Dense, far below, would push the others together.
    measured = [row for row in plain if row.target == target and math.isfinite(row.mean)]
    sending = [row for row in measured if _sends(row)]
    shown = _places(sending)
    if not shown:
        return None
    names = methods(measured, order)
    styles = lines_of(measured, names)
    here = {place: at(measured, place) for place in shown}
    figure, (line,) = panels(len(shown), 1, right=0.2)
    for axes, place in zip(line, shown, strict=True):
        values = [row.mean for found in here.values() for row in found]
        logarithmic(axes, "y", values)
        sent = [r.bytes_up / 1e6 for found in here.values() for r in found if _sends(r)]
        logarithmic(axes, "x", sent)
        axes.set_title(f"{place_text(place)}, {target_text(target)}", fontsize=8.5)
        axes.set_xlabel("MB that a client sends")
        axes.tick_params(labelleft=axes is line[0])
        _points(axes, here[place], names, styles)
    line[0].set_ylabel("perplexity")
    return figure


def _sends(row: Row) -> bool:
    """Whether clients send something, which of centralised pruning would be their text."""
    return row.kind == "federated" and row.bytes_up > 0


def _places(sending: Sequence[Row]) -> list[Place]:
    """Of each partition the place with the most methods; of several such the middle one."""
    by_partition: dict[str | None, list[Place]] = {}
    count = {place: sum(row.place == place for row in sending) for place in places(sending)}
    for place in count:
        by_partition.setdefault(place.partition, []).append(place)
    found = []
    for here in by_partition.values():
        most = max(count[place] for place in here)
        largest = [place for place in here if count[place] == most]
        if most > 1:
            found.append(largest[(len(largest) - 1) // 2])
    return found[:2]


def _points(
    axes: Axes, rows: Sequence[Row], names: Sequence[str], styles: Mapping[str, Line]
) -> None:
    """Draw a point a method, or a line where it sends nothing, and a label where there is room."""
    scale = 72 / axes.figure.dpi
    left, below, right, above = (scale * edge for edge in axes.bbox.extents)
    taken: list[Box] = []
    # Lines first: their labels have fewer places to go to.
    found = [row for name in names for row in rows if row.method == name]
    anchors = []
    for row in sorted(found, key=_sends):
        style = styles[row.method]
        if _sends(row):
            at_x = row.bytes_up / 1e6
            axes.plot([at_x], [row.mean], style.marker or "o", color=style.colour, markersize=5)
            x, y = scale * axes.transData.transform((at_x, row.mean))
            taken.append((x - 3, y - 3, x + 3, y + 3))
        else:
            at_x = axes.get_xlim()[0]
            axes.axhline(row.mean, linestyle=style.dashes, color=style.colour, linewidth=1.1)
            x, y = scale * axes.transData.transform((at_x, row.mean))
            taken.append((left, y - 0.5, right, y + 0.5))
        anchors.append((row, at_x, x, y))
    for row, at_x, x, y in anchors:
        wide = GLYPH * len(row.method)
        offsets = _beside(wide) if _sends(row) else [(4.0, LINE / 2 + 1), (4.0, -LINE / 2 - 2)]
        boxes = [
            (x + dx, y + dy - LINE / 2, x + dx + wide, y + dy + LINE / 2) for dx, dy in offsets
        ]
        inside = [
            left <= box[0] and box[2] <= right and below <= box[1] and box[3] <= above
            for box in boxes
        ]
        # Where nothing is free, the place that covers least.
        covered = [
            sum(_overlap(box, other) for other in taken) + 100 * (not fits)
            for box, fits in zip(boxes, inside, strict=True)
        ]
        chosen = covered.index(min(covered))
        taken.append(boxes[chosen])
        far = abs(offsets[chosen][1]) > 2 * LINE
        colour = styles[row.method].colour
        axes.annotate(
            row.method,
            (at_x, row.mean),
            xytext=offsets[chosen],
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5} if far else None,
        )


def _beside(wide: float) -> list[tuple[float, float]]:
    """Where a label may stand from its point, the nearest first, in points."""
    level = [(6.0, 0.0), (-6 - wide, 0.0)]
    rings = [
        (dx, sign * up * LINE)
        for up in (1, 2, 3, 4, 5)
        for sign in (1, -1)
        for dx in (-wide / 2, 6.0, -6 - wide)
    ]
    return level + rings


def _overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    up = min(one[3], other[3]) - max(one[1], other[1])
    return across * up if across > 0 and up > 0 else 0.0
