"""What a client does with one decoder block: calibrate, prune, report. Its text stays here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedspa.calibration import BlockTask, shared_inputs
from fedspa.messages import BlockMessage, pack_layer
from fedspa.model import linear_layers, weight_of
from fedspa.pruners import Pruner, SharingPruner
from fedspa.ranks import Ranks, alone
from fedspa.walk import Stream, run_block
from fedspa_kernels import Pruned
from fedspa_kernels.checks import about, together


@dataclass(frozen=True)
class LocalResult:
    """A client's pruned block: the message for the server, and what stays with the client."""

    message: BlockMessage
    weights: dict[str, Tensor]


@torch.no_grad()
def prune(
    client: str,
    samples: int,
    block: nn.Module,
    statistics: dict[str, Tensor],
    task: BlockTask,
    pruner: Pruner,
    ranks: Ranks | None = None,
    *,
    who: str | None = None,
) -> LocalResult:
    """Prune a block's layers with their statistics; the block itself is left as it is.

    samples: the calibration windows behind the statistics; layers with the very same statistic
        are given to a pruner together that can take them so.
    ranks: which have the same statistics, and divide the layers among them; None: there is one.
    who: how errors begin; None: with the client's name.
    Raises ValueError naming the client and the layer where the pruner cannot work.
    """
    layers = {name: weight_of(layer) for name, layer in linear_layers(block).items()}
    pruned: dict[str, Pruned] = {}

    def where(names: Sequence[str]) -> str:
        which = " and ".join(f"{task.name}.{name}" for name in names)
        return f"{who or f'client {client!r}'}, layer {which}, {samples} calibration windows: "

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
    message = BlockMessage(client, task.round, task.block, samples, packed, sum(losses))
    return LocalResult(message, {name: pruned[name].weight for name in layers})


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
