"""The output's shards: laid out whole at the start, filled tensor by tensor, named at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspa.streaming.checkpoint import INDEX, Checkpoint
from fedspa.streaming.disk import PARTIAL, named, reopen, reserve, sync_folder, write_whole
from fedspa.streaming.header import Shard, Stored, lay_out
from fedspa.streaming.pieces import bytes_of, read_pieces, read_range, split, write_pieces


class OutputShards:
    """Shards with the names, tensors and metadata of a checkpoint's, filled in any order.

    Each is `NAME.partial` in `folder` until `finish`. Its header is written and its full size
    reserved at the start, so that a full disk is found before any work.

    checkpoint:  where names, shapes and metadata come from, and what `copy` copies
    dtypes:      of tensors that are to be stored in another dtype than the checkpoint's; integers
                 and booleans keep theirs in any case
    resume:      take up the files of a killed run, finished tensors included

    Raises ValueError where the folder is the checkpoint's, or the files to take up are missing or
    of another layout; OSError (errno ENOSPC, EFBIG, ...) where the disk refuses, and then leaves
    no file of its own behind.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: str | Path,
        dtypes: Mapping[str, torch.dtype],
        *,
        resume: bool = False,
    ):
        self.checkpoint, self.folder = checkpoint, Path(folder)
        if self.folder.resolve() == checkpoint.folder.resolve():
            raise ValueError(
                f"{folder} holds the checkpoint that is read; choose another folder for the output"
            )
        layouts = _lay_out(checkpoint, dtypes)
        self.tensors = {n: at for _, shard in layouts.values() for n, at in shard.tensors.items()}
        # What a killed run has written, only its caller knows.
        self._unwritten = set() if resume else set(self.tensors)
        self._files: dict[str, int] = {}
        try:
            if not resume:
                # The space of a former run's files goes first; it may be what these need.
                for file in layouts:
                    self._partial(file).unlink(missing_ok=True)
            for file, (head, shard) in layouts.items():
                take = reopen if resume else reserve
                self._files[file] = take(self._partial(file), head, shard.nbytes)
        except BaseException:
            self.close()
            if not resume:
                for file in layouts:
                    self._partial(file).unlink(missing_ok=True)
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor from any device, converted piece by piece to the file's dtype.

        Raises ValueError where the shape is not the checkpoint's, OSError where the disk refuses.
        """
        at = self.tensors[name]
        if tuple(tensor.shape) != at.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but {at.shape} in the checkpoint; write "
                f"it in the checkpoint's shape"
            )
        self._write(at, split(tensor.detach()))
        self._unwritten.discard(name)

    def copy(self, names: Iterable[str]) -> None:
        """Copy tensors from the checkpoint, converted where the dtypes differ."""
        for name in names:
            source = self.checkpoint.tensors[name]
            pieces = read_pieces(self.checkpoint.folder / source.file, source)
            self._write(self.tensors[name], pieces)
            self._unwritten.discard(name)

    def read(self, name: str) -> Tensor:
        """A tensor as it was written, in memory of its own."""
        at = self.tensors[name]
        out = torch.empty(at.shape, dtype=at.dtype)
        read_range(self._partial(at.file), self._files[at.file], bytes_of(out), at.begin)
        return out

    def sync(self) -> None:
        """Bring everything written so far to the disk."""
        for file, descriptor in self._files.items():
            with named(self._partial(file)):
                os.fsync(descriptor)
        sync_folder(self.folder)

    def finish(self) -> None:
        """Bring the shards to the disk, give them their names, and write the index where one was.

        Raises RuntimeError where a tensor was never written, OSError where the disk refuses.
        """
        if self._unwritten:
            raise RuntimeError(
                f"{len(self._unwritten)} of {len(self.tensors)} tensors were never written, "
                f"{min(self._unwritten)} among them; write or copy every tensor before finish"
            )
        self.sync()
        files = list(self._files)
        self.close()
        for file in files:
            self._partial(file).rename(self.folder / file)
        if self.checkpoint.index is not None:
            index = _index(self.checkpoint.index, self.tensors)
            write_whole(self.folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")
        sync_folder(self.folder)

    def close(self) -> None:
        """Close the files; what was written stays."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _partial(self, file: str) -> Path:
        return self.folder / (file + PARTIAL)

    def _write(self, at: Stored, pieces: Iterable[Tensor]) -> None:
        write_pieces(self._partial(at.file), self._files[at.file], at, pieces)


def output_bytes(checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes that the output's shards and their index will take."""
    layouts = _lay_out(checkpoint, dtypes)
    total = sum(shard.nbytes for _, shard in layouts.values())
    return total + (len(json.dumps(checkpoint.index, indent=2)) if checkpoint.index else 0)


def _lay_out(
    checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype]
) -> dict[str, tuple[bytes, Shard]]:
    layouts = {}
    for file, metadata in checkpoint.metadata.items():
        tensors = [
            (name, dtypes.get(name, at.dtype) if at.dtype.is_floating_point else at.dtype, at.shape)
            for name, at in checkpoint.tensors.items()
            if at.file == file
        ]
        # Readers ask the metadata for which framework the tensors are.
        layouts[file] = lay_out(file, tensors, {"format": "pt"} | metadata)
    return layouts


def _index(index: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Any]:
    metadata = index.get("metadata") or {}
    size = sum(at.nbytes for at in tensors.values())
    return {**index, "metadata": {**metadata, "total_size": size}}
