"""A round: clients draw blocks, prune them locally, and the server agrees (FedSpaLLM, alg. 1).

All clients walk the decoder blocks side by side, so that one block's sums are all that the server
holds: a client that walked the whole model alone would send the very same messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from fedspa import client as local
from fedspa import server
from fedspa.batches import choose_batch
from fedspa.clock import StageClock
from fedspa.data import Client
from fedspa.messages import BlockMessage
from fedspa.model import layer_weights, set_weights
from fedspa.progress import Advance
from fedspa.pruners import Pruner
from fedspa.report import LayerResult
from fedspa.settings import Settings, message_dtype, round_target
from fedspa.walk import Stream, embed
from fedspa_kernels.checks import together

Observer = Callable[[BlockMessage], None]


@dataclass(eq=False)
class Member:
    """A client in a run, with its hidden states and its account with the server."""

    client: Client
    name: str
    stream: Stream = field(default_factory=lambda: Stream([], {}))
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
        """Calibration windows."""
        return self.client.tokens.shape[0]


@dataclass
class Run:
    """What lasts from round to round.

    order: the members in the order in which they are aggregated. agreed: for every block that
    was pruned the last broadcast, masks alone; sent: its bytes, weights included. pretrained:
    the dense weights of those blocks, kept only where a later round needs them.
    """

    model: nn.Module
    blocks: nn.ModuleList
    names: list[str]
    settings: Settings
    pruner: Pruner
    members: list[Member]
    order: list[Member]
    observe: Observer | None
    clock: StageClock
    agreed: dict[int, BlockMessage] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    pretrained: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    layers: list[LayerResult] = field(default_factory=list)


def block_counts(members: Sequence[Member], blocks: nn.ModuleList, settings: Settings) -> list[int]:
    """How many blocks each client prunes a round, by its capacity."""
    capacities = [member.client.capacity for member in members]
    return server.blocks_per_client(capacities, len(blocks), settings.layers_per_client)


def run_round(run: Run, round_index: int, advance: Advance) -> None:
    """One round: draw blocks, then agree on each block in turn."""
    settings = run.settings
    counts = block_counts(run.order, run.blocks, settings)
    seed = f"{settings.seed}/{round_index}"
    drawn = server.sample_blocks(counts, len(run.blocks), seed, settings.every_block)
    for member, mine in zip(run.order, drawn, strict=True):
        member.drawn.append(tuple(mine))
        _download(run, member, mine)
        if run.pruner.needs_inputs:
            with run.clock.stage("embed"):
                tokens = member.client.tokens
                batch = settings.batch_size or choose_batch(run.model, tokens.shape[1])
                member.stream = embed(run.model, run.blocks, tokens, batch)
    for index in range(len(run.blocks)):
        _run_block(run, round_index, index, advance)


def _run_block(run: Run, round_index: int, index: int, advance: Advance) -> None:
    """Let the clients that drew a block prune it one after the other, then agree."""
    block, settings = run.blocks[index], run.settings
    before = layer_weights(block)
    if settings.rounds > 1:
        run.pretrained.setdefault(index, before)
    sums = server.BlockAggregation(before, settings)
    taking_part = [member for member in run.order if index in member.drawn[-1]]
    for member in run.order:
        advance(f"block {index + 1}, {member.name}")
        if member not in taking_part:
            _pass_by(run, member, index, before)
            continue
        result = _prune_locally(run, member, round_index, index)
        with run.clock.stage("aggregate"):
            sums.add(result.message)
        if settings.schedule == "one-shot":
            with _lent(block, result.weights, before):
                _propagate(run, member, index)
    if not taking_part:
        return
    with run.clock.stage("aggregate"):
        _agree(run, sums, taking_part, round_index, index)
    if settings.schedule == "synchronous":
        for member in taking_part:
            _propagate(run, member, index)


def _prune_locally(run: Run, member: Member, round_index: int, index: int) -> local.LocalResult:
    settings, block = run.settings, run.blocks[index]
    task = local.BlockTask(
        round=round_index,
        block=index,
        name=run.names[index],
        target=round_target(settings, round_index, member.client.sparsity),
        support=_support(run, index),
        message_dtype=message_dtype(settings),
        mask_only=settings.aggregation == "mask",
    )
    with run.clock.stage("calibrate"):
        statistics = local.calibrate(member.name, block, member.stream, task, run.pruner)
    with run.clock.stage("prune"):
        result = local.prune(member.name, member.samples, block, statistics, task, run.pruner)
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
    with together():
        return {name: layer.mask() for name, layer in run.agreed[index].layers.items()}


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
    set_weights(run.blocks[index], server.received_weights(message, agreed))
    bits_only = {n: replace(layer, values=None) for n, layer in message.layers.items()}
    run.agreed[index] = replace(message, layers=bits_only)
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
        if index in run.agreed and member.holds.get(index) != run.agreed[index].round:
            member.bytes_down += run.sent[index]
            member.holds[index] = run.agreed[index].round


def _pass_by(run: Run, member: Member, index: int, current: dict[str, Tensor]) -> None:
    """Move a client past a block that it did not draw, which it takes dense from its own cache."""
    if index > max(member.drawn[-1]):
        return
    with _lent(run.blocks[index], run.pretrained.get(index, current), current):
        _propagate(run, member, index)


@contextmanager
def _lent(
    block: nn.Module, weights: dict[str, Tensor], current: dict[str, Tensor]
) -> Iterator[None]:
    """Let a block hold a client's weights for a while, whatever happens in it."""
    set_weights(block, weights)
    try:
        yield
    finally:
        set_weights(block, current)


def _propagate(run: Run, member: Member, index: int) -> None:
    """Move a client's hidden states past a block, unless none of its blocks needs them any more."""
    if run.pruner.needs_inputs and index < max(member.drawn[-1]):
        with run.clock.stage("propagate"):
            local.propagate(run.blocks[index], member.stream, index)
