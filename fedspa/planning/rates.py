"""What a machine does in a second: measured with the operators that a run spends its time in."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedspa.messages import pack_layer
from fedspa.planning.architecture import Layer
from fedspa.planning.job import Job
from fedspa.pruners import SharingPruner, make_pruner
from fedspa.schedule import round_target
from fedspa_kernels import L0Accumulator, accumulate_hessian_, expand_mask

# Of the matrices that are measured with, and of the file: some seconds altogether.
WIDEST = {"cpu": 1536, "cuda": 8192}
TOKENS = {"cpu": 512, "cuda": 8192}
COPIED = {"cpu": 128 << 20, "cuda": 1 << 30}
FILE = 256 << 20
# A measurement is repeated until it has taken so long.
SECONDS = 0.3


@dataclass(frozen=True)
class Rates:
    """Per second.

    product: operations of a matrix product. gather: multiply-adds of a statistic. prune: units of
    `pruning_work`. add, agree: weights. copy, read, write: bytes, to the device and of the disk.
    """

    product: float
    gather: float
    prune: float
    add: float
    agree: float
    copy: float
    read: float
    write: float


def gathering_work(cols: int, tokens: int, job: Job) -> float:
    """Multiply-adds of a statistic of one client."""
    return float(tokens) * cols * (cols if job.statistic_square else 1)


def pruning_work(layers: Sequence[Layer], job: Job) -> float:
    """Multiply-adds of a factor and a sweep; where there are none, weights."""
    rows, cols = sum(layer.rows for layer in layers), layers[0].cols
    return cols**3 / 3 + rows * cols**2 if job.statistic_square else float(rows) * cols


def measure(job: Job, folder: Path) -> Rates:
    """Measure the device at hand, and the disk that a folder is or would be on.

    Raises RuntimeError where the job's device is not here.
    """
    if job.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "plan: --calibrate measures the device at hand, and PyTorch finds no GPU here; run it "
            "where the GPU is, or leave it out"
        )
    layer = _representative(job)
    weight = torch.randn(layer.rows, layer.cols, device=job.device).to(job.dtype)
    tokens = TOKENS[job.device]
    inputs = torch.randn(tokens, layer.cols, device=job.device).to(job.dtype)
    product = _seconds(lambda: inputs @ weight.T, job.device)
    gather, prune = _pruner(job, layer, weight, inputs)
    add, agree = _aggregation(job, weight)
    read, write = _disk(folder)
    return Rates(
        product=2.0 * tokens * layer.numel / product,
        gather=gather,
        prune=prune,
        add=add,
        agree=agree,
        copy=_copy(job.device),
        read=read,
        write=write,
    )


def _representative(job: Job) -> Layer:
    """The largest layer, cut to what takes a moment."""
    layers = [layer for kind in job.architecture.kinds for layer in kind.layers]
    largest = max(layers, key=lambda layer: layer.numel)
    most = WIDEST[job.device]
    return Layer("representative", min(largest.rows, most), min(largest.cols, most))


def _pruner(job: Job, layer: Layer, weight: Tensor, inputs: Tensor) -> tuple[float, float]:
    """Rates of gathering and of pruning."""
    pruner = make_pruner(job.settings)
    target = round_target(job.settings, 0)
    statistic, gather = None, float("inf")
    if job.needs_inputs:
        statistic = pruner.gather(None, inputs)
        if job.statistic_square:
            took = _seconds(lambda: accumulate_hessian_(statistic, inputs), job.device)
        else:
            took = _seconds(lambda: pruner.gather(statistic, inputs), job.device)
        gather = gathering_work(layer.cols, len(inputs), job) / took

    def prune() -> object:
        if isinstance(pruner, SharingPruner):
            return pruner.prune_shared([weight], statistic, target, None)
        return pruner.prune(weight, statistic, target, None)

    return gather, pruning_work([layer], job) / _seconds(prune, job.device)


def _aggregation(job: Job, weight: Tensor) -> tuple[float, float]:
    """Weights that a second adds to the sums, and that it averages, expands and packs."""
    mask = torch.rand(weight.shape, device=weight.device) < 0.5
    sums = L0Accumulator(weight.shape, weight.device)
    target = round_target(job.settings, 0)
    added = 0

    def add() -> None:
        nonlocal added
        message = pack_layer(weight, mask, None, False)
        sums.add(message.weight(), message.mask())
        added += 1

    def agree() -> object:
        agreed = sums.weight(weight.dtype)
        kept = expand_mask(
            sums.votes,
            added,
            sparsity=target.sparsity,
            pattern=target.pattern,
            scores=agreed.abs(),
        )
        return pack_layer(agreed, kept, None, False)

    count, device = weight.numel(), job.device
    return count / _seconds(add, device), count / _seconds(agree, device)


def _copy(device: str) -> float:
    """Bytes a second from main memory to the device, pinned; on a CPU within main memory."""
    size = COPIED[device]
    source = torch.ones(size, dtype=torch.uint8, pin_memory=device == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return size / _seconds(lambda: target.copy_(source, non_blocking=True), device)


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes a second read from and written to a temporary file in a folder, or above it."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    content = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=place, prefix=".fedspa-rate-") as file:
        start = time.perf_counter()
        for _ in range(FILE // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        wrote = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            # Otherwise main memory would be read.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(len(content)):
            pass
        return FILE / (time.perf_counter() - start), FILE / wrote


def _seconds(run: Callable[[], object], device: str) -> float:
    """The mean time of a call, the first one not counted."""
    run()
    _finish(device)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        run()
        _finish(device)
        calls += 1
    return (time.perf_counter() - start) / calls


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
