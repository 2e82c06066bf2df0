"""A client's calibration of a block: what the pruner gathers of its layers' inputs, in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedspa.model import linear_layers
from fedspa.pruners import Pruner
from fedspa.ranks import Ranks
from fedspa.schedule import Target
from fedspa.walk import Stream, run_block
from fedspa_kernels.checks import refuse, together


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
class Calibration:
    """What a client gathered from the inputs of a block's layers; both by layer.

    statistics: layers of one input have the very same tensor. tokens: how many reached a layer.
    A layer that was not reached at all is in neither.
    """

    statistics: dict[str, Tensor]
    tokens: dict[str, int]


@torch.no_grad()
def calibrate(
    client: str,
    block: nn.Module,
    stream: Stream,
    task: BlockTask,
    pruner: Pruner,
    *,
    every_layer: bool = True,
) -> Calibration:
    """Every layer's statistic over a client's hidden states, from one pass through the block.

    stream: the hidden states that enter this block.
    every_layer: whether tokens must reach every layer, as each of a client's own pruning needs.
    Raises ValueError naming the client and the layer where activations are not finite.
    """
    if not pruner.needs_inputs:
        return Calibration({}, {})
    layers = linear_layers(block)
    gatherer = _Gatherer(pruner, list(layers))
    handles = [
        layer.register_forward_pre_hook(gatherer.hook(name)) for name, layer in layers.items()
    ]
    try:
        for inputs in stream.inputs(task.block):
            with suppress(_AllGathered):
                run_block(block, *inputs)
            gatherer.end_batch()
    finally:
        for handle in handles:
            handle.remove()
    reached = [name for name in layers if gatherer.tokens[gatherer.leaders.get(name, name)]]
    with together():
        for name in layers:
            where = f"client {client!r}, layer {task.name}.{name}"
            if name not in reached:
                if every_layer:
                    raise ValueError(f"{where}: no calibration token reached it; add samples")
                continue
            if gatherer.leaders[name] == name:
                # NaN goes through both, and nothing of the statistic's size is written.
                extremes = torch.stack(gatherer.statistic(name).aminmax())
                refuse(~extremes.isfinite(), partial(_explain_infinite, where))
    return Calibration(
        {name: gatherer.statistic(name) for name in reached},
        {name: gatherer.tokens[gatherer.leaders[name]] for name in reached},
    )


def _explain_infinite(where: str) -> None:
    raise ValueError(
        f"{where}: its activations are NaN, infinite or overflow; check the client's text, or load "
        f"the model with dtype float32"
    )


def sum_statistics(found: Calibration, ranks: Ranks) -> Calibration:
    """Add up what all ranks gathered, the statistics in place; every rank then has the same."""
    statistics = found.statistics
    ranks.sum_(list({id(statistic): statistic for statistic in statistics.values()}.values()))
    counted = ranks.gather(found.tokens)
    return Calibration(
        statistics, {name: sum(tokens[name] for tokens in counted) for name in found.tokens}
    )


def shared_inputs(names: Sequence[str], statistics: Mapping[str, Tensor]) -> list[list[str]]:
    """The layers in groups of one statistic, in order."""
    groups: dict[int | str, list[str]] = {}
    for name in names:
        key = id(statistics[name]) if name in statistics else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


class _AllGathered(Exception):
    """Ends a block's forward pass, of which no layer is left to gather for."""


class _Gatherer:
    """Statistics that layers with the very same input share, as q, k and v do: one for each."""

    def __init__(self, pruner: Pruner, layers: Sequence[str]) -> None:
        self.pruner = pruner
        self.layers = sorted(layers)
        # Whether the first batch called every layer once; None before it ended.
        self._each_once: bool | None = None
        self._called: list[str] = []
        self.leaders: dict[str, str] = {}
        self.tokens: Counter[str] = Counter()
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
                self.tokens[name] += len(rows)
            self._called.append(name)
            # The product of the last layer, and what follows it, are of no use here.
            if self._each_once and len(self._called) == len(self.layers):
                if sorted(self._called) == self.layers:
                    raise _AllGathered

        return gather

    def end_batch(self) -> None:
        """Forget the batch's inputs."""
        if self._each_once is None:
            self._each_once = sorted(self._called) == self.layers
        self._called.clear()
        self._seen.clear()

    def statistic(self, name: str) -> Tensor:
        """The statistic of the layer that gathered for this one."""
        return self._statistics[self.leaders[name]]
