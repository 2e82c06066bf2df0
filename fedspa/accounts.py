"""The accounts of clients: what each sends counts once its block is agreed on; and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedspa.members import Member, Run
from fedspa.messages import BlockMessage, LayerMessage, StatisticsMessage
from fedspa.model import linear_layers, unprunable_weights, weight_of
from fedspa.report import ClientResult, Report, machine, peak_gpu_memory, peak_memory, versions


@dataclass(frozen=True)
class Share:
    """What a client's message adds to its account."""

    nbytes: int = 0
    loss: float = 0.0
    pruned: int = 0
    weights: int = 0


# By client, in the order in which they are added.
Sent = dict[str, Share]


def note(run: Run, message: BlockMessage | StatisticsMessage, sent: Sent) -> None:
    """Note what a client has sent; it counts once the block is agreed on."""
    if isinstance(message, BlockMessage):
        layers = message.layers.values()
        pruned = sum(layer.pruned for layer in layers)
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        sent[message.sender] = Share(message.nbytes, message.loss, pruned, weights)
    else:
        sent[message.sender] = Share(message.nbytes)
    if run.observe is not None:
        run.observe(message)


def settle(taking_part: list[Member], sent: Sent) -> None:
    """Keep account of what clients have sent."""
    for member in taking_part:
        if member.name in sent:
            noted = sent[member.name]
            member.bytes_up += noted.nbytes
            member.loss += noted.loss
            member.pruned += noted.pruned
            member.weights += noted.weights


def report_of(run: Run, masks: Mapping[str, LayerMessage]) -> Report:
    """What a run leaves behind, with the accounts of all ranks."""
    gather_accounts(run)
    config = getattr(run.model, "config", None)
    modules = run.blocks.modules
    prunable = [weight_of(x).numel() for b in modules for x in linear_layers(b).values()]
    return Report(
        settings=run.settings.to_dict(),
        model={
            "name": Path(getattr(config, "_name_or_path", "")).name or type(run.model).__name__,
            "type": str(getattr(config, "model_type", "")),
            "blocks": len(run.blocks),
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "prunable": sum(prunable),
        },
        unprunable=unprunable_weights(run.model, modules),
        clients=tuple(_client_result(member) for member in run.members),
        layers=tuple(run.layers),
        blocks=tuple(run.results),
        seconds=run.clock.seconds(),
        peak_memory=peak_memory(),
        peak_gpu_memory=peak_gpu_memory(),
        versions=versions(),
        machine=machine(),
        masks=masks,
    )


def gather_accounts(run: Run) -> None:
    """Give every rank the accounts of the clients that others walked."""
    if run.ranks.split != "clients":
        return
    mine = {m.name: (m.bytes_up, m.pruned, m.weights, m.loss) for m in run.walked}
    for accounts in run.ranks.gather(mine):
        for member in run.members:
            if member.name in accounts:
                found = accounts[member.name]
                member.bytes_up, member.pruned, member.weights, member.loss = found


def _client_result(member: Member) -> ClientResult:
    return ClientResult(
        name=member.name,
        samples=member.samples,
        seqlen=member.client.tokens.shape[1],
        capacity=member.client.capacity,
        # With sums of statistics clients prune nothing, and one that is never there does not.
        sparsity=member.pruned / member.weights if member.weights else math.nan,
        blocks=tuple(member.drawn),
        bytes_up=member.bytes_up,
        bytes_down=member.bytes_down,
        loss=member.loss,
        wire_up=member.wire_up,
        wire_down=member.wire_down,
    )
