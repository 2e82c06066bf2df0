"""How long a run takes at measured rates."""

from __future__ import annotations

from dataclasses import dataclass

from fedspa.planning.architecture import Kind
from fedspa.planning.flight import Flight
from fedspa.planning.job import Job
from fedspa.planning.memory import STAGES
from fedspa.planning.rates import Rates, gathering_work, pruning_work
from fedspa.planning.traffic import statistic_numbers


@dataclass(frozen=True)
class Duration:
    """Seconds by stage; `moving`: what blocks and hidden states take meanwhile; `total` of all."""

    stages: dict[str, float]
    moving: float
    total: float


def estimate(job: Job, placement: str, rates: Rates) -> Duration:
    """Seconds of a run, from what each stage computes and moves.

    Blocks are read, and hidden states read and written, while others are computed: the longer of
    the two counts.
    """
    model = job.architecture
    stages = dict.fromkeys(STAGES, 0.0)
    for kind, flight in zip(model.kinds, job.flights, strict=True):
        for stage, seconds in _block(job, kind, flight, rates).items():
            stages[stage] += kind.count * seconds
    # What leaves the last block is of no use.
    stages["propagate"] *= (model.block_count - 1) / model.block_count
    stages["embed"] = model.outside[0] / rates.read if job.needs_inputs else 0.0
    stages["write"] = model.nbytes / rates.write
    moving = _moving(job, placement, rates)
    computing = sum(stages[stage] for stage in STAGES if stage not in ("embed", "write"))
    total = stages["embed"] + max(computing, moving) + stages["write"]
    return Duration(stages, moving, total)


def _block(job: Job, kind: Kind, flight: Flight, rates: Rates) -> dict[str, float]:
    """Seconds of one block for all clients that the busiest rank walks."""
    tokens = job.samples_here * job.seqlen
    clients, prunable = job.clients_here, kind.prunable
    # Each token meets half of the others, twice: for its scores, and for what they weigh.
    attention = 2.0 * tokens * job.seqlen * job.architecture.width
    products = 2.0 * tokens * prunable + attention
    # The last layer's product is not needed for its input.
    last = 2.0 * tokens * sum(layer.numel for layer in flight.groups[-1])
    gather = sum(gathering_work(group[0].cols, tokens, job) for group in flight.groups)
    work = [pruning_work(group, job) for group in flight.groups]
    # Ranks that share statistics share the groups out among them.
    shared = job.split == "samples" or job.sums_statistics
    pruned = max(max(work), sum(work) / job.ranks) if shared else sum(work)
    times, statistics = clients, 0
    if job.sums_statistics:
        # Packed, added and unpacked: a number takes about as long as a weight does.
        times, statistics = 1, clients * statistic_numbers(flight.groups, job)
    seconds = {
        "prune": times * pruned / rates.prune,
        "aggregate": (times * prunable + statistics) / rates.add + prunable / rates.agree,
    }
    if job.needs_inputs:
        gathered = gather / rates.gather
        seconds["calibrate"] = clients * ((products - last) / rates.product + gathered)
        seconds["propagate"] = clients * job.walks * products / rates.product
    return seconds


def _moving(job: Job, placement: str, rates: Rates) -> float:
    """Seconds of reading all blocks, and of hidden states on their way between the blocks."""
    model = job.architecture
    blocks = sum(kind.count * kind.nbytes for kind in model.kinds)
    disk = blocks / rates.read
    hidden = job.hidden * model.block_count
    # Every generation goes to the disk, so that a killed run can go on with it.
    disk += hidden * job.ranks / rates.write
    copied = 0.0
    if placement == "disk":
        disk += 2 * hidden * job.ranks / rates.read
    if job.device == "cuda":
        # To the card twice, where they do not stay, and back once.
        copied = (blocks + hidden * (1 if placement == "gpu" else 3)) / rates.copy
    return max(disk, copied)
