"""Batches on their way between a file, main memory and a GPU, one ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future, wait
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


class Layout(NamedTuple):
    """How a batch lies in memory.

    A product may round otherwise where its input's strides differ, so that a batch comes back from
    a file with those that it had.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]


def layout_of(tensor: Tensor) -> Layout:
    """A tensor's own layout, or row-major where its elements share memory."""
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    if any(size > 1 and stride == 0 for size, stride in zip(shape, strides, strict=True)):
        strides = tuple(torch.empty(shape, device="meta").stride())
    return Layout(shape, strides)


def empty(
    layout: Layout,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    pinned: bool = False,
) -> Tensor:
    """Memory of a layout, its values undefined."""
    return torch.empty_strided(
        layout.shape, layout.strides, dtype=dtype, device=device, pin_memory=pinned
    )


def ahead(items: Iterator[Item], workers: Executor) -> Iterator[Item]:
    """The items of an iterator; while one is in use, a worker fetches the next."""
    following: Future[Item | None] = workers.submit(next, items, None)
    try:
        while (item := following.result()) is not None:
            following = workers.submit(next, items, None)
            yield item
    finally:
        # A worker that still read on would fill memory which nobody waits for.
        wait([following])


def copy_of(batch: Tensor, device: torch.device | str, *, pinned: bool = False) -> Tensor:
    """A copy of the same layout, sent to the current stream where a GPU takes part."""
    target = empty(layout_of(batch), batch.dtype, device, pinned=pinned)
    return target.copy_(batch, non_blocking=True)


class _Upload(NamedTuple):
    """A copy to a GPU that is under way; its source must live until it is done."""

    source: Tensor
    target: Tensor
    done: torch.cuda.Event


def uploads(
    batches: Iterator[Tensor], device: torch.device, side: torch.cuda.Stream
) -> Iterator[Tensor]:
    """Pinned batches on the GPU; while one is computed with, the next is copied on a side stream.

    The host waits for the copy of each batch that it hands out, and that copy for what was computed
    two batches before: so it is one batch ahead of the GPU, and memory is needed for no more.
    """
    coming: _Upload | None = None
    try:
        for batch in batches:
            here, coming = coming, _upload(batch, device, side)
            if here is not None:
                here.done.synchronize()
                yield here.target
        if coming is not None:
            coming.done.synchronize()
            yield coming.target
    finally:
        # Freed memory goes to the current stream, which knows nothing of a copy into it.
        if coming is not None:
            coming.done.synchronize()


def _upload(batch: Tensor, device: torch.device, side: torch.cuda.Stream) -> _Upload:
    # The memory is the current stream's, which uses and frees it: only what was sent there before
    # may still use it, and the copy waits for that, and with it for a source that is being written.
    target = empty(layout_of(batch), batch.dtype, device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        target.copy_(batch, non_blocking=True)
    return _Upload(batch, target, side.record_event())
