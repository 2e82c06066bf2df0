"""How cost grows, as docs/performance.md tells it: exponents, every point, and what is worse."""

from collections.abc import Sequence

from bench.growth.fit import LEAST_PEAK, Curve, Fit, worse
from bench.tables import NOTHING, duration, in_order, markdown, number

AXES = ("cols", "rows", "clients", "tokens", "blocks")


def exponents(curves: Sequence[Curve]) -> list[str]:
    """Make a row a curve: its ends, its exponents and the floor's."""
    headings = ["operator", "along", "the rest", "sizes", "time", "time's exponent (locally)"]
    headings += ["the floor's", "peak MB", "peak's exponent (locally)"]
    rows = []
    for curve in curves:
        growing = str(curve.time or NOTHING)
        rows.append(
            [
                f"`{curve.operator}`",
                curve.axis,
                curve.what,
                f"{curve.sizes[0]:,} – {curve.sizes[-1]:,}",
                f"{duration(curve.seconds[0])} – {duration(curve.seconds[-1])}",
                f"**{growing}**" if curve.worse_time else growing,
                f"{curve.floor_time.exponent:.2f}" if curve.floor_time else NOTHING,
                f"{number(curve.peaks[0] / 1e6)} – {number(curve.peaks[-1] / 1e6)}",
                str(curve.peak or NOTHING),
            ]
        )
    return markdown(headings, rows, 3)


def sentences(curves: Sequence[Curve]) -> list[str]:
    """Say of each curve that grows faster than its floor by how much, or that none does."""
    found = []
    for curve in curves:
        for what, measured, floor in (
            ("time", curve.time, curve.floor_time),
            ("peak memory", curve.peak, curve.least),
        ):
            if measured and floor and worse(measured, floor):
                axis, steepest = curve.axis, _steepest(measured)
                found.append(
                    f"- `{curve.operator}`: its {what} grows with {axis}^{measured.exponent:.2f}, "
                    f"which is worse than the floor's {axis}^{floor.exponent:.2f} ({curve.what}; "
                    f"{steepest})."
                )
    return found or ["Nothing measured grows faster than its floor."]


def _steepest(measured: Fit) -> str:
    step = max(range(len(measured.local)), key=lambda index: measured.local[index])
    low, high = measured.sizes[step : step + 2]
    return f"steepest from {low:,} to {high:,}, {measured.local[step]:.2f}"


def points(curves: Sequence[Curve], axis: str) -> list[str]:
    """Make a row a curve along one axis: time and peak MB at every size."""
    along = [curve for curve in curves if curve.axis == axis]
    sizes = sorted({size for curve in along for size in curve.sizes})
    rows = []
    for curve in along:
        at = dict(zip(curve.sizes, zip(curve.seconds, curve.peaks, strict=True), strict=True))
        cells = [
            f"{duration(at[size][0])}, {number(at[size][1] / 1e6)} MB" if size in at else NOTHING
            for size in sizes
        ]
        rows.append([f"`{curve.operator}`", curve.what, *cells])
    return markdown(["operator", "the rest", *(f"{axis} {s:,}" for s in sizes)], rows, 2)


def axes(curves: Sequence[Curve]) -> list[str]:
    """Return the axes that were measured, in the page's order."""
    return in_order([curve.axis for curve in curves], AXES)


def floors_meaning() -> str:
    """Say how the floor's exponent and the peaks' came about."""
    return (
        "Exponents are least squares on logarithms over all sizes, in brackets the range between "
        "neighbouring sizes. The floor of a size is its least bytes at the copy bandwidth plus its "
        "operations at the matrix rate, both of the same run, fitted in the same way; the floor of "
        "the peak memory is the least bytes; of blocks, that each costs what the first cost. Peaks "
        f"under {LEAST_PEAK >> 20} MiB are left out of the fit."
    )
