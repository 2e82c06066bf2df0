"""Writes a report as one HTML page that needs nothing beside it: no request, no script, no font."""

import html
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from fedspa import charts, tables
from fedspa.clock import duration
from fedspa.heat import heat, heat_figure
from fedspa.report import LayerResult, Report

MOST_LAYER_ROWS = 1_000


@dataclass(frozen=True)
class Picture:
    """A drawing and its caption; `low` and `high` are the ends of its colours, if it has any."""

    svg: Markup
    caption: str
    low: str = ""
    high: str = ""


def write_html(report: Report, path: str | Path) -> None:
    """Write one self-contained page, the same bytes for the same report.

    What the report lacks is left out: without methods there is no perplexity, without votes no
    picture of them.
    """
    page = Environment(loader=PackageLoader("fedspa"), autoescape=True, trim_blocks=True)
    page.lstrip_blocks = True
    with matplotlib.rc_context(charts.STYLE):
        text = page.get_template("report.html").render(
            title=_model_name(report),
            headline=headline(report),
            facts=_facts(report),
            method_headings=tables.method_headings(report.methods),
            method_rows=tables.method_rows(report.methods),
            result=report.methods.index(final) if (final := report.final_method) else None,
            perplexity=_perplexity(report),
            layers=_layers(report),
            rounds=_rounds(report),
            layer_rows=_layer_rows(report),
            layer_count=len(report.final_layers),
            traffic=_traffic(report),
            client_headings=tables.CLIENT_HEADINGS,
            client_rows=tables.client_rows(report.clients),
            unprunable=report.unprunable,
            details=_details(report),
            heat_steps=charts.HEAT_STEPS,
        )
    Path(path).write_text(text, encoding="utf-8")


def headline(report: Report) -> str:
    """Say the result in one sentence."""
    clients = f"{len(report.clients)} client{'' if len(report.clients) == 1 else 's'}"
    sentence = f"{_model_name(report)}, pruned to {100 * report.sparsity:.4f} % by {clients}"
    result = report.final_method
    if result is None or math.isnan(result.geometric_mean):
        return f"{sentence}."
    measured = f"{len(result.perplexity)} domains (geometric mean)"
    if len(result.perplexity) == 1:
        measured = next(iter(result.perplexity))
    sentence += f": perplexity {tables.perplexity_text(result.geometric_mean)} on {measured}"
    others = [
        f"{tables.perplexity_text(method.geometric_mean)} {meaning}"
        for name, meaning in (("dense", "dense"), ("centralised", "with all data pooled"))
        for method in report.methods
        if method.name == name and method is not result
    ]
    return f"{sentence}, against {' and '.join(others)}." if others else f"{sentence}."


