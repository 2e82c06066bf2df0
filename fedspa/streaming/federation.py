"""A run over a checkpoint that is never whole in memory, and that a kill does not throw back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedspa.accounts import gather_accounts, report_of
from fedspa.data import Client
from fedspa.members import Member, Observer, Remote, Run, goes_on
from fedspa.model import decoder_blocks
from fedspa.output import MASKS_FILE, REPORT_BYTES, StoredMasks, check_output, write_report
from fedspa.ranks import Ranks
from fedspa.report import Report
from fedspa.rounds import batch_of, restore_arguments
from fedspa.run import Surroundings, prepare, walk
from fedspa.schedule import opened_again
from fedspa.settings import Settings
from fedspa.streaming import journal
from fedspa.streaming.activations import Hidden
from fedspa.streaming.architecture import Source
from fedspa.streaming.blocks import StreamedBlocks
from fedspa.streaming.companions import copy_rest
from fedspa.streaming.fingerprint import compare, fingerprint, model_identity
from fedspa.streaming.folder import Folders, building
from fedspa.streaming.judged import judge
from fedspa.streaming.merging import merge
from fedspa.streaming.room import choose_place, disk_bytes
from fedspa.streaming.shards import OutputShards
from fedspa.streaming.state import Account, State, commit, load
from fedspa.sums import OpenSum
from fedspa.walk import Stream


def federate_streamed(
    source: Source,
    clients: Sequence[Client],
    settings: Settings,
    out: str | Path,
    around: Surroundings,
    ranks: Ranks,
    observe: Observer | None = None,
    open_sum: OpenSum | None = None,
    heldout: Mapping[str, Tensor] | None = None,
    remote: Remote | None = None,
) -> Report:
    """`run.federate` for a source; arguments as there.

    remote: clients elsewhere, which take the place of `clients`.
    heldout: for every text its evaluation windows (windows, length) int64; the dense model and
        the pruned one are measured on them, streamed as well.
    """
    device = ranks.device or torch.device(around.device)
    checkpoint = source.checkpoint
    check_output(out, source=checkpoint.folder)
    with building(out, ranks, restart=around.restart) as folders:
        stored = load(folders.state)
        # Ranks that do not see the same folders would go on from different blocks.
        at = "none" if stored is None else f"round {stored.round}, block {stored.block}"
        ranks.check_same("what a killed run left beside the output", {"state": at})
        versions = dict(stored.agreed) if stored else {}
        again = opened_again(settings, len(decoder_blocks(source.model)))
        blocks = StreamedBlocks(
            source, device, folders.state, opened_again=again, versions=versions
        )
        try:
            run = prepare(source.model, blocks, clients, settings, observe, open_sum, ranks, remote)
            run.agreed = versions
            place = choose_place(around.activations, run, source.dtype, folders.state)
            _place_hidden(run, place, folders.state)
            identity = _identity(run, source, device)
            ranks.check_same("model", identity["model"])
            if stored is not None:
                compare(stored.run, identity)
            elif ranks.first:
                check_output(out, disk_bytes(run, source) + REPORT_BYTES)
            if ranks.first:
                blocks.output = OutputShards(
                    checkpoint, folders.output, source.written, resume=stored is not None
                )
            saved = _Saving(run, blocks, folders.state, identity, stored)
            run.block_done = saved.block_done
            walk(run, around, saved.resume())
            if remote is not None:
                remote.finish(run)
            for member in run.walked:
                # The last state names none of them, and an evaluation needs the room.
                member.stream.hidden.clear()
            report = replace(report_of(run, StoredMasks(out)), seconds=saved.seconds())
            if ranks.first:
                complete(run, source, blocks, folders)
                if heldout:
                    show = around.progress
                    report = judge(
                        report, settings, source, folders, heldout, device, place, show=show
                    )
                write_report(folders.output, report)
            return report
        finally:
            blocks.close()
            if blocks.output is not None:
                blocks.output.close()


def _identity(run: Run, source: Source, device: torch.device) -> dict:
    """What the run's bits depend on."""
    batches = [batch_of(run, member) for member in run.members]
    clients = [replace(member.client, name=member.name) for member in run.members]
    ranks = {"number": run.ranks.size, "split": run.ranks.split}
    digests = [member.digest for member in run.members] if run.remote is not None else None
    return fingerprint(
        model_identity(source), run.settings, clients, batches, device, ranks, digests
    )


