"""Results as a table in a terminal, and as a line each while they come."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.operators.measure import OURS

WIDTH = 180


def show(results: Iterable[Mapping[str, Any]], ceilings: Mapping[str, Any]) -> None:
    """Print the table of results and the ceilings that they are compared with."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table(results))
    rates = ", ".join(f"{name} {rate(0, flops)}" for name, flops in ceilings["matmul"].items())
    console.print(f"copy {rate(ceilings['copy'], 0)}; matrix product {rates}")


def table(results: Iterable[Mapping[str, Any]]) -> Table:
    """A row for each result: time, rate, shares of the ceilings, ratios and peak."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("operator", "variant", "shape", "dtype"):
        made.add_column(heading, overflow="fold")
    for heading in ("clients", "ms", "rate", "% copy", "% matmul"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("how many times as long", overflow="fold")
    made.add_column("peak MB", justify="right", no_wrap=True)
    for result in results:
        made.add_row(*_cells(result))
    return made


def line(result: Mapping[str, Any]) -> str:
    """One result in a sentence."""
    if "failed" in result:
        return result["failed"]
    shares = [
        f"{result[key]:.0%} of {name}"
        for key, name in (("of_copy", "copy"), ("of_matmul", "matmul"))
        if result[key] is not None
    ]
    return "; ".join([f"{_milliseconds(result)} ms", ", ".join(shares), _ratios(result)])


def rate(bytes_per_s: float, flop_per_s: float) -> str:
    """Operations where there are any, else bytes."""
    if flop_per_s:
        scale, unit = (1e12, "TFLOP/s") if flop_per_s >= 1e12 else (1e9, "GFLOP/s")
        return f"{flop_per_s / scale:.3g} {unit}"
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def _cells(result: Mapping[str, Any]) -> list[str]:
    sizes = result["sizes"]
    shape, size = result["shape"], f"{sizes['rows']}x{sizes['cols']}"
    cells = [result["operator"], result["variant"], shape]
    if shape != size:
        cells[2] = f"{shape} {size}"
    cells += [result["dtype"], str(sizes["clients"] or "")]
    if "failed" in result:
        return [*cells, "", "", "", "", f"failed: {result['failed']}", ""]
    peak = result["peak_bytes"].get(OURS)
    return [
        *cells,
        _milliseconds(result),
        rate(result["bytes_per_s"], result["flop_per_s"]),
        *(_percent(result[key]) for key in ("of_copy", "of_matmul")),
        _ratios(result),
        "" if peak is None else f"{peak / 1e6:.1f}",
    ]


def _milliseconds(result: Mapping[str, Any]) -> str:
    return f"{result['times'][OURS]['median'] * 1e3:.3g}"


def _ratios(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {ratio:.3g}" for name, ratio in result["ratios"].items())


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"
