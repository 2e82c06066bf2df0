"""A round: clients draw blocks, prune them locally, and the server agrees (FedSpaLLM, alg. 1).

All clients walk the decoder blocks side by side, so that one block's weights and sums are all that
is held: a client that walked the whole model alone would send the very same messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from fedspa import client as local
from fedspa import server
from fedspa.batches import choose_batch
from fedspa.blocks import Blocks, lent, unpacked, views
from fedspa.clock import StageClock
from fedspa.data import Client
from fedspa.events import BlockProgress
from fedspa.messages import BlockMessage
from fedspa.pruners import Pruner
from fedspa.ranks import Ranks, alone
from fedspa.report import LayerResult
from fedspa.settings import Settings, message_dtype, round_target
from fedspa.walk import Stream, embed

Observer = Callable[[BlockMessage], None]


@dataclass(eq=False)
class Member:
    """A client in a run, with its hidden states and its account with the server.

    tokens: of several ranks that split the samples this one's windows, else all of the client's.
    """

    client: Client
    name: str
    stream: Stream = field(default_factory=lambda: Stream([], {}))
    tokens: Tensor | None = None
    drawn: list[tuple[int, ...]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    pruned: int = 0
    weights: int = 0
    loss: float = 0.0
    # The round whose version of a block the client holds; it starts with the pretrained model.
    holds: dict[int, int] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Calibration windows, those of all ranks."""
        return self.client.tokens.shape[0]

    @property
    def windows(self) -> Tensor:
        """Calibration windows that this rank walks, (windows, length) int64."""
        return self.client.tokens if self.tokens is None else self.tokens


@dataclass
class Run:
    """What lasts from block to block.

    order: the members in the order in which they are aggregated; walked: those of them that this
    rank walks. agreed: for every block that was pruned the round of its last broadcast; sent: its
    bytes. block_done: called with the round and the block that were finished.
    """

    model: nn.Module
    blocks: Blocks
    settings: Settings
    pruner: Pruner
    members: list[Member]
    order: list[Member]
    observe: Observer | None
    clock: StageClock
    progress: BlockProgress = field(default_factory=lambda: BlockProgress(1, 1, {}))
    ranks: Ranks = field(default_factory=alone)
    walked: list[Member] = field(default_factory=list)
    agreed: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    layers: list[LayerResult] = field(default_factory=list)
    block_done: Callable[[int, int], None] | None = None


def block_counts(members: Sequence[Member], blocks: int, settings: Settings) -> list[int]:
    """How many blocks each client prunes a round, by its capacity."""
    capacities = [member.client.capacity for member in members]
    return server.blocks_per_client(capacities, blocks, settings.layers_per_client)


def draw_blocks(run: Run, round_index: int) -> list[list[int]]:
    """The blocks of a round for every member, in the order of `run.order`."""
    settings = run.settings
    counts = block_counts(run.order, len(run.blocks), settings)
    seed = f"{settings.seed}/{round_index}"
    return server.sample_blocks(counts, len(run.blocks), seed, settings.every_block)


def run_round(run: Run, round_index: int, first: int = 0) -> None:
    """One round: draw blocks, then agree on each block in turn.

    first: the block to go on with; where it is not 0, the members' accounts and hidden states
    are those of the run that was interrupted there.
    """
    if first == 0:
        for member, mine in zip(run.order, draw_blocks(run, round_index), strict=True):
            member.drawn.append(tuple(mine))
            _download(run, member, mine)
        embed_all(run)
    for index in range(first, len(run.blocks)):
        _run_block(run, round_index, index)
        run.progress.block_done(round_index, index)
        if run.block_done is not None:
            run.block_done(round_index, index)


def embed_all(run: Run) -> None:
    """Give every member that this rank walks the hidden states that enter the first block."""
    if not run.pruner.needs_inputs:
        return
    with run.blocks.embedding():
        for member in run.walked:
            run.progress.stage("embed", member.name)
            with run.clock.stage("embed"):
                tokens, batch = member.windows, batch_of(run, member)
                embed(
                    run.model,
                    run.blocks.modules,
                    tokens,
                    batch,
                    device=run.blocks.device,
                    stream=member.stream,
                )


