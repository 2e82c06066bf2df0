"""How each step of a federation over a network grows with the bytes, above its fixed cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.growth.fit import TOLERANCE, Fit, fit
from bench.loaded import Result

MIB = 2**20
# A step whose growth is a smaller share of its fixed cost is lost in the noise of process starts.
LEAST_GROWTH = 0.1


@dataclass(frozen=True)
class Step:
    """One step along the bytes of a client's update.

    unit:   of its costs
    mib:    a client's update, MiB, increasing
    costs:  by update, each the whole run's
    """

    name: str
    unit: str
    mib: tuple[float, ...]
    costs: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Cost for each further MiB of a client's update, from the smallest to the largest."""
        return (self.costs[-1] - self.costs[0]) / (self.mib[-1] - self.mib[0])

    @property
    def last_rate(self) -> float:
        """The same between the two largest."""
        return (self.costs[-1] - self.costs[-2]) / (self.mib[-1] - self.mib[-2])

    @property
    def growth(self) -> Fit | None:
        """The exponent of what comes on top of the smallest update, by what that has more bytes.

        Sizes whose step is lost in the noise are left out; None where fewer than two are left.
        """
        first = self.costs[0]
        above = [
            (mib - self.mib[0], cost - first)
            for mib, cost in zip(self.mib[1:], self.costs[1:], strict=True)
            if cost - first > LEAST_GROWTH * abs(first)
        ]
        return fit([x for x, _ in above], [y for _, y in above])

    @property
    def faster(self) -> bool:
        """Whether it grows faster than the bytes."""
        return self.growth is not None and self.growth.exponent > 1 + TOLERANCE


def steps(measured: Sequence[Result]) -> list[Step]:
    """The steps of runs that differ in their bytes alone."""
    runs = sorted(measured, key=lambda run: run["far"]["bytes"]["bytes_up"])
    mib = tuple(run["far"]["bytes"]["bytes_up"] / MIB for run in runs)

    def step(name: str, unit: str, costs: Sequence[float]) -> Step:
        return Step(name, unit, mib, tuple(costs))

    found = [
        step("all messages, until all have answered", "s", [_work(run) for run in runs]),
        step("checks", "s", [_stage(run, "check") for run in runs]),
        step("aggregation", "s", [_stage(run, "aggregate") for run in runs]),
        step("saving", "s", [_stage(run, "save") for run in runs]),
    ]
    for program in ("flwr-clientapp", "flwr-serverapp", "flower-superlink", "flower-supernode"):
        costs = [run["far"]["cpu"][program] for run in runs]
        found.append(step(f"CPU of `{program}`", "s", costs))
    for program in ("flwr-clientapp", "flwr-serverapp", "flower-superlink", "flower-supernode"):
        peaks = [run["far"]["peak_bytes"][program] / MIB for run in runs]
        found.append(step(f"peak of one `{program}`", "MiB", peaks))
    wire = [_wire(run["far"]["bytes"]) / MIB for run in runs]
    return [*found, step("bytes on one client's wire", "MiB", wire)]


def _stage(run: Result, name: str) -> float:
    return float(run["far"]["stages"].get(name, 0.0))


def _work(run: Result) -> float:
    return _stage(run, "wait") - run["far"]["phases"]["finish"]


def _wire(counted: Mapping[str, int]) -> int:
    return counted["sent"] + counted["received"]
