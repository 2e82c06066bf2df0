"""The door of a run: check everything, let the rounds happen, report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedspa.accounts import report_of
from fedspa.blocks import Blocks, HeldBlocks
from fedspa.clock import StageClock
from fedspa.data import Client, check_clients, client_names
from fedspa.loading import Loaded, open_model
from fedspa.members import Member, Observer, Remote, Run
from fedspa.model import (
    check_model,
    longest_window,
    vocabulary_size,
)
from fedspa.output import check_output, complete_folder, result_bytes, write_result
from fedspa.progress import block_progress
from fedspa.pruners import additive_kind, make_pruner
from fedspa.ranks import Ranks, join
from fedspa.report import Report
from fedspa.rounds import draw_blocks, run_round
from fedspa.schedule import opened_again
from fedspa.settings import Settings
from fedspa.streaming.architecture import Source
from fedspa.sums import OpenSum, plain_sums
from fedspa_kernels.arguments import parse_pattern


@dataclass(frozen=True)
class Surroundings:
    """How a run is carried out, which changes nothing of what it computes but for rounding.

    device, dtype: of a model that is given by its path. activations: where hidden states lie
    between two blocks, "gpu", "host", "disk" or "auto". split: what the ranks of torchrun divide,
    "samples" or "clients". restart: forget what a killed run left, and start anew.
    progress: True, False, or None: where stderr is a terminal. events: progress as JSON lines.
    """

    device: str = "cpu"
    dtype: str = "auto"
    activations: str = "auto"
    split: str | None = None
    restart: bool = False
    progress: bool | None = None
    events: bool = False


def federate(
    model: Any,
    clients: Sequence[Client],
    settings: Settings,
    *,
    out: str | Path | None = None,
    tokenizer: Any = None,
    progress: bool | None = None,
    observe: Observer | None = None,
    open_sum: OpenSum | None = None,
    surroundings: Surroundings | None = None,
    ranks: Ranks | None = None,
) -> Report:
    """Prune a causal language model over clients whose calibration data stays with each of them.

    model: a Hugging Face causal LM, pruned in place; or a path or id, which needs `out`: then it
        is streamed from its checkpoint block by block, and a run that is killed goes on where it
        was when it is called again.
    clients: their calibration windows and capacities; their order does not change a bit.
    out: folder for the pruned checkpoint, the masks and the report; complete or absent.
    tokenizer: saved beside the model in `out`; a path brings its own.
    progress: True, False, or None: where stderr is a terminal.
    observe: is given every message that a client sends, as it is sent.
    open_sum: opens the sums over clients of aggregation "statistics", such as secure ones
        (`fedspa.sums.Sum`); None: numbers in the settings' statistics_dtype.
    surroundings: device, memory, ranks; `progress` here goes before theirs.
    ranks: those that this process has joined already; None: joins them as surroundings say.
    returns: the report; its `masks` hold the mask of every pruned weight by its full name.
    raises: ValueError for settings, clients, data or a model that cannot be pruned so, and
        RuntimeError for the machine; before any work is done or file is written, but for what
        only the weights or calibration can show (values that are not finite, a singular hessian):
        then the blocks before it are already pruned in a model that was passed in memory.
    """
    around = surroundings or Surroundings()
    if progress is not None:
        around = replace(around, progress=progress)
    if isinstance(model, str | Path):
        if out is None:
            raise ValueError(
                f"federate: {model} is a path, so the result needs a place: give out=FOLDER, "
                f"or load the model and pass it"
            )
        check_output(out, source=model)
        model = open_model(model, dtype=around.dtype, device=around.device)
    entered = nullcontext(ranks) if ranks is not None else join(around.split, around.device)
    with entered as ranks:
        if isinstance(model, Source):
            # Imported here: it is made of this module's steps.
            from fedspa.streaming.federation import federate_streamed

            if out is None:
                raise ValueError(
                    "federate: a model that is streamed needs a place: give out=FOLDER"
                )
            return federate_streamed(
                model, clients, settings, out, around, ranks, observe, open_sum
            )
        if isinstance(model, Loaded):
            model, tokenizer = model.model, model.tokenizer or tokenizer
        return _federate_held(
            model,
            clients,
            settings,
            around,
            ranks,
            out=out,
            tokenizer=tokenizer,
            observe=observe,
            open_sum=open_sum,
        )


def _federate_held(
    model: Any,
    clients: Sequence[Client],
    settings: Settings,
    around: Surroundings,
    ranks: Ranks,
    *,
    out: str | Path | None,
    tokenizer: Any,
    observe: Observer | None,
    open_sum: OpenSum | None,
) -> Report:
    """Prune a model that is in memory as a whole."""
    blocks = HeldBlocks(model)
    blocks.remember = opened_again(settings, len(blocks))
    run = prepare(model, blocks, clients, settings, observe, open_sum, ranks)
    if out is not None:
        check_output(out, result_bytes(model))
    training = model.training
    model.eval()
    walk(run, around)
    model.train(training)
    masks = {
        f"{blocks.names[index]}.{name}": layer
        for index in sorted(run.agreed)
        for name, layer in blocks.masks(index).items()
    }
    report = report_of(run, masks)
    if out is not None and ranks.first:
        with complete_folder(out) as folder:
            write_result(folder, model, tokenizer, report)
    return report


def prepare(
    model: Any,
    blocks: Blocks,
    clients: Sequence[Client],
    settings: Settings,
    observe: Observer | None,
    open_sum: OpenSum | None,
    ranks: Ranks,
    remote: Remote | None = None,
) -> Run:
    """Check everything that a run depends on, before it starts.

    remote: whose members take the place of clients, and are walked by nobody here.
    """
    if remote is None:
        check_clients(clients, vocabulary_size(model), longest_window(model))
        named = zip(clients, client_names(clients), strict=True)
        members = [Member(client, name, order_key(client)) for client, name in named]
    else:
        members, clients = remote.members, [member.client for member in remote.members]
    _check_target(clients, settings)
    width = None
    if settings.pattern is not None:
        width = parse_pattern("settings", settings.pattern, width=0)[1]
    check_model(model, blocks.modules, width, streamed=not isinstance(blocks, HeldBlocks))
    order = sorted(members, key=lambda member: member.digest)
    ranks.check_same("settings", {name: repr(v) for name, v in settings.to_dict().items()})
    ranks.check_same("clients", {member.name: member.digest for member in members})
    walked = order if remote is None else []
    if ranks.split == "clients":
        ranks.check_enough(len(order), "clients")
        walked = ranks.mine(order)
    elif ranks.split == "samples":
        for member in members:
            ranks.check_enough(member.samples, f"samples of client {member.name!r}")
            member.tokens = ranks.mine(member.client.tokens)
    pruner = make_pruner(settings)
    if settings.aggregation != "statistics" and open_sum is not None:
        raise ValueError(
            f"federate: open_sum adds up statistics, and aggregation {settings.aggregation!r} "
            f"sends none; leave it out, or choose aggregation 'statistics'"
        )
    if settings.aggregation == "statistics":
        additive_kind(pruner)
        if open_sum is not None and ranks.split == "clients":
            raise ValueError(
                "federate: ranks that split the clients each hold a part of a sum, which only "
                "plain sums allow; leave open_sum out, or split the samples"
            )
    run = Run(
        model=model,
        blocks=blocks,
        settings=settings,
        pruner=pruner,
        members=members,
        order=order,
        observe=observe,
        clock=StageClock(blocks.device),
        ranks=ranks,
        walked=walked,
        open_sum=open_sum or plain_sums(settings.statistics_dtype),
        remote=remote,
    )
    for round_index in range(settings.rounds):
        draw_blocks(run, round_index)
    return run


def walk(run: Run, around: Surroundings, start: tuple[int, int] = (0, 0)) -> None:
    """Let the rounds happen, from a round and a block on."""
    needs = run.pruner.needs_inputs
    tokens = {m.name: m.client.tokens.numel() if needs else 0 for m in run.members}
    show = around.progress if run.ranks.first else False
    with block_progress(
        len(run.blocks),
        run.settings.rounds,
        tokens,
        first=start,
        show=show,
        events=around.events and run.ranks.first,
    ) as run.progress:
        first_round, block = start
        for round_index in range(first_round, run.settings.rounds):
            run_round(run, round_index, block if round_index == first_round else 0)


def order_key(client: Client) -> str:
    """An order that the clients' data decides: float sums then do not depend on the list's."""
    tokens = client.tokens.contiguous().cpu().numpy().tobytes()
    settings = repr((client.tokens.shape, client.capacity, client.sparsity)).encode()
    return hashlib.sha256(tokens + settings).hexdigest()


def _check_target(clients: Sequence[Client], settings: Settings) -> None:
    for name, client in zip(client_names(clients), clients, strict=True):
        if client.sparsity is not None and settings.aggregation == "statistics":
            raise ValueError(
                f"client {name!r} has its own sparsity {client.sparsity}, and with aggregation "
                f"'statistics' the server prunes once for all; remove one of the two"
            )
        if client.sparsity is not None and settings.pattern is not None:
            raise ValueError(
                f"client {name!r} has its own sparsity {client.sparsity}, which the pattern "
                f"{settings.pattern!r} leaves no room for; remove one of the two"
            )