def _place_hidden(run: Run, place: str, folder: Path) -> None:
    """Give every member that this rank walks a place for its hidden states, and files for them."""
    for member in run.walked:
        number = run.order.index(member)
        name = f"hidden-{number:03}-{run.ranks.rank}"
        member.stream = Stream(Hidden(run.blocks.device, place, folder, name), {})


def _hidden(member: Member) -> Hidden:
    """What `_place_hidden` gave it."""
    hidden = member.stream.hidden
    assert isinstance(hidden, Hidden)
    return hidden


class _Saving:
    """Commits a run's state after every block, and takes up the one that a killed run left."""

    def __init__(
        self,
        run: Run,
        blocks: StreamedBlocks,
        folder: Path,
        identity: dict,
        stored: State | None,
    ) -> None:
        self._run = run
        self._blocks = blocks
        self._folder = folder
        self._identity = identity
        self._stored = stored

    def resume(self) -> tuple[int, int]:
        """Bring the run to where the stored state is; returns the round and block to do next."""
        run, stored = self._run, self._stored
        if stored is None:
            return 0, 0
        if run.ranks.first:
            journal.forget(self._folder, stored.agreed)
        run.layers.extend(stored.layers)
        run.results.extend(stored.results)
        run.sent.update(stored.sent)
        for member in run.members:
            account = stored.accounts[member.name]
            member.drawn = list(account.drawn)
            member.bytes_up, member.bytes_down = account.bytes_up, account.bytes_down
            member.wire_up, member.wire_down = account.wire_up, account.wire_down
            member.pruned, member.weights = account.pruned, account.weights
            member.loss, member.holds = account.loss, dict(account.holds)
        if stored.block:
            restore_arguments(run)
            for member in run.walked:
                hidden = _hidden(member)
                if hidden.name in stored.hidden:
                    hidden.restore(stored.hidden[hidden.name])
        return stored.round, stored.block

    def block_done(self, round_index: int, index: int) -> None:
        """Bring everything to the disk that the next block needs, and then say so there."""
        run = self._run
        with run.clock.stage("save"):
            last = index + 1 == len(run.blocks)
            described: dict[str, dict] = {}
            for member in run.walked:
                hidden = _hidden(member)
                if not last and goes_on(run, member, index):
                    hidden.flush()
                    described[hidden.name] = hidden.describe()
            gather_accounts(run)
            every = {k: v for part in run.ranks.gather(described) for k, v in part.items()}
            if run.ranks.first:
                assert self._blocks.output is not None
                self._blocks.output.sync()
                place = (round_index + 1, 0) if last else (round_index, index + 1)
                commit(self._folder, self._state(place, every))
                journal.forget(self._folder, run.agreed)
            run.ranks.barrier()
            for member in run.walked:
                _hidden(member).settle()

    def seconds(self) -> dict[str, float]:
        """By stage, those of the killed run included."""
        total = dict(self._stored.seconds) if self._stored else {}
        for stage, seconds in self._run.clock.seconds().items():
            total[stage] = total.get(stage, 0.0) + seconds
        return total

    def _state(self, place: tuple[int, int], hidden: dict[str, dict]) -> State:
        run = self._run
        accounts = {
            member.name: Account(
                drawn=tuple(member.drawn),
                bytes_up=member.bytes_up,
                bytes_down=member.bytes_down,
                wire_up=member.wire_up,
                wire_down=member.wire_down,
                pruned=member.pruned,
                weights=member.weights,
                loss=member.loss,
                holds=member.holds,
            )
            for member in run.members
        }
        return State(
            run=self._identity,
            round=place[0],
            block=place[1],
            accounts=accounts,
            hidden=hidden,
            layers=tuple(run.layers),
            results=tuple(run.results),
            agreed=run.agreed,
            sent=run.sent,
            seconds=self.seconds(),
        )


def complete(run: Run, source: Source, blocks: StreamedBlocks, folders: Folders) -> None:
    """Bring everything into the output's folder but the report: weights, masks, companions."""
    blocks.complete()
    assert blocks.output is not None
    blocks.output.finish()
    own = source.checkpoint.tensors
    changed = any(dtype != own[name].dtype for name, dtype in source.written.items())
    copy_rest(source.checkpoint, folders.output, source.dtype if changed else None)
    masks = [
        journal.path(folders.state, index, version, journal.MASKS)
        for index, version in sorted(run.agreed.items())
    ]
    merge(masks, folders.output / MASKS_FILE)
