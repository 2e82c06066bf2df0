"""One decoder block: its clients prune it, or gather statistics of it, and the server agrees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from fedspa import client as local
from fedspa import server
from fedspa.accounts import Sent, Share, note, settle
from fedspa.blocks import views
from fedspa.members import Add, Member, Run, goes_on
from fedspa.messages import BlockMessage, StatisticsMessage
from fedspa.pruners import additive_kind
from fedspa.report import BlockResult, LayerResult
from fedspa.schedule import round_target
from fedspa.settings import Settings
from fedspa.statistics import BlockStatistics
from fedspa.work import gather_and_send, pass_by, propagate, prune_and_send, task_of

# The first word of sentences about what is pruned with everybody's statistics.
SERVER = "the server"


def run_block(
    run: Run, round_index: int, index: int, together: range, *, ahead: bool, follow: bool
) -> None:
    """Let the clients that drew a block work on it one after the other, then agree on it.

    together: the blocks that are exchanged with it.
    ahead: the clients then walk on before the server has agreed: through what each made of the
        block, or, where it only gathered statistics, through the block as it was.
    follow: they walk on through what was agreed on. At most one of both.
    """
    taking_part = [member for member in run.order if index in member.drawn[-1]]
    if not taking_part and not any(goes_on(run, member, index) for member in run.order):
        return
    with run.blocks.open(index) as block:
        if run.settings.aggregation == "statistics":
            collect = _collect_statistics
        else:
            collect = _collect_weights
        sums, senders = collect(run, block, taking_part, round_index, index, together, ahead)
        for member in run.walked:
            if member not in taking_part and (ahead or follow):
                pass_by(run, block, member, index)
        if not taking_part:
            return
        with run.clock.stage("aggregate"):
            _agree(run, sums, senders, taking_part, round_index, index)
        if follow:
            for member in run.walked:
                if member in taking_part:
                    propagate(run, block, member, index)


def _collect_weights(
    run: Run,
    block: nn.Module,
    taking_part: list[Member],
    round_index: int,
    index: int,
    together: range,
    ahead: bool,
) -> tuple[server.BlockAggregation, list[str]]:
    """Add up what clients pruned by themselves; returns the sums and who is in them."""
    sums = server.BlockAggregation(views(block), run.settings)
    sent: Sent = {}
    add = _adding(run, sums.add, sent)

    def work(member: Member) -> None:
        prune_and_send(run, block, member, round_index, index, add, ahead=ahead)

    _let_work(run, block, taking_part, round_index, index, together, add, work)
    settle(taking_part, sent)
    if taking_part and run.ranks.split == "clients":
        with run.clock.stage("aggregate"):
            sums.add_other_ranks(run.ranks)
        return sums, [member.name for member in taking_part]
    return sums, list(sent)


def _collect_statistics(
    run: Run,
    block: nn.Module,
    taking_part: list[Member],
    round_index: int,
    index: int,
    together: range,
    ahead: bool,
) -> tuple[server.BlockAggregation, list[str]]:
    """Prune once with the sum of all clients' statistics: the server is a client of its own.

    returns: the sums of that one client, and who sent statistics
    """
    pruned = server.BlockAggregation(views(block), _alone(run))
    while True:
        found, sent = _add_statistics(run, block, taking_part, round_index, index, together, ahead)
        if not taking_part:
            return pruned, []
        try:
            message = _prune_once(run, block, found, round_index, index)
            break
        except ValueError:
            # Numbers that are finite and no squares may still be no sum that can be pruned with.
            if run.remote is None or not run.remote.blame(
                run, block, taking_part, round_index, index
            ):
                raise
    settle(taking_part, sent)
    with run.clock.stage("aggregate"):
        pruned.add(message)
    return pruned, list(sent)


def _add_statistics(
    run: Run,
    block: nn.Module,
    taking_part: list[Member],
    round_index: int,
    index: int,
    together: range,
    ahead: bool,
) -> tuple[BlockStatistics, Sent]:
    """Add up what clients gathered; returns the sums, and what each of them sent."""
    names = [member.name for member in taking_part]
    kind = additive_kind(run.pruner)
    found = BlockStatistics(views(block), kind, round_index, index, names, run.open_sum)
    sent: Sent = {}
    add = _adding(run, found.add, sent)

    def work(member: Member) -> None:
        gather_and_send(run, block, member, round_index, index, found, add, ahead=ahead)

    _let_work(run, block, taking_part, round_index, index, together, add, work)
    if taking_part and run.ranks.split == "clients":
        with run.clock.stage("aggregate"):
            found.add_other_ranks(run.ranks)
        sent |= {name: Share() for name in names if name not in sent}
    return found, {name: sent[name] for name in names if name in sent}


def _adding(run: Run, to: Callable[[Any], None], sent: Sent) -> Add:
    """What is done with a client's message: it is added to sums, and noted."""

    def add(message: BlockMessage | StatisticsMessage) -> None:
        run.progress.stage("aggregate", message.sender)
        with run.clock.stage("aggregate"):
            to(message)
        note(run, message, sent)

    return add


def _let_work(
    run: Run,
    block: nn.Module,
    taking_part: list[Member],
    round_index: int,
    index: int,
    together: range,
    add: Add,
    work: Callable[[Member], None],
) -> None:
    """Add what clients elsewhere sent, and let those that are walked here work one by one."""
    if run.remote is not None:
        run.remote.collect(run, block, taking_part, round_index, index, together, add)
    for member in run.walked:
        if member in taking_part:
            work(member)


def _prune_once(
    run: Run, block: nn.Module, found: BlockStatistics, round_index: int, index: int
) -> BlockMessage:
    """What the server makes of the sum of statistics, which it lets go."""
    # Nothing travels yet, and so nothing is rounded.
    task = replace(task_of(run, round_index, index, None), message_dtype=None)
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
    return result.message


def _alone(run: Run) -> Settings:
    """The settings under which the server aggregates its own result."""
    return replace(
        run.settings,
        aggregation="l0",
        schedule="one-shot",
        synchronize_every=None,
        weighting="uniform",
        statistics_dtype="float32",
    )


def _agree(
    run: Run,
    sums: server.BlockAggregation,
    senders: list[str],
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
    left_out = {}
    if run.remote is not None:
        left_out = run.remote.agreed(run, message)
    else:
        for member in taking_part:
            member.holds[index] = round_index
            member.bytes_down += message.nbytes
    run.results.append(BlockResult(round_index, index, tuple(senders), left_out))
    statistics = run.settings.aggregation == "statistics"
    for name, layer in agreed.items():
        run.layers.append(
            LayerResult(
                round=round_index,
                block=index,
                layer=name,
                shape=tuple(layer.mask.shape),
                clients=len(senders),
                sparsity=1 - layer.kept / layer.mask.numel(),
                # With sums of statistics nobody has voted.
                votes=() if statistics else layer.histogram,
            )
        )
