"""Bytes that clients send and receive, as the report of the run will count them."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from fedspa.planning.architecture import Layer
from fedspa.planning.job import Job
from fedspa.settings import Settings
from fedspa.triangle import triangle_size
from fedspa_kernels.arguments import parse_pattern
from fedspa_kernels.counts import at_least, at_most


def kept_by_client(layer: Layer, settings: Settings) -> int:
    """Weights that a client keeps of a layer: its pruner takes whole numbers from below."""
    if settings.pattern is not None:
        return _kept_of_pattern(layer, settings.pattern)
    assert settings.sparsity is not None
    sparsity = settings.sparsity
    if settings.pruner == "sparsegpt":
        width = settings.block_size
        whole, rest = divmod(layer.cols, width)
        blocks = whole * at_most(layer.rows * width, sparsity)
        return layer.numel - blocks - at_most(layer.rows * rest, sparsity)
    if settings.pruner == "wanda":
        return layer.numel - layer.rows * at_most(layer.cols, sparsity)
    return layer.numel - at_most(layer.numel, sparsity)


def kept_by_server(layer: Layer, settings: Settings) -> int:
    """Weights that the agreed mask keeps: the expansion takes whole numbers from above.

    What nobody kept is never more than that where masks are expanded over a whole layer.
    """
    if settings.pattern is not None:
        return _kept_of_pattern(layer, settings.pattern)
    assert settings.sparsity is not None
    groups, of = {
        "layer": (1, layer.numel),
        "row": (layer.rows, layer.cols),
        "column": (layer.cols, layer.rows),
    }[settings.expansion]
    return layer.numel - groups * at_least(of, settings.sparsity)


def message_bytes(layer: Layer, kept: int, job: Job) -> int:
    """A layer as it travels: a bit for every weight, whole bytes a row, and the kept values."""
    bits = layer.rows * ceil(layer.cols / 8)
    return bits if job.settings.aggregation == "mask" else bits + kept * job.sent_element


def client_traffic(job: Job) -> tuple[int, int]:
    """Bytes that each client sends and receives in the whole run."""
    up = down = 0
    for kind, flight in zip(job.architecture.kinds, job.flights, strict=True):
        for layer in kind.layers:
            down += kind.count * message_bytes(layer, kept_by_server(layer, job.settings), job)
            if not job.sums_statistics:
                kept = kept_by_client(layer, job.settings)
                up += kind.count * message_bytes(layer, kept, job)
        if job.sums_statistics:
            up += kind.count * statistics_bytes(flight.groups, job)
    return up, down


def statistics_bytes(groups: Sequence[Sequence[Layer]], job: Job) -> int:
    """A block's statistics as they travel: a triangle, or a number for each input of a group."""
    return job.sent_statistic_element * statistic_numbers(groups, job)


def statistic_numbers(groups: Sequence[Sequence[Layer]], job: Job) -> int:
    """The numbers in a block's statistics, one triangle of each matrix."""
    widths = [group[0].cols for group in groups]
    return sum(triangle_size(cols) if job.statistic_square else cols for cols in widths)


def _kept_of_pattern(layer: Layer, pattern: str) -> int:
    keep, of = parse_pattern("plan", pattern, layer.cols)
    return layer.numel // of * keep
