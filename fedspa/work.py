"""A member's part of a decoder block: calibrate, prune or gather, say what came of it, walk on.

The same for a member of this process and for one that is its own process at a client's site.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fedspa import client as local
from fedspa.blocks import lent, unpacked
from fedspa.calibration import BlockTask, calibrate, sum_statistics
from fedspa.members import Member, Run, goes_on
from fedspa.messages import BlockMessage, StatisticsMessage
from fedspa.ranks import Ranks
from fedspa.ranks import alone as one_rank
from fedspa.schedule import message_dtype, round_target
from fedspa.statistics import BlockStatistics
from fedspa.sums import FixedPoint

# Takes what a client sends: adds it up, or lets it travel.
Send = Callable[[BlockMessage | StatisticsMessage], None]


def prune_and_send(
    run: Run,
    block: nn.Module,
    member: Member,
    round_index: int,
    index: int,
    send: Send,
    *,
    ahead: bool,
) -> None:
    """Prune a block that a member drew with its own data, and send the result.

    ahead: it then walks on through what it made of the block.
    """
    task = task_of(run, round_index, index, member.client.sparsity)
    together = sharing_samples(run)
    run.progress.stage("calibrate", member.name)
    with run.clock.stage("calibrate"):
        found = calibrate(member.name, block, member.stream, task, run.pruner)
        found = sum_statistics(found, together)
    run.progress.stage("prune", member.name)
    with run.clock.stage("prune"):
        result = local.prune(
            member.name, member.samples, block, found.statistics, task, run.pruner, together
        )
    # A hessian may be larger than all weights that it prunes.
    del found
    send(result.message)
    if ahead:
        with lent(block, result.weights):
            propagate(run, block, member, index)


def gather_and_send(
    run: Run,
    block: nn.Module,
    member: Member,
    round_index: int,
    index: int,
    sums: BlockStatistics,
    send: Send,
    *,
    ahead: bool,
) -> None:
    """Send what the pruner gathers of a block that a member drew.

    sums: those that it will be added to. ahead: it then walks on through the block as it was.
    """
    task = task_of(run, round_index, index, member.client.sparsity)
    run.progress.stage("calibrate", member.name)
    with run.clock.stage("calibrate"):
        pruner = run.pruner
        if run.settings.statistics_dtype == "int64":
            pruner = FixedPoint(pruner, len(sums.expected))
        sharing = sharing_samples(run)
        # What another client's tokens reach is enough, but ranks must add up the same layers.
        every = sharing.size > 1
        found = calibrate(member.name, block, member.stream, task, pruner, every_layer=every)
        found = sum_statistics(found, sharing)
        message = sums.message(member.name, member.samples, found)
    del found
    send(message)
    if ahead:
        propagate(run, block, member, index)


def pass_by(run: Run, block: nn.Module, member: Member, index: int) -> None:
    """Move a member past a block that it did not draw, which it takes dense from its own cache."""
    if not goes_on(run, member, index):
        return
    if index in run.agreed:
        with lent(block, run.blocks.pretrained(index)):
            propagate(run, block, member, index)
    else:
        propagate(run, block, member, index)


def propagate(run: Run, block: nn.Module, member: Member, index: int) -> None:
    """Move a member's hidden states past a block, unless none of its blocks needs them any more."""
    if not goes_on(run, member, index):
        return
    run.progress.stage("propagate", member.name)
    with run.clock.stage("propagate"):
        local.propagate(block, member.stream, index)


def walk_again(run: Run, index: int, last: int) -> None:
    """Move members past a block that was agreed on, as it is now.

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


def task_of(run: Run, round_index: int, index: int, sparsity: float | None) -> BlockTask:
    """What a block must reach, for a client with a sparsity of its own."""
    settings = run.settings
    return BlockTask(
        round=round_index,
        block=index,
        name=run.blocks.names[index],
        target=round_target(settings, round_index, sparsity),
        support=support_of(run, index),
        message_dtype=message_dtype(settings),
        mask_only=settings.aggregation == "mask",
    )


def support_of(run: Run, index: int) -> dict[str, Tensor] | None:
    """The masks that former rounds agreed on, or None where the block is still dense."""
    if index not in run.agreed:
        return None
    return unpacked(run.blocks.masks(index), run.blocks.device)


def sharing_samples(run: Run) -> Ranks:
    """The ranks that each hold a part of a client's windows."""
    return run.ranks if run.ranks.split == "samples" else one_rank()
