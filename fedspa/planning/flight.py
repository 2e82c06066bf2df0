"""What a batch takes on its way through a block: traced on the meta device, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedspa.model import linear_layers
from fedspa.planning.architecture import Architecture, Kind, Layer
from fedspa.planning.meter import metered
from fedspa.walk import embed, run_block


@dataclass(frozen=True)
class Flight:
    """A batch in a block.

    groups: the layers of one input each, which share a statistic, in the order in which they are
        called.
    calibrate: bytes beside the input at the worst moment of a pass that gathers, with what that
        holds of the layers' inputs. propagate: of a whole pass, its output included.
    hidden: bytes of the batch itself. arguments: of what the blocks are called with beside it.
    traced: False where the block does not run on the meta device: then it is a bound from above.
    """

    groups: tuple[tuple[Layer, ...], ...]
    calibrate: int
    propagate: int
    hidden: int
    arguments: int
    traced: bool = True


def fly(architecture: Architecture, batch: int, length: int) -> tuple[Flight, ...]:
    """A batch (windows, length) through one block of every kind."""
    size = architecture.dtype.itemsize
    hidden = batch * length * architecture.width * size
    try:
        tokens = torch.empty((batch, length), dtype=torch.int64, device="meta")
        with metered(()):
            stream = embed(architecture.model, architecture.blocks, tokens, batch)
            (call,) = stream.arguments.values()
        arguments = _distinct(call)
        (first,) = stream.hidden
        return tuple(
            _trace(architecture.blocks[k.first], k, first, call[k.first], arguments)
            for k in architecture.kinds
        )
    except (RuntimeError, NotImplementedError, TypeError):
        # Experts are chosen by values, for one, which are not there.
        return tuple(_bound(kind, batch * length, size, hidden) for kind in architecture.kinds)


def _trace(
    block: nn.Module, kind: Kind, hidden: Tensor, call: tuple[Any, dict[str, Any]], arguments: int
) -> Flight:
    there = [hidden, *block.parameters(), *block.buffers(), *_tensors(call)]
    with torch.no_grad(), metered(there) as meter:
        output = run_block(block, hidden, *call)
        propagate = meter.peak
        del output
    with torch.no_grad(), metered(there) as meter:
        names = _sharing(block, partial(run_block, block, hidden, *call))
    by_name = {layer.name: layer for layer in kind.layers}
    groups = tuple(tuple(by_name[name] for name in group) for group in names)
    missing = [(layer,) for layer in kind.layers if not any(layer in group for group in groups)]
    hidden_bytes = hidden.numel() * hidden.element_size()
    return Flight((*groups, *missing), meter.peak, propagate, hidden_bytes, arguments)


class _AllCalled(Exception):
    """Ends a pass whose every layer was called."""


def _sharing(block: nn.Module, run: Any) -> list[list[str]]:
    """Names of layers by the tensor that they are called with; it is held as calibration does."""
    layers = linear_layers(block)
    inputs: dict[int, Tensor] = {}
    groups: dict[int, list[str]] = {}
    called: set[str] = set()

    def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[id(args[0])] = args[0]
        groups.setdefault(id(args[0]), []).append(name)
        called.add(name)
        if len(called) == len(layers):
            raise _AllCalled

    handles = [
        layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()
    ]
    try:
        with suppress(_AllCalled):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return list(groups.values())


def _bound(kind: Kind, tokens: int, size: int, hidden: int) -> Flight:
    """As if nothing was freed, and every layer had an input of its own."""
    everything = tokens * size * sum(layer.rows + layer.cols for layer in kind.layers)
    groups = tuple((layer,) for layer in kind.layers)
    return Flight(groups, everything, everything + hidden, hidden, 0, traced=False)


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict):
        yield from _tensors(list(nested.values()))
    elif isinstance(nested, list | tuple):
        for part in nested:
            yield from _tensors(part)


def _distinct(calls: Iterable[Any]) -> int:
    storages = {
        id(t.untyped_storage()): t.untyped_storage().nbytes() for t in _tensors(list(calls))
    }
    return sum(storages.values())
