"""Measure one case at one size: check first, then the peaks of memory, then the race."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bench import memory, protocol
from bench.operators.case import Baseline, Case, Inputs, Sizes
from fedspa_kernels import dispatch

OURS = "fedspa"
# A baseline that is thought to take longer than this is left out.
LONGEST = 60.0


@dataclass
class Entrants:
    """The contenders of a race, warm and checked.

    runs:      by name, `fedspa` first; each is called with an input set
    sets:      the input sets
    backend:   that `fedspa` runs on
    check:     what was checked
    estimates: seconds of a call; peaks: bytes of a call; skipped: why a contender is not in `runs`
    """

    runs: dict[str, Callable[[Inputs], Any]]
    sets: list[Inputs]
    backend: str
    check: str = ""
    estimates: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def measure_case(
    case: Case,
    shape: str,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device | str,
    ceilings: Mapping[str, Any],
    *,
    budget: float = 2.0,
    longest: float = LONGEST,
    baselines: bool = True,
) -> dict[str, Any]:
    """Return the result of a case, as `bench.results` has it.

    shape:     its name in the result
    ceilings:  of this run, from `bench.ceilings.measure`
    budget:    seconds for the race
    longest:   seconds; a baseline that would take longer is left out
    baselines: False measures `fedspa` alone
    raises:    WrongResult where ours is not the reference's
    """
    entrants = prepare(case, sizes, dtype, device, longest=longest, baselines=baselines)
    rounds = protocol.race(
        entrants.runs, entrants.sets, device, budget=budget, estimates=entrants.estimates
    )
    return record(case, shape, sizes, dtype, entrants, rounds, ceilings)


def prepare(
    case: Case,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    longest: float = LONGEST,
    baselines: bool = True,
) -> Entrants:
    """Make the inputs, check ours against the reference, and call every contender once or more."""
    place = torch.device(device)
    ours, *rest = kernels(case, place)
    sets = protocol.input_sets(partial(_draw, case, sizes, dtype, place), place)
    entrants = Entrants({}, sets, ours)
    inputs = entrants.sets[0]
    truth = _own(case, _kernel(case, "reference"), inputs)
    expected = _enter(entrants, "reference", truth, case, place)
    for backend in (ours, *rest):
        run = _own(case, _kernel(case, backend), inputs)
        name = OURS if backend == ours else f"{OURS} {backend}"
        try:
            entrants.check = case.check(inputs, _enter(entrants, name, run, case, place), expected)
        except protocol.WrongResult as error:
            where = f"{case.name} {tuple(sizes)} {dtype}, backend {backend}"
            raise protocol.WrongResult(f"{where}: {error}") from error
    del expected
    if ours == "reference" or not baselines:
        entrants.skipped["reference"] = "ours runs on it" if baselines else "not asked for"
        del entrants.runs["reference"], entrants.estimates["reference"]
    for name, baseline in case.baselines.items() if baselines else ():
        _enter_baseline(entrants, name, baseline, case, sizes, place, longest)
    order = sorted(entrants.runs, key=lambda name: not name.startswith(OURS))
    entrants.runs = {name: entrants.runs[name] for name in order}
    entrants.estimates = {name: entrants.estimates[name] for name in order}
    return entrants


def kernels(case: Case, device: torch.device) -> list[str]:
    """Return the backends of ours to measure, the preferred first; the reference is a contender."""
    door = case.door or case.operator
    first = dispatch.preferred(door, device)
    there = dispatch.available(door, device)
    # Triton reaches CPU tensors in its interpreter, whose time tells nothing.
    return [first, *(b for b in there if b not in (first, "reference") and device.type != "cpu")]


def record(
    case: Case,
    shape: str,
    sizes: Sizes,
    dtype: torch.dtype,
    entrants: Entrants,
    rounds: protocol.Rounds,
    ceilings: Mapping[str, Any],
) -> dict[str, Any]:
    """Put a case's rounds into the form of the result file."""
    samples = {name: [row[name] for row in rounds if name in row] for name in entrants.runs}
    times = {name: protocol.summary(taken) for name, taken in samples.items()}
    least, operations = (
        round(case.least_bytes(sizes, dtype.itemsize)),
        round(case.operations(sizes)),
    )
    bytes_per_s, flop_per_s = (amount / times[OURS]["median"] for amount in (least, operations))
    matmul = ceilings["matmul"].get(_name(case.rate or dtype))
    return {
        **described(case, shape, sizes, dtype),
        "ours": entrants.backend,
        "check": entrants.check,
        "times": times,
        "ratios": protocol.ratios(rounds, OURS),
        "peak_bytes": {name: peak for name, peak in entrants.peaks.items() if name in times},
        "least_bytes": least,
        "operations": operations,
        "bytes_per_s": bytes_per_s,
        "flop_per_s": flop_per_s,
        "of_copy": bytes_per_s / ceilings["copy"] if ceilings["copy"] else None,
        "of_matmul": flop_per_s / matmul if operations and matmul else None,
        "skipped": entrants.skipped,
    }


