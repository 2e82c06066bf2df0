"""The exponent with which a cost grows: y ≈ c·x^e, fitted by least squares on logarithms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.loaded import OURS, Result, total_seconds

# The fitted exponent must exceed the floor's by more than this before it is called worse.
TOLERANCE = 0.1
# Less than this a peak is pages and buffers of the allocator, and its growth says nothing.
LEAST_PEAK = 2**20


@dataclass(frozen=True)
class Fit:
    """The exponent over all sizes, and the exponents between neighbouring ones."""

    exponent: float
    local: tuple[float, ...]
    sizes: tuple[float, ...]

    def __str__(self) -> str:
        if len(self.local) < 2:
            return f"{self.exponent:.2f}"
        return f"{self.exponent:.2f} ({min(self.local):.2f} to {max(self.local):.2f})"


def fit(xs: Sequence[float], ys: Sequence[float]) -> Fit | None:
    """Fit log y = e·log x + log c; None for fewer than two sizes, or values that are not above 0.

    xs: sizes, increasing
    ys: costs of those sizes
    """
    if len(set(xs)) < 2 or min(xs) <= 0 or min(ys) <= 0:
        return None
    log_xs, log_ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = math.fsum(log_xs) / len(xs), math.fsum(log_ys) / len(ys)
    spread = math.fsum((x - mean_x) ** 2 for x in log_xs)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(log_xs, log_ys, strict=True))
    points = list(zip(log_xs, log_ys, strict=True))
    local = tuple(
        (y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in zip(points, points[1:], strict=False)
    )
    return Fit(slope / spread, local, tuple(xs))


def floor_seconds(result: Result) -> float:
    """Return the least bytes at the copy bandwidth plus the operations at the matrix rate.

    The rates are those that the result's own shares were taken of.
    """
    seconds = result["least_bytes"] / result["ceilings"]["copy"]
    if result["of_matmul"]:
        seconds += result["operations"] * result["of_matmul"] / result["flop_per_s"]
    return seconds


def worse(measured: Fit, floor: Fit) -> bool:
    """Whether a cost grows faster than its floor."""
    return measured.exponent > floor.exponent + TOLERANCE


@dataclass(frozen=True)
class Curve:
    """One operator along one axis: costs by size, and what a floor would take.

    seconds, floor:     measured medians, and the floor's
    peaks, least_bytes: bytes beyond the inputs, and those that must be read and written
    """

    operator: str
    axis: str
    what: str
    sizes: list[int]
    seconds: list[float]
    floor: list[float]
    peaks: list[int]
    least_bytes: list[float]

    @property
    def time(self) -> Fit | None:
        """Exponent of the measured time."""
        return fit(self.sizes, self.seconds)

    @property
    def floor_time(self) -> Fit | None:
        """Exponent of the floor's time."""
        return fit(self.sizes, self.floor)

    @property
    def peak(self) -> Fit | None:
        """Exponent of the peak memory, over the sizes where it is not lost among pages."""
        return fit(*self._where_large(self.peaks))

    @property
    def least(self) -> Fit | None:
        """Exponent of the least bytes, over the same sizes."""
        return fit(*self._where_large(self.least_bytes))

    def _where_large(self, values: Sequence[float]) -> tuple[list[int], list[float]]:
        large = [i for i, peak in enumerate(self.peaks) if peak >= LEAST_PEAK]
        return [self.sizes[i] for i in large], [values[i] for i in large]

    @property
    def worse_time(self) -> bool:
        """Whether the time grows faster than the floor's."""
        return bool(self.time and self.floor_time and worse(self.time, self.floor_time))


def curves(measured: Sequence[Result]) -> list[Curve]:
    """Make a curve of the results of an operator that differ in their axis alone."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in measured:
        axis = result["axis"]
        fixed = [f"{v:,} {k}" for k, v in result["sizes"].items() if k != axis and v]
        what = ", ".join([*filter(None, [result["variant"]]), *fixed, result["dtype"]])
        groups.setdefault((axis, result["operator"], what), []).append(result)
    return [
        _curve(*key, sorted(group, key=lambda result: result["sizes"][result["axis"]]))
        for key, group in groups.items()
    ]


def _curve(axis: str, operator: str, what: str, group: list[Result]) -> Curve:
    return Curve(
        operator,
        axis,
        what,
        sizes=[result["sizes"][axis] for result in group],
        seconds=[result["times"][OURS]["median"] for result in group],
        floor=[floor_seconds(result) for result in group],
        peaks=[result["peak_bytes"].get(OURS, 0) for result in group],
        least_bytes=[result["least_bytes"] for result in group],
    )


def block_curves(models: Sequence[Result]) -> list[Curve]:
    """Make a curve of a pipeline that was measured with several numbers of blocks."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for model in models:
        what = [model["pruner"], model["pattern"] or f"{model['sparsity']:.0%}", model["dtype"]]
        what += [f"{model[key]} {key}" for key in ("clients", "samples", "seqlen")]
        name = f"{model['model']}, {model['pipeline']}"
        groups.setdefault((name, ", ".join(what)), []).append(model)
    found = []
    for (name, text), group in groups.items():
        group.sort(key=lambda model: model["blocks"])
        blocks = [model["blocks"] for model in group]
        if len(set(blocks)) < 2:
            continue
        seconds = [total_seconds(model) for model in group]
        peaks = [max(bytes_ or 0 for bytes_ in model["peak_bytes"].values()) for model in group]
        # A floor for blocks: as many times the first measurement as there are blocks.
        linear = [seconds[0] * count / blocks[0] for count in blocks]
        least = [peaks[0] * count / blocks[0] for count in blocks]
        found.append(Curve(name, "blocks", text, blocks, seconds, linear, peaks, least))
    return found
