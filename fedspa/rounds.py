"""A round: clients draw blocks, prune them locally, and the server agrees (FedSpaLLM, alg. 1).

All clients walk the decoder blocks side by side, so that one block's weights and sums are all that
is held: a client that walked the whole model alone would send the very same messages.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedspa import server
from fedspa.agreement import run_block
from fedspa.batches import choose_batch
from fedspa.members import Member, Run
from fedspa.schedule import exchanged_together
from fedspa.settings import Settings
from fedspa.walk import embed
from fedspa.work import walk_again


def block_counts(members: Sequence[Member], blocks: int, settings: Settings) -> list[int]:
    """How many blocks each client prunes a round, by its capacity."""
    capacities = [member.client.capacity for member in members]
    return server.blocks_per_client(capacities, blocks, settings.layers_per_client)


def draw_blocks(run: Run, round_index: int) -> list[list[int]]:
    """The blocks of a round for every member, in the order of `run.order`.

    Raises ValueError where every block should be drawn and the clients cannot.
    """
    settings, blocks = run.settings, len(run.blocks)
    seed = f"{settings.seed}/{round_index}"
    until = server.draw_clients(
        len(run.order), blocks, settings.participation, settings.dropout, seed
    )
    # What a client has not sent when it leaves, it never sends.
    together = exchanged_together(settings, blocks)
    until = [there if there == blocks else there // together * together for there in until]
    present = [member for member, there in zip(run.order, until, strict=True) if there]
    counts = block_counts(present, blocks, settings)
    drawn = iter(server.sample_blocks(counts, blocks, seed, settings.every_block))
    return [[block for block in next(drawn) if block < there] if there else [] for there in until]


def run_round(run: Run, round_index: int, first: int = 0) -> None:
    """One round: draw blocks, then agree on them in turn, so many at a time as are exchanged.

    first: the block to go on with, as `Run.block_done` was told the one before it; where it is not
    0, the members' accounts and hidden states are those of the run that was interrupted there.
    """
    if first == 0:
        for member, mine in zip(run.order, draw_blocks(run, round_index), strict=True):
            member.drawn.append(tuple(mine))
            if run.remote is None:
                _download(run, member, mine)
        embed_all(run)
    blocks = len(run.blocks)
    together = exchanged_together(run.settings, blocks)
    for begin in range(0, blocks, together):
        end = min(begin + together, blocks)
        if first < end:
            _exchange(run, round_index, range(begin, end), max(first, begin))


def _exchange(run: Run, round_index: int, together: range, first: int) -> None:
    """Agree on blocks whose messages travel together, from one of them on.

    Clients walk these blocks on their own, and then once more from where they began, through what
    was agreed on: not behind the model's last block, nor where it is but one block.
    """
    once, last = len(together) == 1, together[-1]
    again = not once and together.stop < len(run.blocks)
    if again:
        for member in run.walked:
            member.stream.mark()
    for index in range(first, together.stop):
        ahead = index != last
        run_block(run, round_index, index, together, ahead=ahead, follow=once)
        run.progress.block_done(round_index, index)
        if again and ahead:
            for member in run.walked:
                member.stream.trim()
        elif not again and run.block_done is not None:
            run.block_done(round_index, index)
    if again:
        # The blocks that the first rank wrote are read by all.
        run.ranks.barrier()
        for member in run.walked:
            member.stream.rewind()
        for index in together:
            walk_again(run, index, last)
            for member in run.walked:
                member.stream.trim()
        if run.block_done is not None:
            run.block_done(round_index, last)


def embed_all(run: Run) -> None:
    """Give every member that this rank walks the hidden states that enter the first block."""
    if not run.pruner.needs_inputs or not run.walked:
        return
    with run.blocks.embedding():
        for member in run.walked:
            if not member.drawn[-1]:
                member.stream.hidden.clear()
                continue
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
    if not run.pruner.needs_inputs or not run.walked:
        return
    with run.blocks.embedding():
        for member in run.walked:
            if not member.drawn[-1]:
                continue
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
    if run.settings.batch_size is None and run.settings.statistics_dtype == "int64":
        return 1
    return run.settings.batch_size or choose_batch(run.model, length, device=run.blocks.device)


def _download(run: Run, member: Member, mine: Sequence[int]) -> None:
    """Count what a client must fetch before a round: blocks that it has an older version of."""
    for index in mine:
        if index in run.agreed and member.holds.get(index) != run.agreed[index]:
            member.bytes_down += run.sent[index]
            member.holds[index] = run.agreed[index]
