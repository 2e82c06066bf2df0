"""The door of a run: check everything, let the rounds happen, report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedspa import server
from fedspa.clock import StageClock
from fedspa.data import Client, check_clients, client_names
from fedspa.model import (
    block_names,
    check_model,
    decoder_blocks,
    device_of,
    linear_layers,
    load,
    longest_window,
    unprunable_weights,
    vocabulary_size,
    weight_of,
)
from fedspa.output import check_output, complete_folder, write_result
from fedspa.progress import progress_bar
from fedspa.pruners import make_pruner
from fedspa.report import ClientResult, Report, machine, peak_gpu_memory, peak_memory, versions
from fedspa.rounds import Member, Observer, Run, block_counts, run_round
from fedspa.settings import Settings
from fedspa_kernels.arguments import parse_pattern


def federate(
    model: Any,
    clients: Sequence[Client],
    settings: Settings,
    *,
    out: str | Path | None = None,
    tokenizer: Any = None,
    progress: bool | None = None,
    observe: Observer | None = None,
) -> Report:
    """Prune a causal language model over clients whose calibration data stays with each of them.

    model: a Hugging Face causal LM, pruned in place; or a path or id, which needs `out`.
    clients: their calibration windows and capacities; their order does not change a bit.
    out: folder for the pruned checkpoint, the masks and the report; complete or absent.
    tokenizer: saved beside the model in `out`; a path brings its own.
    progress: True, False, or None: where stderr is a terminal.
    observe: is given every message that a client sends, as it is sent.
    returns: the report; its `masks` hold the mask of every pruned weight by its full name.
    raises: ValueError for settings, clients, data or a model that cannot be pruned so, and
        RuntimeError for the machine; before any work is done or file is written, but for what
        only calibration can show (activations that are not finite, a singular hessian): then
        the blocks before it are already pruned in a model that was passed in memory.
    """
    if out is not None:
        check_output(out)
    if isinstance(model, str | Path):
        if out is None:
            raise ValueError(
                f"federate: {model} is a path, so the result needs a place: give out=FOLDER, "
                f"or load the model and pass it"
            )
        loaded = load(model)
        model, tokenizer = loaded.model, loaded.tokenizer or tokenizer
    run = _prepare(model, clients, settings, observe)
    if out is not None:
        check_output(out, model)
    training = model.training
    model.eval()
    total = settings.rounds * len(run.blocks) * len(run.members)
    with progress_bar("pruning", total, progress) as advance:
        for round_index in range(settings.rounds):
            run_round(run, round_index, advance)
    model.train(training)
    report = _report(run)
    if out is not None:
        with complete_folder(out) as folder:
            write_result(folder, model, tokenizer, report)
    return report


def _prepare(
    model: Any, clients: Sequence[Client], settings: Settings, observe: Observer | None
) -> Run:
    """Check everything that a run depends on, before it starts."""
    blocks = decoder_blocks(model)
    check_clients(clients, vocabulary_size(model), longest_window(model))
    _check_target(clients, settings)
    width = None
    if settings.pattern is not None:
        width = parse_pattern("settings", settings.pattern, width=0)[1]
    check_model(model, blocks, width)
    names = client_names(clients)
    members = [Member(c, name) for c, name in zip(clients, names, strict=True)]
    counts = block_counts(members, blocks, settings)
    server.sample_blocks(counts, len(blocks), settings.seed, settings.every_block)
    return Run(
        model=model,
        blocks=blocks,
        names=block_names(model, blocks),
        settings=settings,
        pruner=make_pruner(settings),
        members=members,
        order=sorted(members, key=_order_key),
        observe=observe,
        clock=StageClock(device_of(model)),
    )


def _order_key(member: Member) -> str:
    """An order that the clients' data decides: float sums then do not depend on the list's."""
    client = member.client
    tokens = client.tokens.contiguous().cpu().numpy().tobytes()
    settings = repr((client.tokens.shape, client.capacity, client.sparsity)).encode()
    return hashlib.sha256(tokens + settings).hexdigest()


def _check_target(clients: Sequence[Client], settings: Settings) -> None:
    for name, client in zip(client_names(clients), clients, strict=True):
        if client.sparsity is not None and settings.pattern is not None:
            raise ValueError(
                f"client {name!r} has its own sparsity {client.sparsity}, which the pattern "
                f"{settings.pattern!r} leaves no room for; remove one of the two"
            )


def _report(run: Run) -> Report:
    config = getattr(run.model, "config", None)
    prunable = [weight_of(x).numel() for b in run.blocks for x in linear_layers(b).values()]
    masks = {
        f"{run.names[index]}.{name}": layer
        for index, message in sorted(run.agreed.items())
        for name, layer in message.layers.items()
    }
    return Report(
        settings=run.settings.to_dict(),
        model={
            "name": Path(getattr(config, "_name_or_path", "")).name or type(run.model).__name__,
            "type": str(getattr(config, "model_type", "")),
            "blocks": len(run.blocks),
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "prunable": sum(prunable),
        },
        unprunable=unprunable_weights(run.model, run.blocks),
        clients=tuple(_client_result(member) for member in run.members),
        layers=tuple(run.layers),
        seconds=run.clock.seconds(),
        peak_memory=peak_memory(),
        peak_gpu_memory=peak_gpu_memory(),
        versions=versions(),
        machine=machine(),
        masks=masks,
    )


def _client_result(member: Member) -> ClientResult:
    return ClientResult(
        name=member.name,
        samples=member.samples,
        seqlen=member.client.tokens.shape[1],
        capacity=member.client.capacity,
        sparsity=member.pruned / member.weights,
        blocks=tuple(member.drawn),
        bytes_up=member.bytes_up,
        bytes_down=member.bytes_down,
        loss=member.loss,
    )
