"""One decoder block: its clients prune it, or gather statistics of it, and the server agrees."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from fedspa import client as local
from fedspa import server
from fedspa.blocks import lent, unpacked, views
from fedspa.calibration import BlockTask, calibrate, sum_statistics
from fedspa.members import Member, Run, goes_on
from fedspa.pruners import additive_kind
from fedspa.ranks import Ranks
from fedspa.ranks import alone as one_rank
from fedspa.report import LayerResult
from fedspa.schedule import message_dtype, round_target
from fedspa.statistics import BlockStatistics
from fedspa.sums import FixedPoint

# The first word of sentences about what is pruned with everybody's statistics.
SERVER = "the server"


def run_block(run: Run, round_index: int, index: int, *, ahead: bool, follow: bool) -> None:
    """Let the clients that drew a block work on it one after the other, then agree on it.

    ahead: the clients then walk on before the server has agreed: through what each made of the
        block, or, where it only gathered statistics, through the block as it was.
    follow: they walk on through what was agreed on. At most one of both.
    """
    taking_part = [member for member in run.order if index in member.drawn[-1]]
    if not taking_part and not any(goes_on(run, member, index) for member in run.order):
        return
    with run.blocks.open(index) as block:
        if run.settings.aggregation == "statistics":
            sums, clients = _add_statistics(run, block, taking_part, round_index, index, ahead)
        else:
            sums, clients = _add_weights(run, block, taking_part, round_index, index, ahead)
        for member in run.walked:
            if member not in taking_part and (ahead or follow):
                pass_by(run, block, member, index)
        if not taking_part:
            return
        with run.clock.stage("aggregate"):
            _agree(run, sums, clients, taking_part, round_index, index)
        if follow:
            for member in run.walked:
                if member in taking_part:
                    propagate(run, block, member, index)


def walk_again(run: Run, index: int, last: int) -> None:
    """Move clients past a block that was agreed on, as it is now.

    last: the block up to which they walk; whoever needs nothing behind it stays.
    """
    going = [member for member in run.walked if goes_on(run, member, last)]
    if not going:
        return
    with run.blocks.open(index) as block:
        for member in going:
            if index in member.drawn[-1]:
                propagate(run, block, member, index)
            else:
                pass_by(run, block, member, index)


def _add_weights(
    run: Run, block: nn.Module, taking_part: list[Member], round_index: int, index: int, ahead: bool
) -> tuple[server.BlockAggregation, int]:
    """Add up what clients pruned by themselves; returns the sums and how many clients they hold."""
    sums = server.BlockAggregation(views(block), run.settings)
    for member in run.walked:
        if member not in taking_part:
            continue
        result = _prune_locally(run, block, member, round_index, index)
        run.progress.stage("aggregate", member.name)
        with run.clock.stage("aggregate"):
            sums.add(result.message)
        if ahead:
            with lent(block, result.weights):
                propagate(run, block, member, index)
        # Otherwise it would live until the next client has its own.
        del result
    if taking_part and run.ranks.split == "clients":
        with run.clock.stage("aggregate"):
            sums.add_other_ranks(run.ranks)
    return sums, sums.clients


def _add_statistics(
    run: Run, block: nn.Module, taking_part: list[Member], round_index: int, index: int, ahead: bool
) -> tuple[server.BlockAggregation, int]:
    """Prune once with the sum of all clients' statistics: the server is a client of its own.

    returns: the sums of that one client, and how many clients sent statistics
    """
    names = [member.name for member in taking_part]
    kind = additive_kind(run.pruner)
    found = BlockStatistics(views(block), kind, round_index, index, names, run.open_sum)
    for member in run.walked:
        if member in taking_part:
            _gather_locally(run, block, member, found, len(names), round_index, index)
            if ahead:
                propagate(run, block, member, index)
    alone = replace(
        run.settings,
        aggregation="l0",
        schedule="one-shot",
        synchronize_every=None,
        weighting="uniform",
        statistics_dtype="float32",
    )
    pruned = server.BlockAggregation(views(block), alone)
    if not taking_part:
        return pruned, 0
    if run.ranks.split == "clients":
        with run.clock.stage("aggregate"):
            found.add_other_ranks(run.ranks)
    # Nothing travels yet, and so nothing is rounded.
    task = replace(_task(run, round_index, index, None), message_dtype=None)
    run.progress.stage("prune")
    with run.clock.stage("prune"):
        result = local.prune(
            SERVER,
            found.samples,
            block,
            found.statistics(),
            task,
            run.pruner,
            run.ranks,
            who=SERVER,
        )
    clients = found.clients
    # A hessian may be larger than all weights that it prunes.
    del found
    with run.clock.stage("aggregate"):
        pruned.add(result.message)
    return pruned, clients


def _gather_locally(
    run: Run,
    block: nn.Module,
    member: Member,
    sums: BlockStatistics,
    clients: int,
    round_index: int,
    index: int,
) -> None:
    """Let a client, one of so many, send its statistics of a block."""
    task = _task(run, round_index, index, member.client.sparsity)
    run.progress.stage("calibrate", member.name)
    with run.clock.stage("calibrate"):
        pruner = run.pruner
        if run.settings.statistics_dtype == "int64":
            pruner = FixedPoint(pruner, clients)
        sharing = _sharing_samples(run)
        # What another client's tokens reach is enough, but ranks must add up the same layers.
        every = sharing.size > 1
        found = calibrate(member.name, block, member.stream, task, pruner, every_layer=every)
        found = sum_statistics(found, sharing)
        message = sums.message(member.name, member.samples, found)
    member.bytes_up += message.nbytes
    if run.observe is not None:
        run.observe(message)
    run.progress.stage("aggregate", member.name)
    with run.clock.stage("aggregate"):
        sums.add(message)


def _prune_locally(
    run: Run, block: nn.Module, member: Member, round_index: int, index: int
) -> local.LocalResult:
    task = _task(run, round_index, index, member.client.sparsity)
    together = _sharing_samples(run)
    run.progress.stage("calibrate", member.name)
    with run.clock.stage("calibrate"):
        found = calibrate(member.name, block, member.stream, task, run.pruner)
        found = sum_statistics(found, together)
    run.progress.stage("prune", member.name)
    with run.clock.stage("prune"):
        result = local.prune(
            member.name, member.samples, block, found.statistics, task, run.pruner, together
        )
    member.bytes_up += result.message.nbytes
    member.loss += result.loss
    member.pruned += sum(layer.pruned for layer in result.message.layers.values())
    member.weights += sum(weight.numel() for weight in result.weights.values())
    if run.observe is not None:
        run.observe(result.message)
    return result


def _task(run: Run, round_index: int, index: int, sparsity: float | None) -> BlockTask:
    """What a block must reach, for a client with a sparsity of its own."""
    settings = run.settings
    return BlockTask(
        round=round_index,
        block=index,
        name=run.blocks.names[index],
        target=round_target(settings, round_index, sparsity),
        support=_support(run, index),
        message_dtype=message_dtype(settings),
        mask_only=settings.aggregation == "mask",
    )


def _sharing_samples(run: Run) -> Ranks:
    """The ranks that each hold a part of a client's windows."""
    return run.ranks if run.ranks.split == "samples" else one_rank()