def svg(figure: Figure, name: str, label: str) -> Markup:
    """Inline SVG: text stays text, roles become variables of the page, and ids belong to `name`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"<style .*?</style>", "", drawing, flags=re.DOTALL)
    drawing = (
        re.sub(r' (width|height|version)="[^"]*"', "", drawing[: drawing.index(">")], count=3)
        + (drawing[drawing.index(">") :])
    )
    for role, colour in charts.ROLES.items():
        drawing = drawing.replace(colour, f"var(--{role})")
    drawing = re.sub(r" font-family: [^;]*;| transform=\"rotate\(-0 [^\"]*\"", "", drawing)
    drawing = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", drawing)
    # Between these widths its letters stay readable; a phone scrolls sideways within the picture.
    width = 72 * figure.get_figwidth()
    described = (
        f'<svg role="img" aria-label="{html.escape(label)}" '
        f'style="min-width:{0.9 * width:.0f}px;max-width:{1.55 * width:.0f}px"'
    )
    return Markup(drawing.replace("<svg", described, 1).strip())


def _model_name(report: Report) -> str:
    name = str(report.model.get("name") or report.model.get("type") or "model")
    return name.rstrip("/").rsplit("/", 1)[-1]


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = [("sparsity", f"{100 * report.sparsity:.4f} %")]
    result = report.final_method
    if result is not None and result.perplexity:
        facts.append(("perplexity", tables.perplexity_text(result.geometric_mean)))
    facts.append(("clients", str(len(report.clients))))
    if report.clients:
        for direction, attribute in (("up", "bytes_up"), ("down", "bytes_down")):
            mean = sum(getattr(client, attribute) for client in report.clients) / len(
                report.clients
            )
            facts.append((f"MB {direction} a client", tables.megabytes(round(mean))))
    if report.seconds:
        facts.append(("time", duration(sum(report.seconds.values()))))
    if report.peak_memory:
        facts.append(("peak memory", f"{report.peak_memory / 2**30:.2f} GiB"))
    if report.peak_gpu_memory:
        facts.append(("peak GPU memory", f"{report.peak_gpu_memory / 2**30:.2f} GiB"))
    return facts


def _perplexity(report: Report) -> list[Picture]:
    result = report.final_method
    if result is None:
        return []
    return [
        Picture(svg(figure, f"perplexity{index}", f"Perplexity on {name} by method"), name)
        for index, (name, figure) in enumerate(
            charts.perplexity_panels(report.methods, result).items()
        )
    ]


def _layers(report: Report) -> list[Picture]:
    layers = report.final_layers
    voted = [layer for layer in layers if layer.votes]
    shared = [layer for layer in voted if layer.clients > 1]
    sparsities = [layer.sparsity for layer in layers] or [0.0]
    # Where every layer meets the same target, a picture of it would be one colour.
    uneven = list(layers) if max(sparsities) - min(sparsities) > 5e-4 else []
    drawn = [
        ("intersection", "Pruned by every client, before the expansion", voted),
        ("agreement", "All clients agree, to keep or to prune", shared),
        ("sparsity", "Pruned in the end", uneven),
    ]
    return [_heat_picture(what, caption, shown) for what, caption, shown in drawn if shown]


def _heat_picture(what: str, caption: str, layers: list[LayerResult]) -> Picture:
    grid = heat(layers, what)
    low, high = f"{100 * grid.low:.1f} %", f"{100 * grid.high:.1f} %"
    label = f"{caption}: {low} to {high} of the weights, by layer and decoder block"
    return Picture(svg(heat_figure(grid), what, label), caption, low, high)


def _rounds(report: Report) -> list[list[str]]:
    rounds = sorted({layer.round for layer in report.layers})
    if len(rounds) < 2:
        return []
    rows = []
    for number in rounds:
        layers = [layer for layer in report.layers if layer.round == number]
        rows.append([str(number), str(len(layers))])
        measures: tuple[Callable[[Any], float], ...] = (
            lambda layer: layer.intersection,
            lambda layer: layer.agreement,
            lambda layer: layer.sparsity,
        )
        size = sum(layer.size for layer in layers)
        for measure in measures:
            share = sum(measure(layer) * layer.size for layer in layers) / size
            rows[-1].append("–" if math.isnan(share) else f"{100 * share:.4f}")
    return rows


def _layer_rows(report: Report) -> list[list[str]]:
    def per_cent(share: float) -> str:
        return "–" if math.isnan(share) else f"{100 * share:.4f}"

    return [
        [
            str(layer.block),
            layer.layer,
            " × ".join(map(str, layer.shape)),
            str(layer.clients),
            per_cent(layer.intersection),
            per_cent(layer.agreement),
            per_cent(layer.sparsity),
        ]
        for layer in report.final_layers[:MOST_LAYER_ROWS]
    ]


def _traffic(report: Report) -> Picture | None:
    if not any(client.bytes_up or client.bytes_down for client in report.clients):
        return None
    caption = "Sent and received by each client"
    return Picture(svg(charts.bytes_figure(report.clients), "bytes", caption), caption)


def _details(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    def plain(value: Any) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:,}"
        return "–" if value is None or value == "" else str(value)

    sections = [
        ("Settings", [(key, plain(value)) for key, value in report.settings.items()]),
        ("Model", [(key, plain(value)) for key, value in report.model.items()]),
        ("Time", [(step, duration(seconds)) for step, seconds in report.seconds.items()]),
        ("Versions", list(report.versions.items())),
        ("Machine", list(report.machine.items())),
    ]
    return [(title, rows) for title, rows in sections if rows]
