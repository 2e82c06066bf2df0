"""Which sizes are measured along each axis, and how one of them is measured."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench import memory, protocol
from bench.operators import Case, Sizes, find_operator
from bench.operators.measure import Entrants, kernels, measure_case, record

# Of each axis: its sizes, and of each operator the case and what stays as it is.
AXES: dict[str, tuple[tuple[int, ...], dict[str, tuple[str, Sizes]]]] = {
    "cols": (
        (1024, 2048, 4096, 8192, 16384),
        {
            "obs_prune": ("50 %", Sizes(1024, 0)),
            "accumulate_hessian_": ("", Sizes(1024, 0, tokens=1024)),
            "wanda_prune": ("row 50 %", Sizes(1024, 0)),
        },
    ),
    "rows": (
        (256, 1024, 4096, 16384),
        {
            "obs_prune": ("50 %", Sizes(0, 1024)),
            "wanda_prune": ("row 50 %", Sizes(0, 1024)),
            "l0_average": ("masks", Sizes(0, 1024, clients=8)),
            "expand_mask": ("layer 50 %", Sizes(0, 1024, clients=8)),
        },
    ),
    "clients": (
        (1, 4, 16, 64, 256),
        {
            "l0_average": ("masks", Sizes(1024, 2048)),
            "l0_average_compressed": ("", Sizes(1024, 2048)),
            "expand_mask": ("layer 50 %", Sizes(1024, 2048)),
        },
    ),
    "tokens": ((256, 1024, 4096, 16384), {"accumulate_hessian_": ("", Sizes(1024, 2048))}),
}
OPERATORS = tuple(dict.fromkeys(name for _, cases in AXES.values() for name in cases))
# The reference is written to be read: beyond so many operations it would take longer than all else.
MOST_CHECKED = 3e11
BUDGET = 2.0


@dataclass(frozen=True)
class Point:
    """One size of one operator along one axis."""

    axis: str
    case: Case
    sizes: Sizes

    @property
    def name(self) -> str:
        """Such as "obs_prune along cols: 4,096"."""
        return f"{self.case.operator} along {self.axis}: {getattr(self.sizes, self.axis):,}"


def points(axes: Iterable[str], operators: Iterable[str]) -> list[Point]:
    """Return the points of these axes and operators, the small sizes of all of them first.

    raises: ValueError for an unknown axis or operator, or where no operator has such an axis
    """
    axes, operators = list(axes), list(operators)
    for what, names, known in (("axis", axes, tuple(AXES)), ("operator", operators, OPERATORS)):
        for name in names:
            if name not in known:
                raise ValueError(f"{what} {name!r} is not known; choose from {', '.join(known)}")
    found = [point for axis in axes for point in _along(axis) if point.case.operator in operators]
    if not found:
        raise ValueError(
            f"nothing to measure: {', '.join(operators)} along {', '.join(axes)}; "
            + "; ".join(f"{axis} has {', '.join(cases)}" for axis, (_, cases) in AXES.items())
        )
    return found


def _along(axis: str) -> Iterator[Point]:
    sizes, cases = AXES[axis]
    for size in sizes:
        for operator, (variant, fixed) in cases.items():
            (case,) = (c for c in find_operator(operator) if c.variant == variant)
            yield Point(axis, case, fixed._replace(**{axis: size}))


def measure_point(
    point: Point, dtype: torch.dtype, device: torch.device, ceilings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the result of a point, checked against the reference where that is fast enough."""
    case, sizes = point.case, point.sizes
    shape = f"{sizes.rows}x{sizes.cols}"
    if case.operations(sizes) <= MOST_CHECKED:
        result = measure_case(
            case, shape, sizes, dtype, device, ceilings, budget=BUDGET, baselines=False
        )
    else:
        entrants = _alone(case, sizes, dtype, device)
        rounds = protocol.race(
            entrants.runs, entrants.sets, device, budget=BUDGET, estimates=entrants.estimates
        )
        result = record(case, shape, sizes, dtype, entrants, rounds, ceilings)
    return {**result, "axis": point.axis}


def _alone(case: Case, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Entrants:
    """Prepare ours without the reference: one call for the peak, which is also the estimate."""

    def run(inputs: dict[str, Any]) -> Any:
        return case.run(inputs, backend)

    backend, *_ = kernels(case, device)
    inputs = case.inputs(sizes, dtype, torch.Generator(device).manual_seed(0))
    if device.type == "cuda":
        run(inputs)  # compiles
    start = time.perf_counter()
    peak, _ = memory.peak(lambda: run(inputs), device)
    taken = time.perf_counter() - start
    return Entrants(
        {"fedspa": run},
        [inputs],
        backend,
        check="checked at the smaller sizes of this axis; here the reference would take too long",
        estimates={"fedspa": taken},
        peaks={} if peak is None else {"fedspa": peak},
    )
