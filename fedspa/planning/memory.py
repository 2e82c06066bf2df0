"""What each stage of a run needs at its worst moment: on a GPU, in main memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from fedspa.planning import workspace
from fedspa.planning.architecture import Kind
from fedspa.planning.flight import Flight
from fedspa.planning.job import Job
from fedspa.planning.traffic import (
    kept_by_client,
    kept_by_server,
    message_bytes,
    statistics_bytes,
)

STAGES = ("embed", "calibrate", "prune", "aggregate", "propagate", "write")
# Beside tensors, as measured on current GPUs: a CUDA context on the card, and in main memory.
CONTEXT = 600 * 10**6
CONTEXT_HOST = 2 * 10**9
# Tensors are written in pieces, of which a few are there at once.
PIECES = 16 * 2**20


@dataclass(frozen=True)
class Need:
    """Bytes at the worst moment of a stage: on one GPU, in main memory of all ranks, on disk."""

    gpu: int
    host: int
    disk: int


def needs(job: Job, placement: str) -> dict[str, Need]:
    """Every stage's need with the hidden states in one place: "gpu", "host" or "disk".

    Ranks are taken to share a machine.
    """
    pairs = list(zip(job.architecture.kinds, job.flights, strict=True))
    worst = {
        stage: max(_tensors(job, kind, flight, placement)[stage] for kind, flight in pairs)
        for stage in STAGES
    }
    disk = _disk(job)
    return {stage: _place(job, placement, worst[stage], disk[stage]) for stage in STAGES}


def most(stages: dict[str, Need]) -> Need:
    """The worst of all stages, of each kind of memory."""
    found = stages.values()
    return Need(max(n.gpu for n in found), max(n.host for n in found), max(n.disk for n in found))


def _tensors(job: Job, kind: Kind, flight: Flight, placement: str) -> dict[str, int]:
    """Bytes of tensors where a kind of block is computed, in every stage."""
    held = _hidden_there(job, flight, placement)
    weights = kind.nbytes + flight.arguments
    layers, groups = kind.layers, flight.groups
    sums = workspace.sums(layers, job)
    gathered = workspace.statistics(groups, job)
    # The sums are made when the first client's message comes.
    added = workspace.totals(groups, job) if job.sums_statistics else sums
    before = weights + held + (added if job.clients_here > 1 else 0)
    pruned = sum(layer.numel for layer in layers) * job.element
    sent = sum(message_bytes(x, kept_by_client(x, job.settings), job) for x in layers)
    lent = 0
    if job.exchanged > 1 and not job.sums_statistics:
        lent = pruned + sent + sum(x.numel * job.element for x in layers if x.turned)
    stages = dict.fromkeys(STAGES, 0)
    if job.sums_statistics:
        # The server prunes once, while the sums that it unpacked are still there.
        stages["prune"] = weights + held + added + gathered + _prune(job, flight, pruned, sent)
    else:
        stages["prune"] = before + gathered + _prune(job, flight, pruned, sent)
    stages["aggregate"] = (
        weights + held + sums + max(_add(job, kind, pruned + sent), _agree(job, kind))
    )
    stages["write"] = weights
    if job.needs_inputs:
        stages["embed"] = weights + job.architecture.outside[0] + held + 2 * flight.hidden
        in_pass = flight.calibrate + workspace.gather(groups, job)
        found = workspace.gathered(groups, job)
        stages["calibrate"] = before + found + in_pass
        if job.sums_statistics:
            message = weights + held + found + added + statistics_bytes(groups, job)
            stages["calibrate"] = max(stages["calibrate"], message)
        held_sums = added if job.sums_statistics and job.exchanged > 1 else sums
        stages["propagate"] = weights + held + held_sums + lent + flight.propagate
    return stages


def _prune(job: Job, flight: Flight, pruned: int, sent: int) -> int:
    """One client's layers, group by group, and then as a message."""
    done, worst = 0, 0
    for group in flight.groups:
        worst = max(worst, done + workspace.pruning(group, job))
        done += sum(workspace.pruned(layer, job) for layer in group)
    packing = done + sent
    if job.message_dtype_differs:
        packing += max(x.numel for group in flight.groups for x in group) * job.sent_element
    return max(worst, packing)


def _add(job: Job, kind: Kind, result: int) -> int:
    """A client's message joins the sums, layer by layer."""
    largest = max(layer.numel for layer in kind.layers)
    unpacked = 1 if job.settings.aggregation == "mask" else job.sent_element + 1
    return result + largest * unpacked


def _agree(job: Job, kind: Kind) -> int:
    """Average and expand layer by layer, then pack what was agreed."""
    made, worst = 0, 0
    for layer in kind.layers:
        weight = layer.numel * job.element
        worst = max(worst, made + weight + workspace.average(layer, job.device))
        # With its mask and its scores, which wait until all layers' checks are read together.
        made += workspace.pruned(layer, job) + weight
    worst = max(worst, made)
    done = sum(workspace.pruned(layer, job) for layer in kind.layers)
    packed = sum(message_bytes(x, kept_by_server(x, job.settings), job) for x in kind.layers)
    received = 0
    if job.message_dtype_differs:
        received = sum(layer.numel for layer in kind.layers) * job.sent_element
    return max(worst, done + packed + received)


def _hidden_there(job: Job, flight: Flight, placement: str) -> int:
    """Hidden states where blocks are computed: all, or those that come, are used and go."""
    if not job.needs_inputs:
        return 0
    if _in_place(job, placement):
        return job.held_hidden + flight.hidden
    return min(2 * flight.hidden, job.hidden)


def _in_place(job: Job, placement: str) -> bool:
    return placement == "gpu" or (placement == "host" and job.device == "cpu")


def _place(job: Job, placement: str, tensors: int, disk: int) -> Need:
    """Main memory: the process, windows, the next block, and what is not on a GPU."""
    tokens = 8 * job.clients * job.samples * job.seqlen
    kinds = job.architecture.kinds
    ahead = max(kind.nbytes for kind in kinds) if job.architecture.block_count > 1 else 0
    host = job.process + tokens + ahead + PIECES
    if job.device == "cpu":
        return Need(0, job.ranks * (host + tensors), disk)
    host += CONTEXT_HOST + 2 * job.flights[0].hidden
    if placement == "host":
        host += job.held_hidden
    return Need(tensors, job.ranks * host, disk)


def _disk(job: Job) -> dict[str, int]:
    """Bytes in the output's folder while each stage runs, shards and what a killed run leaves.

    Hidden states of two generations: the former is removed when the state names the later. Where
    clients go back, those that they go back to as well, and the weights that they walk through.
    """
    written = job.architecture.nbytes
    if job.goes_back:
        written += sum(kind.count * kind.prunable for kind in job.architecture.kinds) * job.element
    hidden = job.hidden * job.ranks
    masks = sum(
        k.count * x.rows * ceil(x.cols / 8) for k in job.architecture.kinds for x in k.layers
    )
    stages = dict.fromkeys(STAGES, written + hidden + masks)
    stages["embed"] = written + hidden
    stages["propagate"] = written + (3 if job.goes_back else 2) * hidden + masks
    # The masks of all blocks are merged into one file.
    stages["write"] = written + hidden + 2 * masks
    return stages
