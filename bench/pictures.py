"""The pictures of docs/performance.md: rooflines, and how cost grows."""

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter

from bench.drawing import MUTED, STYLE, logarithmic, panels, roof, series, short
from bench.growth.fit import Curve
from bench.loaded import Result
from bench.tables import OPERATORS, in_order

# A letter's size in a label of 7 points, in points.
GLYPH, LINE = 4.5, 8.0
# A peak below this is drawn here: it is some pages, and has no logarithm where it is 0.
LEAST = 1e5


def roofline(cases: Sequence[Result], ceilings: dict[str, Any]) -> Figure:
    """Draw the cases of one machine and dtype: bytes/s of what moves, flop/s of what multiplies.

    ceilings: copy (bytes/s), the roof of the first panel and the slope of the second; matmul
              (flop/s by dtype), the roofs of the second
    """
    moving = [case for case in cases if not case["of_matmul"]]
    computing = [case for case in cases if case["of_matmul"]]
    drawn = [panel for panel in (moving, computing) if panel]
    with matplotlib.rc_context(STYLE):
        names = in_order([case["operator"] for case in cases], OPERATORS)
        figure, axes = panels(len(drawn), names, 4.3)
        for panel, place in zip(drawn, axes, strict=True):
            if panel is moving:
                _bytes_panel(place, panel, ceilings["copy"], names)
            else:
                _flops_panel(place, panel, ceilings, names)
    return figure


def _bytes_panel(axes: Axes, cases: Sequence[Result], copy: float, names: Sequence[str]) -> None:
    xs = [case["least_bytes"] / 1e6 for case in cases]
    ys = [case["bytes_per_s"] / 1e9 for case in cases]
    rate = copy / 1e9
    logarithmic(axes, xs, [*ys, rate, rate / 10], "least MB of a call", "GB/s of the least bytes")
    roof(axes, axes.get_xlim(), (rate, rate), f"copy {short(rate)} GB/s")
    _points(axes, cases, xs, ys, names)


def _flops_panel(
    axes: Axes, cases: Sequence[Result], ceilings: dict[str, Any], names: Sequence[str]
) -> None:
    xs = [case["operations"] / case["least_bytes"] for case in cases]
    ys = [case["flop_per_s"] / 1e9 for case in cases]
    roofs = {name: ceilings["matmul"][name] / 1e9 for name in {_roof_of(case) for case in cases}}
    copy, highest = ceilings["copy"] / 1e9, max(roofs.values())
    ridge = highest / copy
    shown = (*xs, ridge, ridge / 3)
    logarithmic(axes, shown, [*ys, highest, highest / 20], "flop per least byte", "GFLOP/s")
    low, high = axes.get_xlim()
    for name, rate in sorted(roofs.items()):
        roof(axes, (rate / copy, high), (rate, rate), f"{name} product {short(rate)} GFLOP/s")
    roof(axes, (low, ridge), (low * copy, highest), "")
    _points(axes, cases, xs, ys, names)


def _roof_of(case: Result) -> str:
    """Return the dtype of the matrix rate that a case is held against."""
    rate, rates = case["flop_per_s"] / case["of_matmul"], case["ceilings"]["matmul"]
    return min(rates, key=lambda name: abs(rates[name] / rate - 1))


def _points(
    axes: Axes, cases: Sequence[Result], xs: list[float], ys: list[float], names: Sequence[str]
) -> None:
    """Draw a point a case, and a label wherever it finds room."""
    for case, x, y in zip(cases, xs, ys, strict=True):
        colour, marker = series(case["operator"], names)
        axes.plot([x], [y], marker, color=colour, markersize=5, zorder=3)
    # In points, from the figure's corner.
    scale = 72 / axes.figure.dpi
    places = scale * axes.transData.transform(list(zip(xs, ys, strict=True)))
    frame = [scale * edge for edge in axes.bbox.extents]
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in places]
    for name in axes.findobj(Annotation):  # the roofs' names, which end at their points
        x, y = scale * axes.transData.transform(name.xy)
        taken.append((x - 1.2 * GLYPH * len(name.get_text()), y - 1, x, y + 14))
    for case, point, (x, y) in zip(cases, zip(xs, ys, strict=True), places, strict=True):
        text = label(case)
        wide = GLYPH * len(text)
        for dx, dy in ((5, -3), (-5 - wide, -3), (-wide / 2, 5), (-wide / 2, -12)):
            box = (x + dx, y + dy, x + dx + wide, y + dy + LINE)
            inside = frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1]
            if not inside or box[3] > frame[3] or any(_overlap(box, other) for other in taken):
                continue
            taken.append(box)
            axes.annotate(
                text,
                point,
                xytext=(dx, dy + 1),
                textcoords="offset points",
                fontsize=7,
                color=MUTED[0],
            )
            break


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def label(case: Result) -> str:
    """Label a point by its size: 4096², 768×3072, and the clients where there are some."""
    rows, cols = case["sizes"]["rows"], case["sizes"]["cols"]
    text = f"{rows}²" if rows == cols else f"{rows}×{cols}"
    clients = case["sizes"].get("clients")
    return f"{text}, {clients}" if clients else text


def growth(curves: Sequence[Curve], axis: str) -> Figure:
    """Draw time and peak memory along one axis, and the floor's time as a dashed line."""
    with matplotlib.rc_context(STYLE):
        names = list(dict.fromkeys(curve.operator for curve in curves))
        figure, (time, memory) = panels(2, names, 3.4, floor=True)
        sizes = sorted({size for curve in curves for size in curve.sizes})
        times = [1e3 * value for curve in curves for value in (*curve.seconds, *curve.floor)]
        logarithmic(time, sizes, times, axis, "ms")
        peaks = [max(peak, LEAST) / 1e6 for curve in curves for peak in curve.peaks]
        logarithmic(memory, sizes, peaks, axis, "peak MB beyond the inputs")
        for curve in curves:
            colour, marker = series(curve.operator, names)
            floor, measured = ([1e3 * s for s in line] for line in (curve.floor, curve.seconds))
            held = [max(peak, LEAST) / 1e6 for peak in curve.peaks]
            style: dict[str, Any] = {"marker": marker, "color": colour, "markersize": 4}
            time.plot(curve.sizes, floor, "--", color=colour, linewidth=1.0)
            time.plot(curve.sizes, measured, **style)
            memory.plot(curve.sizes, held, **style)
        for axes in (time, memory):
            axes.xaxis.set_major_locator(FixedLocator(sizes))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    return figure


def _power(size: float) -> str:
    return f"{size / 1024:g}k" if size >= 1024 else f"{size:g}"
