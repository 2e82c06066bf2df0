"""The pictures of a report, as matplotlib figures without pyplot and without its global state.

Every colour is a role, not a colour: `pictures.svg` turns it into a variable of the page's style
sheet, so that the same picture is right on light and on dark.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fedspa.report import ClientResult, Method
from fedspa.tables import domains, megabytes, perplexity_text

HEAT_STEPS = 7
ROLES = {
    "ink": "#010203",
    "muted": "#010204",
    "grid": "#010205",
    "surface": "#010206",
    "result": "#010207",
    "baseline": "#010208",
    "dense": "#010209",
    "down": "#01020a",
    "absent": "#01020b",
    **{f"heat{step}": f"#0102{16 + step:02x}" for step in range(HEAT_STEPS)},
    **{f"on-heat{step}": f"#0102{32 + step:02x}" for step in range(HEAT_STEPS)},
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedspa",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": ROLES["ink"],
    "axes.edgecolor": ROLES["grid"],
    "axes.labelcolor": ROLES["muted"],
    "xtick.color": ROLES["muted"],
    "ytick.color": ROLES["ink"],
    "grid.color": ROLES["grid"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.unicode_minus": False,
}
LONGEST_NAME = 24
MOST_BARS = 64
GLYPH = 0.068


@dataclass(frozen=True)
class Scale:
    """The axis that all perplexity panels share, so that their bars compare."""

    low: float
    high: float
    logarithmic: bool


def perplexity_scale(methods: Sequence[Method]) -> Scale:
    """Start at 0; or go logarithmic where the largest is over eight times the least."""
    finite = [p for method in methods for p in method.perplexity.values() if math.isfinite(p)]
    low, high = min(finite, default=1.0), max(finite, default=10.0)
    if high > 8 * low:
        return Scale(low / 1.6, high * (high / low) ** 0.3, logarithmic=True)
    return Scale(0.0, high * 1.22, logarithmic=False)


def perplexity_panels(methods: Sequence[Method], result: Method) -> dict[str, Figure]:
    """One panel for the geometric mean and one for each domain: a bar a method, best read down."""
    scale = perplexity_scale(methods)
    values = {
        domain: [method.perplexity.get(domain, math.nan) for method in methods]
        for domain in domains(methods)
    }
    if len(values) > 1:
        values = {"geometric mean": [method.geometric_mean for method in methods]} | values
    return {
        name: _perplexity_panel(methods, column, result, scale) for name, column in values.items()
    }


def _perplexity_panel(
    methods: Sequence[Method], values: Sequence[float], result: Method, scale: Scale
) -> Figure:
    names = [shortened(method.name) for method in methods]
    figure, axes = _bar_axes(names, width=3.7, row=0.22)
    if scale.logarithmic:
        axes.set_xscale("log")
        between = (1.0, 3.0) if scale.high < 300 * scale.low else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=between, numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlim(scale.low, scale.high)
    axes.set_xlabel("perplexity, log scale" if scale.logarithmic else "perplexity")
    for row, (method, value) in enumerate(zip(methods, values, strict=True)):
        role = "result" if method is result else "dense" if method.name == "dense" else "baseline"
        shown = value if math.isfinite(value) else scale.low
        axes.barh(row, shown - scale.low, left=scale.low, height=0.66, color=ROLES[role])
        weight = "bold" if method is result else "normal"
        axes.annotate(
            perplexity_text(value),
            (shown, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontweight=weight,
        )
        axes.get_yticklabels()[row].set_fontweight(weight)
    return figure


def bytes_figure(clients: Sequence[ClientResult]) -> Figure:
    """Megabytes up and down by client; over 64 clients as two falling curves without names."""
    if len(clients) > MOST_BARS:
        return _bytes_curves(clients)
    named = [shortened(client.name) for client in clients]
    figure, axes = _bar_axes(named, width=7.2, row=0.34 if len(clients) <= 24 else 0.16)
    for row, client in enumerate(clients):
        for offset, role, count in (
            (-0.2, "result", client.bytes_up),
            (0.2, "down", client.bytes_down),
        ):
            axes.barh(row + offset, count / 1e6, height=0.36, color=ROLES[role])
            if len(clients) <= 24:
                axes.annotate(
                    megabytes(count),
                    (count / 1e6, row + offset),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
    largest = max(max(client.bytes_up, client.bytes_down) for client in clients) / 1e6
    axes.set_xlim(0, largest * 1.12 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("MB (10⁶ bytes) over the whole run")
    return figure


def _bytes_curves(clients: Sequence[ClientResult]) -> Figure:
    figure = Figure(figsize=(7.2, 2.8))
    axes = figure.add_axes((0.1, 0.2, 0.87, 0.75))
    ranks = range(1, len(clients) + 1)
    for role, counts in (
        ("result", [client.bytes_up for client in clients]),
        ("down", [client.bytes_down for client in clients]),
    ):
        falling = [count / 1e6 for count in sorted(counts, reverse=True)]
        axes.step(ranks, falling, where="mid", color=ROLES[role], linewidth=1.8)
    axes.set_xlim(1, len(clients))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clients, each curve from the largest to the smallest")
    axes.set_ylabel("MB (10⁶ bytes)")
    axes.grid(axis="y", linewidth=0.6)
    bare(axes)
    return figure


def shortened(name: str) -> str:
    """Cut a name to what fits beside a picture; the tables have it whole."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _bar_axes(names: Sequence[str], width: float, row: float) -> tuple[Figure, Axes]:
    left = max(map(len, names)) * GLYPH + 0.15
    high = row * len(names)
    total = high + 0.5
    figure = Figure(figsize=(width, total))
    axes = figure.add_axes(
        (left / width, 0.46 / total, (width - left - 0.12) / width, high / total)
    )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    bare(axes)
    return figure, axes


def bare(axes: Axes) -> None:
    """Take away the frame and the tick marks."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def svg_text(figure: Figure) -> str:
    """A figure as an SVG element: text stays text, in the reader's font, and nothing says when."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"\s*<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    return re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", drawing)