def restore_arguments(run: Run) -> None:
    """Give the members what their blocks are called with; hidden states come from elsewhere."""
    if not run.pruner.needs_inputs:
        return
    with run.blocks.embedding():
        for member in run.walked:
            tokens, batch = member.windows, batch_of(run, member)
            # The arguments depend on a batch's size alone, and the last may have one of its own.
            for part in (tokens[:batch], tokens[len(tokens) // batch * batch :]):
                if len(part):
                    once = embed(
                        run.model, run.blocks.modules, part, batch, device=run.blocks.device
                    )
                    member.stream.arguments.update(once.arguments)


def batch_of(run: Run, member: Member) -> int:
    """How many of a member's windows go through a block at once."""
    length = member.client.tokens.shape[1]
    return run.settings.batch_size or choose_batch(run.model, length, device=run.blocks.device)


def _run_block(run: Run, round_index: int, index: int) -> None:
    """Let the clients that drew a block prune it one after the other, then agree."""
    taking_part = [member for member in run.order if index in member.drawn[-1]]
    if not taking_part and not any(goes_on(run, member, index) for member in run.order):
        return
    with run.blocks.open(index) as block:
        current = views(block)
        sums = server.BlockAggregation(current, run.settings)
        for member in run.walked:
            if member not in taking_part:
                _pass_by(run, block, member, index)
                continue
            result = _prune_locally(run, block, member, round_index, index)
            run.progress.stage("aggregate", member.name)
            with run.clock.stage("aggregate"):
                sums.add(result.message)
            if run.settings.schedule == "one-shot":
                with lent(block, result.weights):
                    _propagate(run, block, member, index)
            # Otherwise it would live until the next client has its own.
            del result
        if not taking_part:
            return
        with run.clock.stage("aggregate"):
            if run.ranks.split == "clients":
                sums.add_other_ranks(run.ranks)
            _agree(run, sums, taking_part, round_index, index)
        if run.settings.schedule == "synchronous":
            for member in run.walked:
                if member in taking_part:
                    _propagate(run, block, member, index)


def _prune_locally(
    run: Run, block: nn.Module, member: Member, round_index: int, index: int
) -> local.LocalResult:
    settings = run.settings
    task = local.BlockTask(
        round=round_index,
        block=index,
        name=run.blocks.names[index],
        target=round_target(settings, round_index, member.client.sparsity),
        support=_support(run, index),
        message_dtype=message_dtype(settings),
        mask_only=settings.aggregation == "mask",
    )
    together = run.ranks if run.ranks.split == "samples" else alone()
    run.progress.stage("calibrate", member.name)
    with run.clock.stage("calibrate"):
        statistics = local.calibrate(member.name, block, member.stream, task, run.pruner)
        local.sum_statistics(statistics, together)
    run.progress.stage("prune", member.name)
    with run.clock.stage("prune"):
        result = local.prune(
            member.name, member.samples, block, statistics, task, run.pruner, together
        )
    member.bytes_up += result.message.nbytes
    member.loss += result.loss
    member.pruned += sum(layer.pruned for layer in result.message.layers.values())
    member.weights += sum(weight.numel() for weight in result.weights.values())
    if run.observe is not None:
        run.observe(result.message)
    return result


def _support(run: Run, index: int) -> dict[str, Tensor] | None:
    """The masks that former rounds agreed on, or None where the block is still dense."""
    if index not in run.agreed:
        return None
    return unpacked(run.blocks.masks(index), run.blocks.device)


def _agree(
    run: Run,
    sums: server.BlockAggregation,
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
    for name, layer in agreed.items():
        run.layers.append(
            LayerResult(
                round=round_index,
                block=index,
                layer=name,
                shape=tuple(layer.mask.shape),
                clients=sums.clients,
                sparsity=1 - layer.kept / layer.mask.numel(),
                votes=layer.histogram,
            )
        )


def _download(run: Run, member: Member, mine: Sequence[int]) -> None:
    """Count what a client must fetch before a round: blocks that it has an older version of."""
    for index in mine:
        if index in run.agreed and member.holds.get(index) != run.agreed[index]:
            member.bytes_down += run.sent[index]
            member.holds[index] = run.agreed[index]


def _pass_by(run: Run, block: nn.Module, member: Member, index: int) -> None:
    """Move a client past a block that it did not draw, which it takes dense from its own cache."""
    if not goes_on(run, member, index):
        return
    if index in run.agreed:
        with lent(block, run.blocks.pretrained(index)):
            _propagate(run, block, member, index)
    else:
        _propagate(run, block, member, index)


def goes_on(run: Run, member: Member, index: int) -> bool:
    """Whether a client still needs its hidden states behind a block."""
    return run.pruner.needs_inputs and index < max(member.drawn[-1])


def _propagate(run: Run, block: nn.Module, member: Member, index: int) -> None:
    """Move a client's hidden states past a block, unless none of its blocks needs them any more."""
    if not goes_on(run, member, index):
        return
    run.progress.stage("propagate", member.name)
    with run.clock.stage("propagate"):
        local.propagate(block, member.stream, index)
