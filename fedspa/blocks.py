"""Where a run takes the decoder blocks from, and where it leaves them: one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from fedspa.messages import BlockMessage, LayerMessage
from fedspa.model import (
    block_names,
    decoder_blocks,
    device_of,
    layer_weights,
    linear_layers,
    set_weights,
    stored,
    weight_of,
)
from fedspa_kernels.checks import together


class Blocks(Protocol):
    """The decoder blocks of a model, of which a run needs one at a time.

    names: their full names, such as "model.layers.0". device: where they are computed.
    modules: the blocks as they are; what is not open may be on the meta device.
    """

    names: list[str]
    device: torch.device
    modules: nn.ModuleList

    def __len__(self) -> int:
        """How many there are."""
        ...

    def embedding(self) -> AbstractContextManager[None]:
        """While this is open, the model's weights before its blocks are there, and block 0."""
        ...

    def head(self) -> AbstractContextManager[None]:
        """While this is open, the model's weights outside its blocks are there, the head's too."""
        ...

    def open(self, index: int) -> AbstractContextManager[nn.Module]:
        """A block with the weights that it has now, on the device."""
        ...

    def pretrained(self, index: int) -> dict[str, Tensor]:
        """The prunable weights of a block before the first round, (outputs, inputs) each."""
        ...

    def keep(self, index: int, weights: dict[str, Tensor], message: BlockMessage) -> None:
        """Make the agreed weights those of the block, which is open, and remember the masks.

        weights: by layer (outputs, inputs), as the message's receivers have them.
        """
        ...

    def masks(self, index: int) -> dict[str, LayerMessage]:
        """The masks that were agreed on last, by layer; empty where none were."""
        ...


class HeldBlocks:
    """The blocks of a model that is in memory as a whole, pruned in place."""

    def __init__(self, model: nn.Module, *, remember: bool = False) -> None:
        """remember: hold the pretrained weights of pruned blocks, which are asked for again."""
        self.modules = decoder_blocks(model)
        self.names = block_names(model, self.modules)
        self.device = device_of(model)
        self.remember = remember
        self._pretrained: dict[int, dict[str, Tensor]] = {}
        self._masks: dict[int, dict[str, LayerMessage]] = {}

    def __len__(self) -> int:
        return len(self.modules)

    def embedding(self) -> AbstractContextManager[None]:
        """Everything is there."""
        return nullcontext()

    def head(self) -> AbstractContextManager[None]:
        """Everything is there."""
        return nullcontext()

    def open(self, index: int) -> AbstractContextManager[nn.Module]:
        """The block itself."""
        return nullcontext(self.modules[index])

    def pretrained(self, index: int) -> dict[str, Tensor]:
        """As remembered, or the weights themselves where the block was never pruned."""
        return self._pretrained.get(index) or views(self.modules[index])

    def keep(self, index: int, weights: dict[str, Tensor], message: BlockMessage) -> None:
        """Write into the model's own tensors."""
        block = self.modules[index]
        if self.remember and index not in self._pretrained:
            self._pretrained[index] = layer_weights(block)
        set_weights(block, weights)
        self._masks[index] = bits_only(message)

    def masks(self, index: int) -> dict[str, LayerMessage]:
        """As they were kept."""
        return self._masks.get(index, {})


def views(block: nn.Module) -> dict[str, Tensor]:
    """The prunable weights of a block themselves, (outputs, inputs) each; not copies."""
    return {name: weight_of(layer) for name, layer in linear_layers(block).items()}


def bits_only(message: BlockMessage) -> dict[str, LayerMessage]:
    """The masks of a message, without its values."""
    return {
        name: replace(layer, values=None, kept=layer.shape[0] * layer.shape[1] - layer.pruned)
        for name, layer in message.layers.items()
    }


def unpacked(masks: dict[str, LayerMessage], device: torch.device) -> dict[str, Tensor]:
    """The masks of a block as (rows, cols) bool on a device."""
    with together():
        return {
            name: replace(layer, bits=layer.bits.to(device)).mask() for name, layer in masks.items()
        }


@contextmanager
def lent(block: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Let a block hold other weights for a while, whatever happens in it; nothing is copied.

    weights: by layer (outputs, inputs).
    """
    layers = linear_layers(block)
    own: dict[str, Tensor] = {name: layers[name].weight.data for name in weights}  # type: ignore[misc]
    for name, weight in weights.items():
        lend = stored(layers[name], weight)
        if lend.shape != own[name].shape:
            raise ValueError(
                f"layer {name} has shape {tuple(own[name].shape)}, and what was made of it "
                f"{tuple(lend.shape)}"
            )
        layers[name].weight.data = lend.to(own[name]).contiguous()
    try:
        yield
    finally:
        for name, tensor in own.items():
            layers[name].weight.data = tensor
