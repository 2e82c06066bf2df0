"""Hidden states in files, one for each time that they were replaced: their bytes alone."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspa.streaming.disk import named, opened, read_range, sync_folder, write_range
from fedspa.streaming.pieces import bytes_of
from fedspa.streaming.transfers import Layout, empty


class GenerationFile:
    """The file of one generation, written behind the caller's back, one batch under way at most.

    path:     the batches one after the other, row-major, without a head
    nbytes:   what was written of it
    checksum: the CRC-32 of that
    """

    def __init__(self, path: Path, workers: Executor, nbytes: int = 0, checksum: int = 0) -> None:
        """nbytes, checksum: of a file that is there already."""
        self.path = path
        self.nbytes = nbytes
        self.checksum = checksum
        self._workers = workers
        self._file: io.FileIO | None = None
        self._pending: Future[None] | None = None

    def write(self, batch: Tensor, copied: torch.cuda.Event | None) -> None:
        """Append a batch that lies in main memory and is not changed any more.

        copied: what a copy of it from the GPU is finished with.
        Raises OSError where the disk refuses this batch or, more often, the one before.
        """
        self.wait()
        self._pending = self._workers.submit(self._write, batch, copied)

    def _write(self, batch: Tensor, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        if self._file is None:
            self._file = io.FileIO(self.path, "r+" if self.nbytes else "w")
        content = bytes_of(batch.contiguous())
        write_range(self.path, self._file.fileno(), content, self.nbytes)
        self.checksum = zlib.crc32(content, self.checksum)
        self.nbytes += len(content)

    def wait(self) -> None:
        """Wait until everything is written; raises OSError, every time, where it could not be."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def sync(self) -> None:
        """Bring the file and its name to the disk itself; raises OSError where it refuses."""
        self.wait()
        if self._file is not None:
            with named(self.path):
                os.fsync(self._file.fileno())
            sync_folder(self.path.parent)

    def close(self) -> None:
        """Stop writing, whatever became of it; the file stays."""
        if self._pending is not None:
            wait([self._pending])
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(
        self, layouts: Sequence[Layout], dtype: torch.dtype, *, pinned: bool
    ) -> Iterator[Tensor]:
        """Each batch in main memory of its own.

        pinned: memory that a GPU can copy from by itself.
        Raises RuntimeError where the file ends before, OSError where the disk fails.
        """
        self.wait()
        with opened(self.path) as file:
            begin = 0
            for layout in layouts:
                batch = torch.empty(layout.shape, dtype=dtype, pin_memory=pinned)
                read_range(self.path, file, bytes_of(batch), begin)
                begin += batch.nbytes
                if batch.stride() != layout.strides:
                    batch = empty(layout, dtype, pinned=pinned).copy_(batch)
                yield batch


def read_whole(file: GenerationFile, batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """The batches of a file that a killed run left, its checksum compared behind the last.

    Raises RuntimeError where the file is missing, has another size or is damaged.
    """
    way_out = "start over with --restart"
    if not file.path.is_file():
        raise RuntimeError(
            f"{file.path}: the hidden states of the interrupted run are gone, so that it cannot "
            f"be continued; {way_out}"
        )
    size = file.path.stat().st_size
    if size != file.nbytes:
        raise RuntimeError(
            f"{file.path}: the hidden states of the interrupted run should have {file.nbytes} "
            f"bytes, but the file has {size}; it was cut or changed since: {way_out}"
        )
    checksum = 0
    for batch in batches:
        checksum = zlib.crc32(bytes_of(batch.contiguous()), checksum)
        yield batch
    if checksum != file.checksum:
        raise RuntimeError(
            f"{file.path}: the hidden states of the interrupted run are damaged (CRC-32 "
            f"{checksum:08x}, {file.checksum:08x} when they were written); {way_out}"
        )


def pack_layouts(layouts: Sequence[Layout]) -> list[list[Any]]:
    """Layouts as plain values: [count, shape, strides] for equal ones in a row."""
    return [
        [len(list(same)), list(layout.shape), list(layout.strides)]
        for layout, same in groupby(layouts)
    ]


def unpack_layouts(packed: Sequence[Sequence[Any]]) -> list[Layout]:
    """What pack_layouts packed, also after a way through JSON."""
    return [
        layout
        for count, shape, strides in packed
        for layout in [Layout(tuple(shape), tuple(strides))] * count
    ]
