"""Hidden states on the GPU, in main memory or in files, whichever they fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspa.streaming.generations import (
    GenerationFile,
    pack_layouts,
    read_whole,
    unpack_layouts,
)
from fedspa.streaming.placement import PLACEMENTS, choose_placement
from fedspa.streaming.transfers import Layout, ahead, copy_of, layout_of, uploads

__all__ = ["PLACEMENTS", "Hidden", "choose_placement"]


@dataclass
class _Generation:
    """Hidden states between two blocks.

    batches: as they lay when they were made. held: they, None where a successor took the place;
    empty where they are on disk. file: where they were written to, None without a folder.
    """

    number: int
    file: GenerationFile | None
    batches: list[Layout] = field(default_factory=list)
    dtype: torch.dtype | None = None
    held: list[Tensor | None] = field(default_factory=list)


class Hidden:
    """Hidden states of one client, batch by batch; to be used like a list of tensors.

    device:    where the blocks are computed, and where iteration yields the batches
    placement: "gpu" keeps them there, which on a CPU is main memory; "host" in main memory, which
               is pinned where the device is a GPU, and the next batch is copied while this one is
               computed with; "disk" in `folder` alone, from where the next batch is read ahead
    folder:    where every generation is written to as it is made, whatever the placement: a run
               that is killed goes on with it. None: nothing is written
    name:      of the files, `NAME.GENERATION`; of every Hidden in a folder its own

    The same bits come back from every placement, with the strides that they had.
    Raises ValueError for a placement or a name that cannot be, OSError where the disk refuses.
    """

    def __init__(
        self,
        device: torch.device | str,
        placement: str = "gpu",
        folder: str | Path | None = None,
        name: str = "hidden",
    ) -> None:
        if placement not in PLACEMENTS:
            raise ValueError(
                f"hidden states: placement {placement!r} is unknown; choose one of "
                f"{list(PLACEMENTS)}"
            )
        if placement == "disk" and folder is None:
            raise ValueError("hidden states: placement 'disk' needs a folder; give one")
        if not name or Path(name).name != name:
            raise ValueError(f"hidden states: {name!r} cannot be the name of a file; give another")
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._placement = placement
        self._folder = None if folder is None else Path(folder)
        self.name = name
        # One to read and one to write; threads start when there is something to do.
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="activations")
        self._side = torch.cuda.Stream(self._device) if self._cuda and placement != "gpu" else None
        self._copied: torch.cuda.Event | None = None
        self._current = self._generation(0)
        self._marked: _Generation | None = None
        # Of the generation that was marked last; a committed state may name its file.
        self._last_mark: int | None = None

    def __len__(self) -> int:
        return len(self._current.batches)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every batch."""
        return [layout.shape for layout in self._current.batches]

    def __iter__(self) -> Iterator[Tensor]:
        """Every batch on the device, in order.

        Raises RuntimeError where an error in `replace` has left only a part of them.
        """
        if self._placement != "disk":
            batches = self._held(self._current)
        else:
            batches = ahead(self._read(self._current), self._workers)
        return batches if self._side is None else uploads(batches, self._device, self._side)

    def append(self, batch: Tensor) -> None:
        """Add a batch behind the last; all have one dtype.

        On a CPU the tensor itself is kept and handed out, not a copy.
        Raises ValueError for another dtype, OSError where the disk refuses it or the one before.
        """
        self._add(self._current, batch)

    def replace(self, batches: Iterable[Tensor]) -> None:
        """Take other batches, one by one, in place of these; a new generation.

        batches: may be an iterator that reads these, in order and at most one ahead of what it
            yields: each is let go when its successor is there, unless it is marked. The file of
            the former generation stays until `settle`.
        """
        former, made = self._current, self._generation(self._current.number + 1)
        for batch in batches:
            index = len(made.batches)
            self._add(made, batch)
            if index < len(former.held) and former is not self._marked:
                former.held[index] = None
            # Otherwise it would live until the next is there, on the device as well; enumerate
            # would keep it, too.
            del batch
        if former.file is not None:
            former.file.wait()
            former.file.close()
        self._current = made

    def mark(self) -> None:
        """Keep this generation, whatever replaces it, until `rewind`."""
        self._marked, self._last_mark = self._current, self._current.number

    def rewind(self) -> None:
        """Go back to the generation that was marked, and keep it no longer."""
        assert self._marked is not None
        former, self._current, self._marked = self._current, self._marked, None
        if former is not self._current and former.file is not None:
            former.file.wait()
            former.file.close()
        # The generations after it get its successors' numbers, and so their files.
        self._remove({self._current.number})

    def flush(self) -> None:
        """Bring this generation to the disk itself, so that a committed state may name it."""
        if self._current.file is not None:
            self._current.file.sync()

    def describe(self) -> dict[str, Any]:
        """Plain values that `restore` finds this generation with, also after a way through JSON."""
        current = self._current
        if current.file is None:
            raise ValueError(f"hidden states {self.name!r} are in no file; give them a folder")
        current.file.wait()
        return {
            "generation": current.number,
            "batches": pack_layouts(current.batches),
            "dtype": None if current.dtype is None else str(current.dtype).removeprefix("torch."),
            "nbytes": current.file.nbytes,
            "checksum": current.file.checksum,
        }

    def restore(self, description: dict[str, Any]) -> None:
        """Take the generation that a killed run described, from its file.

        Raises RuntimeError where the file is missing, has another size or is damaged; these hidden
        states are then as before.
        """
        found = self._generation(description["generation"])
        if found.file is None:
            raise ValueError(f"hidden states {self.name!r} have no folder; give the killed run's")
        found.file.nbytes, found.file.checksum = description["nbytes"], description["checksum"]
        found.batches = unpack_layouts(description["batches"])
        found.dtype = description["dtype"] and getattr(torch, description["dtype"])
        batches = ahead(self._read(found), self._workers)
        for batch in read_whole(found.file, batches) if found.batches else ():
            if self._placement == "gpu":
                found.held.append(copy_of(batch, self._device) if self._cuda else batch)
            elif self._placement == "host":
                found.held.append(batch)
        self._current = found

    def settle(self) -> None:
        """Remove the files of all other generations: a state that names this one is committed."""
        self._last_mark = None
        self._remove({self._current.number})

    def trim(self) -> None:
        """Remove the files of all generations but this one, and the one that was marked last.

        That is the one which the committed state names, until `settle`.
        """
        marked = () if self._last_mark is None else (self._last_mark,)
        self._remove({self._current.number, *marked})

    def clear(self) -> None:
        """Let all batches go and remove their files, which a committed state must not name."""
        if self._current.file is not None:
            self._current.file.close()
        self._current = self._generation(self._current.number + 1)
        self._marked = self._last_mark = None
        self._remove(set())

    def _generation(self, number: int) -> _Generation:
        if self._folder is None:
            return _Generation(number, None)
        path = self._folder / f"{self.name}.{number}"
        return _Generation(number, GenerationFile(path, self._workers))

    def _add(self, generation: _Generation, batch: Tensor) -> None:
        if generation.dtype not in (None, batch.dtype):
            raise ValueError(
                f"hidden states {self.name!r}: batch {len(generation.batches)} is {batch.dtype}, "
                f"the ones before it are {generation.dtype}; a model must keep to one dtype"
            )
        host, copied = batch, None
        if self._cuda and (self._placement == "host" or generation.file is not None):
            host, copied = self._to_host(batch)
        if self._placement == "gpu":
            generation.held.append(batch.to(self._device))
        elif self._placement == "host":
            generation.held.append(host)
        generation.dtype = batch.dtype
        generation.batches.append(layout_of(batch))
        if generation.file is not None:
            generation.file.write(host, copied)

    def _to_host(self, batch: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """A pinned copy, and what it is finished with."""
        # The host is never more than one batch ahead of the GPU. Otherwise it would ask for pinned
        # memory anew for each while the copies that the old memory is needed for still wait.
        if self._copied is not None:
            self._copied.synchronize()
        host = copy_of(batch, "cpu", pinned=True)
        self._copied = torch.cuda.current_stream(self._device).record_event()
        return host, self._copied

    def _held(self, generation: _Generation) -> Iterator[Tensor]:
        for index in range(len(generation.held)):
            batch = generation.held[index]
            if batch is None:
                raise RuntimeError(
                    f"hidden states {self.name!r}: batch {index} of {len(generation.held)} was "
                    f"let go while they were replaced, and an error ended that; start the run anew"
                )
            yield batch

    def _read(self, generation: _Generation) -> Iterator[Tensor]:
        assert generation.file is not None
        if not generation.batches:
            return
        assert generation.dtype is not None
        yield from generation.file.read(generation.batches, generation.dtype, pinned=self._cuda)

    def _remove(self, keep: set[int]) -> None:
        if self._folder is None or not self._folder.is_dir():
            return
        for path in list(self._folder.iterdir()):
            name, _, number = path.name.rpartition(".")
            if name == self.name and number.isdecimal() and int(number) not in keep:
                path.unlink()
