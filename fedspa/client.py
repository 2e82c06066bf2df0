"""What a client does with one decoder block: calibrate, prune, report. Its text stays here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedspa.messages import BlockMessage, pack_layer
from fedspa.model import linear_layers, weight_of
from fedspa.pruners import Pruner, SharingPruner
from fedspa.ranks import Ranks, alone
from fedspa.settings import Target
from fedspa.walk import Stream, run_block
from fedspa_kernels import Pruned
from fedspa_kernels.checks import about, refuse, together


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


@dataclass(frozen=True)
class Calibration:
    """What a client gathered from the inputs of a block's layers; both by layer.

    statistics: layers of one input have the very same tensor. tokens: how many reached a layer.
    """

    statistics: dict[str, Tensor]
    tokens: dict[str, int]


@torch.no_grad()
def calibrate(
    client: str, block: nn.Module, stream: Stream, task: BlockTask, pruner: Pruner
) -> Calibration:
    """Every layer's statistic over a client's hidden states, from one pass through the block.

    stream: the hidden states that enter this block.
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
    with together():
        for name in layers:
            where = f"client {client!r}, layer {task.name}.{name}"
            if name not in gatherer.leaders:
                raise ValueError(f"{where}: no calibration token reached it; add samples")
            if gatherer.leaders[name] == name:
                # NaN goes through both, and nothing of the statistic's size is written.
                extremes = torch.stack(gatherer.statistic(name).aminmax())
                refuse(~extremes.isfinite(), partial(_explain_infinite, where))
    return Calibration(
        {name: gatherer.statistic(name) for name in layers},
        {name: gatherer.tokens[gatherer.leaders[name]] for name in layers},
    )


def _explain_infinite(where: str) -> None:
    raise ValueError(
        f"{where}: its activations are NaN, infinite or overflow; check the client's text, or load "
        f"the model with dtype float32"
    )


@torch.no_grad()
def prune(
    client: str,
    samples: int,
    block: nn.Module,
    statistics: dict[str, Tensor],
    task: BlockTask,
    pruner: Pruner,
    ranks: Ranks | None = None,
) -> LocalResult:
    """Prune a block's layers with their statistics; the block itself is left as it is.

    samples: the calibration windows behind the statistics; layers with the very same statistic
        are given to a pruner together that can take them so.
    ranks: which have the same statistics, and divide the layers among them; None: there is one.
    Raises ValueError naming the client and the layer where the pruner cannot work.
    """
    layers = {name: weight_of(layer) for name, layer in linear_layers(block).items()}
    pruned: dict[str, Pruned] = {}

    def where(names: Sequence[str]) -> str:
        which = " and ".join(f"{task.name}.{name}" for name in names)
        return f"client {client!r}, layer {which}, {samples} calibration windows: "

    # A GPU is waited for twice a block, whatever the number of its layers.
    with together():
        ranks = ranks or alone()
        groups = _sharing(list(layers), statistics, pruner)
        owners = ranks.owner([_work(names, layers) for names in groups])
        for names, owner in zip(groups, owners, strict=True):
            if owner == ranks.rank:
                with about(where(names)):
                    pruned |= _prune_sharing(names, layers, statistics, task, pruner)
        for names, owner in zip(groups, owners, strict=True):
            for name in names:
                pruned[name] = _share(ranks, owner, layers[name], pruned.get(name))
        kept, losses = _count([pruned[name] for name in layers])
        packed = {}
        for name, count in zip(layers, kept, strict=True):
            weight, mask, _ = pruned[name]
            with about(where([name])):
                packed[name] = pack_layer(weight, mask, task.message_dtype, task.mask_only, count)
    message = BlockMessage(client, task.round, task.block, samples, packed)
    return LocalResult(message, {name: pruned[name].weight for name in layers}, sum(losses))


def sum_statistics(found: Calibration, ranks: Ranks) -> Calibration:
    """Add up what all ranks gathered, the statistics in place; every rank then has the same."""
    statistics = found.statistics
    ranks.sum_(list({id(statistic): statistic for statistic in statistics.values()}.values()))
    counted = ranks.gather(found.tokens)
    return Calibration(
        statistics, {name: sum(tokens[name] for tokens in counted) for name in found.tokens}
    )


def _work(names: Sequence[str], layers: Mapping[str, Tensor]) -> float:
    """What pruning layers of one statistic costs: its factor and the products with their rows."""
    cols = layers[names[0]].shape[1]
    return cols**3 / 3 + sum(layers[name].shape[0] for name in names) * cols**2


def _share(ranks: Ranks, owner: int, dense: Tensor, result: Pruned | None) -> Pruned:
    """A layer's result on every rank, from the one that has it; its loss as one sum."""
    if ranks.size == 1:
        assert result is not None
        return result
    if result is None:
        weight = torch.empty_like(dense, memory_format=torch.contiguous_format)
        mask = torch.empty(dense.shape, dtype=torch.bool, device=dense.device)
        result = Pruned(weight, mask, torch.empty(1, dtype=torch.float64, device=dense.device))
    weight, mask, loss = (result.weight.contiguous(), result.mask.contiguous(), result.loss)
    total = torch.zeros(1, dtype=torch.float64, device=dense.device) if loss is None else loss
    total = total.sum().double().view(1)
    ranks.share(owner, [weight, mask, total])
    return Pruned(weight, mask, total)


def _sharing(
    names: Sequence[str], statistics: Mapping[str, Tensor], pruner: Pruner
) -> list[list[str]]:
    """Layers that the pruner takes in one call: of one statistic, where it has `prune_shared`."""
    if not isinstance(pruner, SharingPruner):
        return [[name] for name in names]
    return shared_inputs(names, statistics)


def shared_inputs(names: Sequence[str], statistics: Mapping[str, Tensor]) -> list[list[str]]:
    """The layers in groups of one statistic, in order."""
    groups: dict[int | str, list[str]] = {}
    for name in names:
        key = id(statistics[name]) if name in statistics else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _prune_sharing(
    names: Sequence[str],
    layers: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    task: BlockTask,
    pruner: Pruner,
) -> dict[str, Pruned]:
    """Prune one layer, or those that share a statistic."""
    statistic = statistics.get(names[0])
    supports = None if task.support is None else [task.support[name] for name in names]
    if isinstance(pruner, SharingPruner):
        weights = [layers[name] for name in names]
        results = pruner.prune_shared(weights, statistic, task.target, supports)
        return dict(zip(names, results, strict=True))
    (name,) = names
    support = None if supports is None else supports[0]
    return {name: pruner.prune(layers[name], statistic, task.target, support)}


def _count(results: Sequence[Pruned]) -> tuple[list[int], list[float]]:
    """How many weights each result keeps, and its loss (0 where it has none), in one transfer."""
    numbers = []
    for _, mask, loss in results:
        # Every count that memory can hold is exact in float64.
        total = mask.new_zeros((), dtype=torch.float64) if loss is None else loss.sum().double()
        # A sum would first make an int64 of every entry.
        numbers.append(torch.stack([mask.count_nonzero().double(), total]))
    pairs = torch.stack(numbers).tolist()
    return [int(kept) for kept, _ in pairs], [loss for _, loss in pairs]


@torch.no_grad()
def propagate(block: nn.Module, stream: Stream, block_index: int) -> None:
    """Replace a stream's hidden states with what the block makes of them."""
    stream.advance(run_block(block, *inputs) for inputs in stream.inputs(block_index))


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
