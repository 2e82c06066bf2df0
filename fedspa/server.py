"""What the server does: draw the blocks of each client, average what was kept, expand the mask."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspa.messages import BlockMessage, LayerMessage, pack_layer
from fedspa.ranks import Ranks
from fedspa.schedule import Target, message_dtype
from fedspa.settings import Settings
from fedspa_kernels import L0Accumulator, expand_mask
from fedspa_kernels.checks import together

# Entries that a CPU computes with at a time: they stay in its cache, whatever temporaries it takes.
PART = 2**18


def blocks_per_client(capacities: Sequence[float], blocks: int, limit: int | None) -> list[int]:
    """max(1, round(capacity * limit)) blocks for each client; limit None: all of the model's."""
    most = blocks if limit is None else min(limit, blocks)
    return [max(1, round(capacity * most)) for capacity in capacities]


def sample_blocks(
    counts: Sequence[int], blocks: int, seed: int | str, every_block: bool
) -> list[list[int]]:
    """Draw each client's decoder blocks uniformly, without replacement (FedSpaLLM, section 3.3).

    counts: how many blocks each client prunes. every_block: deal the shuffled blocks out first,
    so that each has a client, then fill up uniformly.
    returns: for every client a sorted list of block indices.
    raises: ValueError where every block should be drawn and the counts do not add up to them.
    """
    draw = random.Random(seed)
    chosen: list[set[int]] = [set() for _ in counts]
    if every_block:
        if sum(counts) < blocks:
            raise ValueError(
                f"settings: every_block needs clients for {blocks} blocks, but their capacities "
                f"add up to {sum(counts)}; raise capacities or layers_per_client, or add clients"
            )
        for block in draw.sample(range(blocks), blocks):
            room = [i for i, count in enumerate(counts) if len(chosen[i]) < count]
            free = [counts[i] - len(chosen[i]) for i in room]
            chosen[draw.choices(room, weights=free)[0]].add(block)
    for mine, count in zip(chosen, counts, strict=True):
        others = [block for block in range(blocks) if block not in mine]
        mine.update(draw.sample(others, count - len(mine)))
    return [sorted(mine) for mine in chosen]


def draw_clients(
    clients: int, blocks: int, participation: float, dropout: float, seed: str
) -> list[int]:
    """How many of the model's blocks each client is there for in a round, from the first on.

    participation: share of the clients, at least one of them, that are there at all; the others
    have 0 blocks. dropout: probability that one leaves before a uniformly drawn block.
    """
    draw = random.Random(f"{seed}/clients")
    present = set(draw.sample(range(clients), max(1, round(participation * clients))))
    until = [blocks if client in present else 0 for client in range(clients)]
    leaves = [(draw.random() < dropout, draw.randrange(blocks)) for _ in range(clients)]
    return [
        min(there, block) if leaving else there
        for there, (leaving, block) in zip(until, leaves, strict=True)
    ]


@dataclass(frozen=True)
class AgreedLayer:
    """A layer after aggregation: weight (rows, cols), its mask, and how often weights were kept.

    histogram: for v = 0 .. clients the number of weights that exactly v clients kept.
    kept: how many weights the mask keeps.
    """

    weight: Tensor
    mask: Tensor
    histogram: tuple[int, ...]
    kept: int


