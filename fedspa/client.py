"""What a client does with one decoder block: calibrate, prune, report. Its text stays here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedspa.messages import BlockMessage, pack_layer
from fedspa.model import linear_layers, weight_of
from fedspa.pruners import Pruner
from fedspa.settings import Target
from fedspa.walk import Stream, run_block


@dataclass(frozen=True)
class BlockTask:
    """What the server asks of a client: a block, its place in the run, and what to reach.

    support: for every layer (rows, cols) bool, where a former round left a weight; or None.
    """

    round: int
    block: int
    name: str
    target: Target
    support: dict[str, Tensor] | None = None
    message_dtype: torch.dtype | None = None
    mask_only: bool = False


@dataclass(frozen=True)
class LocalResult:
    """A client's pruned block: the message for the server, and what stays with the client."""

    message: BlockMessage
    weights: dict[str, Tensor]
    loss: float = 0.0


@torch.no_grad()
def calibrate(
    client: str, block: nn.Module, stream: Stream, task: BlockTask, pruner: Pruner
) -> dict[str, Tensor]:
    """Every layer's statistic over a client's hidden states, from one pass through the block.

    stream: the hidden states that enter this block.
    Raises ValueError naming the client and the layer where activations are not finite.
    """
    if not pruner.needs_inputs:
        return {}
    layers = linear_layers(block)
    gatherer = _Gatherer(pruner)
    handles = [
        layer.register_forward_pre_hook(gatherer.hook(name)) for name, layer in layers.items()
    ]
    try:
        for inputs in stream.inputs(task.block):
            run_block(block, *inputs)
            gatherer.end_batch()
    finally:
        for handle in handles:
            handle.remove()
    where = f"client {client!r}, layer {task.name}."
    for name in layers:
        if name not in gatherer.leaders:
            raise ValueError(f"{where}{name}: no calibration token reached it; add samples")
        if not bool(gatherer.statistic(name).isfinite().all()):
            raise ValueError(
                f"{where}{name}: its activations are NaN, infinite or overflow; check the "
                f"client's text, or load the model with dtype float32"
            )
    return {name: gatherer.statistic(name) for name in layers}


@torch.no_grad()
def prune(
    client: str,
    samples: int,
    block: nn.Module,
    statistics: dict[str, Tensor],
    task: BlockTask,
    pruner: Pruner,
) -> LocalResult:
    """Prune a block's layers with their statistics; the block itself is left as it is.

    samples: the calibration windows behind the statistics.
    Raises ValueError naming the client and the layer where the pruner cannot work.
    """
    layers, weights, loss = {}, {}, 0.0
    for name, layer in linear_layers(block).items():
        support = None if task.support is None else task.support[name]
        try:
            pruned = pruner.prune(weight_of(layer), statistics.get(name), task.target, support)
            layers[name] = pack_layer(
                pruned.weight, pruned.mask, task.message_dtype, task.mask_only
            )
        except ValueError as error:
            raise ValueError(
                f"client {client!r}, layer {task.name}.{name}, {samples} calibration windows: "
                f"{error}"
            ) from error
        weights[name] = pruned.weight
        loss += 0.0 if pruned.loss is None else float(pruned.loss.sum())
    message = BlockMessage(client, task.round, task.block, samples, layers)
    return LocalResult(message, weights, loss)


@torch.no_grad()
def propagate(block: nn.Module, stream: Stream, block_index: int) -> None:
    """Replace a stream's hidden states with what the block makes of them."""
    stream.hidden = [run_block(block, *inputs) for inputs in stream.inputs(block_index)]


class _Gatherer:
    """Statistics that layers with the very same input share, as q, k and v do: one for each."""

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        self.leaders: dict[str, str] = {}
        self._statistics: dict[str, Tensor] = {}
        # The tensors themselves are held: a freed one's id could come back as another's.
        self._seen: dict[int, tuple[str, Tensor]] = {}

    def hook(self, name: str) -> Callable[..., None]:
        """A forward pre-hook for the layer of that name."""

        def gather(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0]
            first, _same = self._seen.setdefault(id(inputs), (name, inputs))
            if self.leaders.setdefault(name, first) == name:
                rows = inputs.reshape(-1, inputs.shape[-1])
                self._statistics[name] = self.pruner.gather(self._statistics.get(name), rows)

        return gather

    def end_batch(self) -> None:
        """Forget the batch's inputs."""
        self._seen.clear()

    def statistic(self, name: str) -> Tensor:
        """The statistic of the layer that gathered for this one."""
        return self._statistics[self.leaders[name]]
