"""How a time is measured: the contenders in turn, in one process, on fresh inputs in rotation.

A round runs every contender once, in an order that rotates, so that what the machine does meanwhile
meets all of them alike; a ratio is the median of the rounds' own. Slow contenders sit rounds out.
"""

import functools
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

Contender = Callable[[Any], Any]
Rounds = list[dict[str, float]]

MOST_ROUNDS = 50
# A call below this is repeated until a sample takes SAMPLE, so that a clock's grain is nothing.
SMALL = {"cpu": 200e-6, "cuda": 50e-6}
SAMPLE = {"cpu": 1e-3, "cuda": 200e-6}
MOST_CALLS = 1000
# Inputs that together are larger than this are in no cache when their turn comes again.
CACHE = {"cpu": 64 * 2**20, "cuda": 128 * 2**20}
MOST_SETS = {"cpu": 8, "cuda": 32}
# Written before a GPU's sample: it empties the L2 cache, and keeps the GPU busy so long (0.3 ms)
# that the sample's kernels are queued by then. Else the host's time would be measured.
FLUSHED = 2**30
# What a CPU's call allocates comes from other pages when another contender ran before it, and new
# pages can take longer than the call (80 ms for 80 MB in a virtual machine). So a call of its own,
# which is not timed, goes before each sample, unless it takes longer than this.
SETTLED = 5.0
# A call that takes longer than this tells its time itself, though nothing was warm; on a GPU it may
# have started libraries or compiled a kernel.
LONG = {"cpu": 0.2, "cuda": 2.0}
# A warm call that takes longer than this needs no second one to tell its time.
SLOW = 0.1


class WrongResult(RuntimeError):
    """A contender's result is not the reference's, and so its time is not worth knowing."""


def race(
    contenders: Mapping[str, Contender],
    input_sets: Sequence[Any],
    device: torch.device | str,
    *,
    budget: float,
    estimates: Mapping[str, float],
) -> Rounds:
    """Measure contenders against each other; return the rounds: the seconds of each that ran in it.

    contenders: called with one of the input sets; the first is the one that all are compared with
    input_sets: rotated through, so that no call finds its inputs in the cache
    budget:     seconds, about; each is called at least once, and where that fits 5 times
    estimates:  what a call of each takes, from calls that have warmed it up
    """
    place = torch.device(device)
    runs = plan(estimates, budget)
    names, count = list(contenders), max(runs.values())
    clocks: list[dict[str, Callable[[], float]]] = []
    gc.collect()
    gc.disable()
    try:
        for number in range(count):
            start = number % len(names)
            clocks.append({})
            for name in names[start:] + names[:start]:
                if takes_part(number, runs[name], count):
                    clocks[-1][name] = sample(
                        contenders[name], input_sets, number, estimates[name], place
                    )
    finally:
        gc.enable()
    if place.type == "cuda":
        torch.cuda.synchronize()
    return [{name: read() for name, read in row.items()} for row in clocks]


def plan(estimates: Mapping[str, float], budget: float) -> dict[str, int]:
    """Return how often each is measured; the first, with which all are compared, in every round.

    The first: at least 5 times, or 3 where a call takes over 5 s. The others: 5 times where that is
    within the budget, 3 times where one sample is, and else once.
    """
    first, *others = estimates
    share = budget / len(estimates) / 2  # every sample has a call before it that settles
    rounds = max(3 if estimates[first] > 5 else 5, min(MOST_ROUNDS, _fits(share, estimates[first])))
    runs = {first: rounds}
    for name in others:
        taken = estimates[name]
        least = 5 if 10 * taken <= budget else 3 if 2 * taken <= budget else 1
        runs[name] = min(rounds, max(least, _fits(share, taken)))
    return runs


def takes_part(number: int, runs: int, rounds: int) -> bool:
    """Whether one with so many runs has one of them in this round: they are spread evenly."""
    return (number + 1) * runs // rounds > number * runs // rounds


def calls_per_sample(taken: float, device: torch.device) -> int:
    """Return how many calls make one sample."""
    if taken >= SMALL[device.type]:
        return 1
    return min(MOST_CALLS, math.ceil(SAMPLE[device.type] / max(taken, 1e-9)))


def sample(
    run: Contender, input_sets: Sequence[Any], number: int, taken: float, device: torch.device
) -> Callable[[], float]:
    """Call it; return a function that tells the seconds of a call (on a GPU, once it is done).

    number: of the round, which chooses the inputs; taken: about the seconds of a call
    """
    calls = calls_per_sample(taken, device)
    settle(run, input_sets, number, taken, device)
    if device.type == "cuda":
        _flush_cache(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in range(calls):
            run(input_sets[(number + call) % len(input_sets)])
        end.record()
        return lambda: start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for call in range(calls):
        run(input_sets[(number + call) % len(input_sets)])
    measured = (time.perf_counter() - begin) / calls
    return lambda: measured


def settle(
    run: Contender, input_sets: Sequence[Any], number: int, taken: float, device: torch.device
) -> None:
    """Call it untimed before a sample, on other inputs where there are some; not on a GPU."""
    if device.type == "cpu" and taken < SETTLED:
        run(input_sets[(number - 1) % len(input_sets)])


def estimate(run: Contender, inputs: Any, device: torch.device) -> float:
    """Warm up, and return about how many seconds a call takes."""
    best = _wall(run, inputs, device)
    if best < LONG[device.type]:
        best = min(_wall(run, inputs, device) for _ in range(1 if best > SLOW else 5))
    if best < SMALL[device.type]:
        calls = calls_per_sample(best, device)
        best = _wall(lambda inputs: [run(inputs) for _ in range(calls)], inputs, device) / calls
    return best


def input_sets(make: Callable[[int], Any], device: torch.device | str) -> list[Any]:
    """Make as many input sets as are not in the cache when they come round again, from seeds."""
    kind = torch.device(device).type
    first = make(0)
    count = min(MOST_SETS[kind], math.ceil(CACHE[kind] / max(1, size_of(first))))
    return [first, *(make(seed) for seed in range(1, count))]


def size_of(inputs: Any) -> int:
    """Return the bytes of all tensors in an input set."""
    if isinstance(inputs, torch.Tensor):
        return inputs.nbytes
    if isinstance(inputs, Mapping):
        inputs = inputs.values()
    elif not isinstance(inputs, list | tuple):
        return 0
    return sum(map(size_of, inputs))


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Return {"median", "p20", "p80"} in seconds and "runs"."""
    ordered = sorted(samples)
    return {
        "median": median(ordered),
        "p20": _quantile(ordered, 0.2),
        "p80": _quantile(ordered, 0.8),
        "runs": len(ordered),
    }


def ratios(rounds: Rounds, ours: str = "fedspa") -> dict[str, float]:
    """Return how many times as long as `ours` each of the others took: the median of the rounds."""
    pairs: dict[str, list[float]] = {}
    for row in rounds:
        for name, taken in row.items():
            if name != ours and ours in row:
                pairs.setdefault(name, []).append(taken / row[ours])
    return {name: median(found) for name, found in pairs.items()}


def _quantile(ordered: Sequence[float], share: float) -> float:
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _fits(share: float, taken: float) -> int:
    return int(share / max(taken, 1e-4))


def _wall(run: Contender, inputs: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _flush_cache(device: torch.device) -> None:
    _far_memory(device).zero_()


@functools.cache
def _far_memory(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device=device)