class BlockAggregation:
    """Sums over the clients of one block, one client at a time: memory of one block, whatever C.

    The arithmetic is a sum in the order of the messages; a caller who wants the same bits
    whatever the order of arrival adds them in an order of its own.
    """

    def __init__(self, dense: dict[str, Tensor], settings: Settings) -> None:
        """dense: the block's weights before this round, as the server holds them."""
        self.dense = dense
        self.settings = settings
        self.clients = 0
        self._samples = 0
        self._sums: dict[str, L0Accumulator] = {}

    def add(self, message: BlockMessage) -> None:
        """Add one client's pruned block.

        Raises ValueError where it is not this block's (the sums are then as before), or where its
        bits or values are damaged (the sums are then of no use).
        """
        if message.layers.keys() != self.dense.keys():
            raise ValueError(
                f"{message.sender!r} sent layers {sorted(message.layers)} for block "
                f"{message.block}, which has {sorted(self.dense)}"
            )
        for name, layer in message.layers.items():
            shape = tuple(self.dense[name].shape)
            if layer.shape != shape:
                raise ValueError(
                    f"{message.sender!r} sent shape {layer.shape} for layer {name} of block "
                    f"{message.block}, which has {shape}"
                )
        with together():
            for name, layer in message.layers.items():
                self._add_layer(name, layer, message.samples)
        self.clients += 1
        self._samples += message.samples

    def _add_layer(self, name: str, layer: LayerMessage, samples: int) -> None:
        dense = self.dense[name]
        if name not in self._sums:
            self._sums[name] = L0Accumulator(dense.shape, dense.device)
        if self.settings.aggregation == "mask":
            self._sums[name].add(dense, layer.mask())
        else:
            importance = float(samples) if self.settings.weighed == "samples" else 1.0
            self._sums[name].add(layer.weight(), layer.mask(), importance=importance)

    def add_other_ranks(self, ranks: Ranks) -> None:
        """Add what the other ranks' clients sent, in place; every rank then has the same sums."""
        weighted = self.settings.weighed == "samples" and self.settings.aggregation != "mask"
        counts = ranks.gather((self.clients, self._samples))
        self.clients = sum(clients for clients, _ in counts)
        self._samples = sum(samples for _, samples in counts)
        for name, dense in self.dense.items():
            sums = self._sums.setdefault(name, L0Accumulator(dense.shape, dense.device))
            sums.merge(ranks.sum_, self.clients, weighted=weighted)

    def agree(self, target: Target) -> dict[str, AgreedLayer]:
        """Average and expand every layer to the target; raises ValueError without a client."""
        if not self.clients:
            raise ValueError("no client sent this block, so there is nothing to aggregate")
        with together():
            layers = {name: self._agree_layer(name, target) for name in self.dense}
            # One transfer for the numbers of all layers, as for all checks: each waits for a GPU.
            counted = [
                _count_votes(self._sums[name].votes, mask, self.clients)
                for name, (_, mask) in layers.items()
            ]
            numbers = torch.stack(counted).tolist()
        return {
            name: AgreedLayer(weight, mask, tuple(histogram), kept)
            for (name, (weight, mask)), (kept, *histogram) in zip(
                layers.items(), numbers, strict=True
            )
        }

    def _agree_layer(self, name: str, target: Target) -> tuple[Tensor, Tensor]:
        """The layer's weight and mask, (rows, cols) both."""
        votes = self._sums[name].votes
        weight = self._average(self._sums[name], self.dense[name])
        mask = expand_mask(
            votes,
            self.clients,
            sparsity=target.sparsity,
            pattern=target.pattern,
            scores=weight.abs(),
            group=self.settings.expansion,
        )
        return _zero_pruned_(weight, mask), mask

    def _average(self, sums: L0Accumulator, dense: Tensor) -> Tensor:
        """The layer's weight before it is masked, a new contiguous tensor."""
        if self.settings.aggregation == "mask":
            if self.settings.scaling:
                return (dense * (sums.votes / self.clients)).to(dense.dtype).contiguous()
            return dense.clone(memory_format=torch.contiguous_format)
        if self.settings.aggregation == "l0":
            return sums.weight(dense.dtype)
        divisor = self._samples if self.settings.weighed == "samples" else self.clients
        return (sums.total / divisor).to(dense.dtype)


def _zero_pruned_(weight: Tensor, mask: Tensor) -> Tensor:
    """Set to 0 what the mask does not keep, in place: (rows, cols) both, contiguous."""
    if weight.device.type != "cpu":
        return weight.masked_fill_(~mask, 0)
    # Ten times as fast on a CPU. The bits are multiplied and not the numbers, of which a product
    # with 0 would keep the sign, and NaN.
    bits = weight.view(torch.int32 if weight.element_size() == 4 else torch.int16).view(-1)
    for part, kept in zip(bits.split(PART), mask.view(-1).split(PART), strict=True):
        part.mul_(kept.to(part.dtype))
    return weight


def _count_votes(votes: Tensor, mask: Tensor, clients: int) -> Tensor:
    """How many weights the mask keeps, then how many got 0 .. clients votes: int64.

    bincount would ask the device for the largest vote, which waits.
    """
    narrow = torch.uint8 if clients < 256 else torch.int32
    if votes.device.type != "cpu":
        votes = votes.to(narrow)
        kept_by = torch.stack([(votes == v).sum() for v in range(clients + 1)])
    else:
        # A sum would make an int64 of every entry first, and a comparison takes longer than what
        # is 0 where both are equal.
        parts = [part.to(narrow) for part in votes.view(-1).split(PART)]
        other = [[(part ^ v).count_nonzero() for v in range(clients + 1)] for part in parts]
        kept_by = votes.numel() - torch.stack([torch.stack(part) for part in other]).sum(0)
    return torch.cat([mask.count_nonzero().view(1), kept_by])


def pack_block(
    agreed: dict[str, AgreedLayer], round_index: int, block: int, settings: Settings
) -> BlockMessage:
    """The agreed block as the message that its clients receive."""
    dtype = message_dtype(settings)
    # Scaled weights are not those that the clients hold.
    mask_only = settings.aggregation == "mask" and not settings.scaling
    with together():
        layers = {
            name: pack_layer(layer.weight, layer.mask, dtype, mask_only, layer.kept)
            for name, layer in agreed.items()
        }
    return BlockMessage("server", round_index, block, 0, layers)


def received_weights(message: BlockMessage, agreed: dict[str, AgreedLayer]) -> dict[str, Tensor]:
    """What every holder of the message has: the model must not keep digits that were not sent."""
    with together():
        return {
            name: agreed[name].weight if _holds_all(layer, agreed[name]) else layer.weight()
            for name, layer in message.layers.items()
        }


def _holds_all(layer: LayerMessage, agreed: AgreedLayer) -> bool:
    """Whether a message's receiver has the agreed weight bit for bit."""
    return layer.values is None or layer.values.dtype == agreed.weight.dtype