def _support(run: Run, index: int) -> dict[str, Tensor] | None:
    """The masks that former rounds agreed on, or None where the block is still dense."""
    if index not in run.agreed:
        return None
    return unpacked(run.blocks.masks(index), run.blocks.device)


def _agree(
    run: Run,
    sums: server.BlockAggregation,
    clients: int,
    taking_part: list[Member],
    round_index: int,
    index: int,
) -> None:
    """Aggregate a block, send it to its clients, and make it the model's."""
    target = round_target(run.settings, round_index)
    agreed = sums.agree(target)
    message = server.pack_block(agreed, round_index, index, run.settings)
    run.blocks.keep(index, server.received_weights(message, agreed), message)
    run.agreed[index] = round_index
    run.sent[index] = message.nbytes
    for member in taking_part:
        member.holds[index] = round_index
        member.bytes_down += message.nbytes
    statistics = run.settings.aggregation == "statistics"
    for name, layer in agreed.items():
        run.layers.append(
            LayerResult(
                round=round_index,
                block=index,
                layer=name,
                shape=tuple(layer.mask.shape),
                clients=clients,
                sparsity=1 - layer.kept / layer.mask.numel(),
                # With sums of statistics nobody has voted.
                votes=() if statistics else layer.histogram,
            )
        )


def pass_by(run: Run, block: nn.Module, member: Member, index: int) -> None:
    """Move a client past a block that it did not draw, which it takes dense from its own cache."""
    if not goes_on(run, member, index):
        return
    if index in run.agreed:
        with lent(block, run.blocks.pretrained(index)):
            propagate(run, block, member, index)
    else:
        propagate(run, block, member, index)


def propagate(run: Run, block: nn.Module, member: Member, index: int) -> None:
    """Move a client's hidden states past a block, unless none of its blocks needs them any more."""
    if not goes_on(run, member, index):
        return
    run.progress.stage("propagate", member.name)
    with run.clock.stage("propagate"):
        local.propagate(block, member.stream, index)
