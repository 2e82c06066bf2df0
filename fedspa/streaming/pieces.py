"""Tensors piece by piece: as they are stored, and as they are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fedspa.streaming.disk import opened, read_range, write_range
from fedspa.streaming.header import Stored

# Enough for a disk's full rate, little beside a weight.
PIECE = 4 << 20


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in main memory, not copied; writing to them writes to it."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_pieces(path: Path, stored: Stored) -> Iterator[Tensor]:
    """A stored tensor as flat pieces of at most PIECE bytes, one after the other.

    The pieces share one buffer: each is overwritten by the next.
    """
    count = stored.nbytes // stored.dtype.itemsize
    step = max(1, min(count, PIECE // stored.dtype.itemsize))
    buffer = torch.empty(step, dtype=stored.dtype)
    with opened(path) as file:
        for first in range(0, count, step):
            part = buffer[: count - first]
            read_range(path, file, bytes_of(part), stored.begin + first * stored.dtype.itemsize)
            yield part


def split(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of a tensor in row-major order, as views of about PIECE bytes.

    A tensor that is not contiguous is cut between its first dimension's rows.
    """
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        tensor = tensor.reshape(-1)
    row = tensor.numel() // tensor.shape[0] * tensor.element_size()
    yield from tensor.split(max(1, PIECE // row))


def write_pieces(path: Path, file: int, at: Stored, pieces: Iterable[Tensor]) -> None:
    """Write the pieces of one tensor, from any device and of any dtype, one behind the other.

    What has to be converted or moved goes through one buffer of a piece's size.
    """
    begin, buffer = at.begin, torch.empty(0, dtype=at.dtype)
    for piece in pieces:
        ready = piece.dtype == at.dtype and piece.device.type == "cpu" and piece.is_contiguous()
        if not ready:
            if buffer.numel() < piece.numel():
                buffer = torch.empty(piece.numel(), dtype=at.dtype)
            piece = buffer[: piece.numel()].view(piece.shape).copy_(piece)
        content = bytes_of(piece)
        write_range(path, file, content, begin)
        begin += len(content)
