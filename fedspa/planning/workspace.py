"""What the operators hold beside their arguments: bytes at the worst moment of a call."""

from __future__ import annotations

from collections.abc import Sequence

from fedspa.planning.architecture import Layer
from fedspa.planning.job import Job
from fedspa.planning.traffic import statistic_numbers
from fedspa.sums import PANEL
from fedspa_kernels.hessian import kernel as hessian
from fedspa_kernels.obs import kernel as obs

FLOAT = 4
# Bytes of a number in fixed point.
WHOLE = 8
# Numbers that the CPU's Hessian packs at a time, and tokens that Wanda squares at a time.
PACKED = 2**18
SQUARED = 512


def statistics(groups: Sequence[Sequence[Layer]], job: Job) -> int:
    """One statistic for every group of layers: (cols, cols) float32, or (cols,)."""
    if not job.needs_inputs:
        return 0
    widths = [group[0].cols for group in groups]
    return FLOAT * sum(cols * cols if job.statistic_square else cols for cols in widths)


def totals(groups: Sequence[Sequence[Layer]], job: Job) -> int:
    """The sums of all clients' statistics, one triangle of each matrix."""
    return (WHOLE if job.fixed_point else FLOAT) * statistic_numbers(groups, job)


def gathered(groups: Sequence[Sequence[Layer]], job: Job) -> int:
    """The statistics of one client while it gathers them."""
    return statistics(groups, job) * (2 if job.fixed_point else 1)


def gather(groups: Sequence[Sequence[Layer]], job: Job) -> int:
    """Adding a batch to a statistic."""
    cols = max(group[0].cols for group in groups)
    if job.fixed_point:
        # A batch's own, and rows of it as float64 and as whole numbers.
        rows = min(cols, PANEL) if job.statistic_square else 1
        return FLOAT * cols * (cols if job.statistic_square else 1) + 2 * WHOLE * rows * cols
    if job.statistic_square:
        if job.device == "cpu":
            return FLOAT * PACKED
        # A panel's product in float32, before it is added.
        return FLOAT * cols * min(cols, hessian.PANEL["cuda"]) if job.element < FLOAT else 0
    return 2 * FLOAT * SQUARED * cols if job.device == "cpu" else 0


def pruning(group: Sequence[Layer], job: Job) -> int:
    """Pruning the layers of one statistic, what is returned included."""
    results = sum(pruned(layer, job) for layer in group)
    # A kernel wants contiguous rows.
    turned = sum(layer.numel * job.element for layer in group if layer.turned)
    if not job.statistic_square:
        return results + turned
    return results + turned + _surgeon(group, job.device)


def _surgeon(group: Sequence[Layer], device: str) -> int:
    """The change, the factor, and the products of a sweep, without its results."""
    cols = group[0].cols
    rows = sum(layer.rows for layer in group)
    block, panel = min(cols, obs.WIDEST), min(cols, obs.PANEL)
    change = FLOAT * rows * cols
    factor = FLOAT * cols * cols
    inverses = FLOAT * cols * block
    # Errors of a panel, twice where the next is made before the last is let go; three of a block.
    sweep = FLOAT * rows * (panel * min(2, cols // panel) + 3 * block)
    # The right side of a product, packed, on a CPU; a second stack of triangles on a GPU.
    sweep += FLOAT * cols * panel if device == "cpu" else inverses
    # The library's Cholesky needs its argument beside its result.
    whole = factor if device == "cuda" else 0
    return change + factor + max(whole, inverses + sweep)


def pruned(layer: Layer, job: Job) -> int:
    """A pruned weight with its mask of a byte each."""
    return layer.numel * (job.element + 1)


def sums(layers: Sequence[Layer], job: Job) -> int:
    """The server's: a float32 total and int32 votes, and float32 importances where they differ."""
    weighted = job.settings.weighed == "samples" and job.settings.aggregation in ("l0", "mean")
    each = FLOAT * (3 if weighted and job.samples > 1 else 2)
    return each * sum(layer.numel for layer in layers)


def average(layer: Layer, device: str) -> int:
    """Averaging one layer, without the result."""
    # On a GPU the quotient, where somebody kept it, and the choice between it and 0.
    return 0 if device == "cpu" else layer.numel * (2 * FLOAT + 1)
