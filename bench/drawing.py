"""What the pictures of docs/performance.md share: colours, panels, logarithmic axes, SVG.

An SVG has its light colours as they are and a style sheet that replaces them where the reader
prefers dark; it stands on a surface of its own, so that it is legible on any page.
"""

import math
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from bench.tables import OPERATORS
from fedspa.charts import svg_text

# (light, dark) by role.
INK = ("#1c2126", "#e7ebf0")
MUTED = ("#5b6570", "#a3adb8")
GRID = ("#dfe3e8", "#2f3740")
SURFACE = ("#fdfdfc", "#14181d")
SERIES = (
    ("#1f5fbf", "#74aaff"),
    ("#7a3fc4", "#bd95ff"),
    ("#b8430b", "#ff9a62"),
    ("#13794a", "#4fcb8d"),
    ("#b3234f", "#ff84a5"),
    ("#0b6f86", "#45c4dd"),
    ("#756200", "#dcc24f"),
    ("#6b4a3a", "#d0a894"),
)
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedspa",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": INK[0],
    "axes.edgecolor": MUTED[0],
    "axes.labelcolor": MUTED[0],
    "xtick.color": MUTED[0],
    "ytick.color": MUTED[0],
    "grid.color": GRID[0],
    "figure.facecolor": SURFACE[0],
    "axes.facecolor": "none",
    "axes.unicode_minus": False,
}
WIDTH = 8.4
# Ticks of a decade, by how much a logarithmic axis spans.
STEPS = (
    (5, (1, 1.5, 2, 3, 4, 5, 7)),
    (60, (1, 2, 5)),
    (600, (1, 3)),
    (math.inf, (1,)),
)


def svg(figure: Figure) -> str:
    """Write a figure as SVG: the same bytes for the same figure, text as text, and dark colours."""
    with matplotlib.rc_context(STYLE):
        drawing = svg_text(figure)
    rules = [
        f'[style*="{property}: {light}"]{{{property}:{dark} !important}}'
        for light, dark in (INK, MUTED, GRID, SURFACE, *SERIES)
        for property in ("fill", "stroke")
    ]
    dark_rules = f"<style>@media (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"
    return (
        re.sub(r"\s+$", "", drawing.replace("</svg>", f"{dark_rules}\n</svg>"), flags=re.M) + "\n"
    )


def series(name: str, names: Sequence[str] = OPERATORS) -> tuple[str, str]:
    """Give a curve or an operator its colour and its marker; an operator's are always the same."""
    index = OPERATORS.index(name) if name in OPERATORS else names.index(name)
    # Past the last colour, the same colours come with other markers.
    return SERIES[index % len(SERIES)][0], MARKERS[(index + index // len(SERIES)) % len(MARKERS)]


def panels(
    count: int, names: Sequence[str], high: float, floor: bool = False
) -> tuple[Figure, list[Axes]]:
    """Lay panels side by side above a legend of the operators."""
    entries = [
        Line2D([], [], linestyle="", marker=marker, color=colour, markersize=5)
        for colour, marker in (series(name, names) for name in names)
    ]
    labels = list(names)
    if floor:
        entries.append(Line2D([], [], linestyle="--", color=MUTED[0], linewidth=1.0))
        labels.append("the floor")
    per_line = 4
    lines = math.ceil(len(labels) / per_line)
    total = high + 0.2 * lines
    figure = Figure(figsize=(WIDTH, total))
    left, gap, below = 0.62, 0.72, 0.48 + 0.2 * lines
    width = (WIDTH - left - 0.2 - gap * (count - 1)) / count
    places = [
        figure.add_axes(
            (
                (left + index * (width + gap)) / WIDTH,
                below / total,
                width / WIDTH,
                (total - below - 0.15) / total,
            )
        )
        for index in range(count)
    ]
    figure.legend(
        entries,
        labels,
        loc="lower left",
        bbox_to_anchor=(left / WIDTH - 0.01, 0.0),
        ncols=per_line,
        frameon=False,
        fontsize=8,
        handletextpad=0.3,
        columnspacing=1.4,
    )
    return figure, places


def logarithmic(
    axes: Axes, xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str
) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for set_limits, values in ((axes.set_xlim, xs), (axes.set_ylim, ys)):
        low, high = min(values), max(values)
        room = max((high / low) ** 0.08, 1.25)
        set_limits(low / room, high * room)
    for scale in (axes.xaxis, axes.yaxis):
        low, high = scale.get_view_interval()
        steps = next(steps for most, steps in STEPS if high < most * low)
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [m * 10.0**e for e in exponents for m in steps if low <= m * 10.0**e <= high]
        scale.set_major_locator(FixedLocator(ticks))
        scale.set_minor_locator(NullLocator())
        scale.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        scale.set_minor_formatter(NullFormatter())
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)


def short(value: float) -> str:
    """Write a tick: 0.001, 0.5, 20, 1k, 2M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def roof(axes: Axes, xs: Sequence[float], ys: Sequence[float], text: str) -> None:
    axes.plot(xs, ys, color=INK[0], linewidth=1.4, zorder=2)
    if text:
        axes.annotate(
            text,
            (xs[-1], ys[-1]),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=INK[0],
        )