def described(case: Case, shape: str, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a result is of; a size that does not matter to the case is None."""
    depends = ("rows", "cols", *case.uses)
    return {
        "operator": case.operator,
        "variant": case.variant,
        "shape": shape,
        "sizes": {n: size if n in depends else None for n, size in sizes._asdict().items()},
        "dtype": _name(dtype),
    }


def _draw(case: Case, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    return case.inputs(sizes, dtype, torch.Generator(device).manual_seed(seed))


def _kernel(case: Case, backend: str) -> Callable[[Inputs], Any]:
    return lambda inputs: case.run(inputs, backend)


def _own(case: Case, run: Callable[[Inputs], Any], inputs: Inputs) -> Callable[[Inputs], Any]:
    """Give a contender its own copy of what it writes."""
    if not case.writes:
        return run
    own = {name: inputs[name].clone() for name in case.writes}
    return lambda inputs: run({**inputs, **own})


def _enter(
    entrants: Entrants, name: str, run: Callable[[Inputs], Any], case: Case, device: torch.device
) -> Any:
    """Call a contender for the first time; note peak and time, and return its result."""
    inputs = entrants.sets[0]
    peak, taken, result = _first(run, inputs, device)
    if case.writes and isinstance(result, torch.Tensor):
        result = result.clone()  # the next calls change it
    # A first call loads, compiles and starts threads, and ours at least is measured without that.
    if taken < protocol.LONG[device.type] or name.startswith(OURS):
        peak, taken, _ = _first(run, inputs, device)
        if taken < protocol.SLOW:
            taken = protocol.estimate(run, inputs, device)
    entrants.runs[name], entrants.estimates[name] = run, taken
    if peak is not None:
        entrants.peaks[name] = peak
    return result


def _first(
    run: Callable[[Inputs], Any], inputs: Inputs, device: torch.device
) -> tuple[int | None, float, Any]:
    """Call once; return the peak of its bytes, its seconds, and its result."""
    start = time.perf_counter()
    peak, result = memory.peak(lambda: run(inputs), device)
    return peak, time.perf_counter() - start, result


def _enter_baseline(
    entrants: Entrants,
    name: str,
    baseline: Baseline,
    case: Case,
    sizes: Sizes,
    device: torch.device,
    longest: float,
) -> None:
    needed = baseline.copies * protocol.size_of(entrants.sets[0])
    there = memory.available(device)
    expected = baseline.seconds(sizes, device.type)
    if reason := baseline.why_not():
        entrants.skipped[name] = reason
    elif there is not None and needed > there:
        entrants.skipped[name] = (
            f"needs about {needed / 2**30:.0f} GiB, and {there / 2**30:.0f} GiB are free"
        )
    elif expected > longest:
        entrants.skipped[name] = f"would take over {longest:.0f} s (about {expected:.0f} s a call)"
    else:
        try:
            _enter(entrants, name, _own(case, baseline.run, entrants.sets[0]), case, device)
        except torch.OutOfMemoryError:
            entrants.skipped[name] = f"ran out of memory on {sizes.rows}x{sizes.cols}"
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a size that its PyTorch functions do not take
            entrants.skipped[name] = f"cannot do it: {' '.join(str(error).split())[:200]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
