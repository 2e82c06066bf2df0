"""Decoder blocks of a checkpoint that is never whole in memory: read, pruned, written, freed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedspa.blocks import bits_only, views
from fedspa.machine import return_freed_memory
from fedspa.messages import BlockMessage, LayerMessage
from fedspa.model import (
    block_names,
    check_values,
    decoder_blocks,
    linear_layers,
    set_weights,
    stored,
)
from fedspa.streaming import journal
from fedspa.streaming.architecture import Source
from fedspa.streaming.shards import OutputShards
from fedspa.streaming.weights import Weights

T = TypeVar("T")


class StreamedBlocks:
    """One block at a time, and the next one, which is read while this one is worked on.

    What was agreed on goes into the output's shards at once where no block is opened again after
    that. With several rounds, or where clients walk agreed blocks once more, it goes into files of
    its own: a round that is killed begins a block again, and must find what the one before it left.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        folder: Path | None = None,
        *,
        opened_again: bool = False,
        versions: dict[int, int] | None = None,
    ) -> None:
        """folder: of the journal; None where nothing is pruned.

        opened_again: whether pruned blocks are opened again.
        versions: for every block that was pruned, the round that made it what it is; the run's.
        """
        self.modules = decoder_blocks(source.model)
        self.names = block_names(source.model, self.modules)
        self.device = device
        self._source = source
        self._weights = Weights(source, device)
        self._folder = folder
        # Where agreed weights go; None on ranks that only compute with them.
        self.output: OutputShards | None = None
        self._opened_again = opened_again
        self._versions = {} if versions is None else versions
        self._open: int | None = None
        self._checked: set[int] = set()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fedspa-reader")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None

    def __len__(self) -> int:
        return len(self.modules)

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Everything outside the blocks but a head of its own, and block 0."""
        with self._outside(head=False), self.open(0):
            yield

    @contextmanager
    def head(self) -> Iterator[None]:
        """Everything outside the blocks, and no block."""
        self._close()
        with self._outside(head=True):
            yield

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        """A block on the device; it stays there until another is opened."""
        block = self.modules[index]
        if self._open != index:
            self._close()
            self._weights.place(self._arrived(index))
            self._open = index
            if index not in self._checked:
                check_values(self.names[index], block)
                self._checked.add(index)
            if self._opened_again and index in self._versions:
                set_weights(block, self._journaled(index))
            self._look_ahead(index + 1)
        yield block

    def pretrained(self, index: int) -> dict[str, Tensor]:
        """As the checkpoint has them."""
        layers = linear_layers(self.modules[index])
        names = {f"{self.names[index]}.{name}.weight": name for name in layers}
        read = self._weights.read(names)
        return {
            layer: stored(layers[layer], self._weights.moved(read.pop(name)))
            for name, layer in names.items()
        }

    def keep(self, index: int, weights: dict[str, Tensor], message: BlockMessage) -> None:
        """Bring the block's weights and masks to the disk."""
        block = self.modules[index]
        set_weights(block, weights)
        if self.output is not None:
            assert self._folder is not None
            masks = self._full_names(index, bits_only(message))
            journaled = self._full_names(index, views(block)) if self._opened_again else {}
            journal.write(self._folder, index, message.round, masks, journaled)
            if not self._opened_again:
                self._write(index, views(block))
        self._versions[index] = message.round

    def receive(self, index: int, message: BlockMessage) -> None:
        """Bring a block to the disk that was agreed on elsewhere; it is opened so from now on."""
        assert self._folder is not None
        alone = any(layer.values is None for layer in message.layers.values())
        dense = self.pretrained(index) if alone else {}
        weights = {name: layer.received(dense.get(name)) for name, layer in message.layers.items()}
        masks = self._full_names(index, bits_only(message))
        journal.write(self._folder, index, message.round, masks, self._full_names(index, weights))
        self._versions[index] = message.round
        if self._open == index:
            self._close()

    def masks(self, index: int) -> dict[str, LayerMessage]:
        """As the journal has them."""
        if index not in self._versions:
            return {}
        assert self._folder is not None
        found = journal.read_masks(self._folder, index, self._versions[index])
        return self._short_names(index, found)

    def complete(self) -> None:
        """Write what no round has written: all that is not pruned, and what the journal holds."""
        self.close()
        assert self.output is not None
        rest = dict.fromkeys(self._source.checkpoint.tensors)
        for index in self._versions:
            if self._opened_again:
                self._write(index, self._journaled(index))
            for name in linear_layers(self.modules[index]):
                del rest[self._place(index, name)]
        self.output.copy(list(rest))

    def close(self) -> None:
        """Free everything, and end the thread that reads."""
        self._close()
        if self._ahead is not None:
            # Waits; an error of a block that nobody asked for any more tells nothing.
            self._ahead[1].exception()
            self._ahead = None
        self._reader.shutdown()

    @contextmanager
    def _outside(self, *, head: bool) -> Iterator[None]:
        names = self._weights.outside(self.names, head=head)
        self._weights.place(self._weights.read(names))
        try:
            yield
        finally:
            self._weights.free(names)

    def _close(self) -> None:
        if self._open is not None:
            self._weights.free(self._weights.inside(self.names[self._open]))
            self._open = None
            return_freed_memory()

    def _look_ahead(self, index: int) -> None:
        """Begin to read a block; its memory is asked for here, so that one arena holds it."""
        if index < len(self):
            buffers = self._weights.ask(self._weights.inside(self.names[index]))
            self._ahead = index, self._reader.submit(self._weights.fill, buffers)

    def _arrived(self, index: int) -> dict[str, Tensor]:
        """A block's tensors in main memory: as they were read ahead, else read now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            if ahead[0] == index:
                return ahead[1].result()
            ahead[1].exception()
        return self._weights.read(self._weights.inside(self.names[index]))

    def _journaled(self, index: int) -> dict[str, Tensor]:
        assert self._folder is not None
        found = journal.read_weights(self._folder, index, self._versions[index])
        return self._short_names(index, found)

    def _write(self, index: int, weights: dict[str, Tensor]) -> None:
        """Write weights (outputs, inputs) into the output's shards."""
        assert self.output is not None
        layers = linear_layers(self.modules[index])
        for name, weight in weights.items():
            self.output.write(self._place(index, name), stored(layers[name], weight))

    def _full_names(self, index: int, layers: dict[str, T]) -> dict[str, T]:
        return {f"{self.names[index]}.{name}": value for name, value in layers.items()}

    def _short_names(self, index: int, layers: dict[str, T]) -> dict[str, T]:
        prefix = f"{self.names[index]}."
        return {name.removeprefix(prefix): value for name, value in layers.items()}

    def _place(self, index: int, layer: str) -> str:
        return self._source.places[f"{self.names[index]}.{layer}.weight"]
