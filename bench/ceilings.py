"""What this machine reaches now: the rate of a copy, and of a matrix product in each dtype."""

import functools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Far beyond the caches, and the sizes at which a product has reached its rate.
COPIED = {"cpu": 256 * 2**20, "cuda": 2**30}
SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 8192)}
# A larger product is tried only while the last one took less than this.
PATIENCE = 0.03
RUNS = 7


def measure(device: torch.device | str) -> dict[str, Any]:
    """Return {"copy": bytes/s, read and written, "matmul": {dtype: flop/s}}; float32 without TF32.

    The best of the sizes and the median of the runs. A dtype in which this machine is slow, such as
    float16 on a CPU without its instructions, is measured at the small sizes alone.
    """
    place = torch.device(device)
    return {
        "copy": copy_rate(place),
        "matmul": {
            str(dtype).removeprefix("torch."): matmul_rate(place, dtype) for dtype in DTYPES
        },
    }


def copy_rate(device: torch.device, size: int | None = None) -> float:
    """Return bytes/s of `target.copy_(source)`, counting what is read and what is written."""
    size = size or COPIED[device.type]
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return flop/s of a square product, 2 for each multiply-add."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        best = 0.0
        for size in SIZES[device.type]:
            left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            taken = seconds(functools.partial(torch.matmul, left, right), device)
            best = max(best, 2 * size**3 / taken)
            if device.type == "cpu" and taken > PATIENCE:
                break
        return best
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def seconds(run: Callable[[], Any], device: torch.device, runs: int = RUNS) -> float:
    """Return the median time of a call; fewer runs where one takes seconds."""
    return median(_samples(run, device, runs))


def _samples(run: Callable[[], Any], device: torch.device, runs: int) -> list[float]:
    run()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False)]
    samples: list[float] = []
    while len(samples) < runs and sum(samples) < 1:
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return samples
