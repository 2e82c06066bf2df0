"""A checkpoint folder as it lies on disk: which tensor is where, and its bytes on demand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspa.streaming.disk import opened, read_range
from fedspa.streaming.header import NAMES, Shard, Stored, read_header
from fedspa.streaming.pieces import bytes_of, read_pieces

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)

# What a digest reads: everything of a model below WHOLE_MODEL, every tensor up to WHOLE_TENSOR, and
# of larger ones SAMPLES pieces. A 140 GB checkpoint is then told apart in seconds.
WHOLE_MODEL = 1 << 30
WHOLE_TENSOR = 1 << 20
SAMPLES, SAMPLE = 64, 4096


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint (by file, then offset), the shards' metadata and the index."""

    folder: Path
    tensors: dict[str, Stored]
    metadata: dict[str, dict[str, str]]
    index: dict[str, Any] | None

    @property
    def files(self) -> list[str]:
        """The names of the shards."""
        return list(self.metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.nbytes for stored in self.tensors.values())


def find_checkpoint(folder: str | Path) -> bool:
    """Whether a folder holds safetensors at all: a single file, or an index of shards."""
    return any((Path(folder) / name).is_file() for name in (SINGLE, INDEX))


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the headers of a checkpoint's shards; no weight is read.

    A single model.safetensors goes before an index, as in transformers.
    Raises ValueError, naming the file, where a shard is missing, truncated or damaged, where index
    and shards disagree, or where the weights are quantised.
    """
    folder = Path(folder)
    if not find_checkpoint(folder):
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}; name a checkpoint's folder")
    if (folder / SINGLE).is_file():
        index, files = None, [SINGLE]
    else:
        index = _read_index(folder / INDEX)
        files = sorted(set(index["weight_map"].values()))
        _check_present(folder, files)
    shards = {file: read_header(folder / file) for file in files}
    if index is not None:
        _check_index(folder, index["weight_map"], shards)
    tensors = {name: at for shard in shards.values() for name, at in shard.tensors.items()}
    for name, stored in tensors.items():
        _check_dtype(folder, name, stored)
    metadata = {file: shard.metadata for file, shard in shards.items()}
    return Checkpoint(folder, tensors, metadata, index)


def read_into(checkpoint: Checkpoint, name: str, out: Tensor) -> None:
    """Read a tensor into `out`: contiguous main memory, pinned or not, of its dtype and shape.

    Raises ValueError where `out` is anything else, OSError or RuntimeError where reading fails.
    """
    stored = checkpoint.tensors[name]
    fits = out.dtype == stored.dtype and tuple(out.shape) == stored.shape
    if not (fits and out.device.type == "cpu" and out.is_contiguous()):
        raise ValueError(
            f"{name} is {stored.dtype} of shape {stored.shape}; it cannot be read into "
            f"{out.dtype} of shape {tuple(out.shape)} and strides {out.stride()} on {out.device}"
        )
    path = checkpoint.folder / stored.file
    with opened(path) as file:
        read_range(path, file, bytes_of(out), stored.begin)


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of the checkpoint, in memory of its own."""
    stored = checkpoint.tensors[name]
    out = torch.empty(stored.shape, dtype=stored.dtype)
    read_into(checkpoint, name, out)
    return out


def content_digest(checkpoint: Checkpoint) -> str:
    """sha256 over names, dtypes, shapes and bytes, the same however the tensors are sharded.

    Of a tensor over 1 MiB in a model of 1 GiB or more, only 64 pieces of 4 KiB are read, spread
    evenly from its first byte to its last: a change between them goes unseen.
    """
    digest, whole = sha256(), checkpoint.nbytes < WHOLE_MODEL
    for name, stored in sorted(checkpoint.tensors.items()):
        digest.update(json.dumps([name, NAMES[stored.dtype], stored.shape]).encode())
        path = checkpoint.folder / stored.file
        if whole or stored.nbytes <= WHOLE_TENSOR:
            for piece in read_pieces(path, stored):
                digest.update(bytes_of(piece))
        else:
            for sample in _samples(path, stored):
                digest.update(sample)
    return digest.hexdigest()


def _samples(path: Path, stored: Stored) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(SAMPLE))
    with opened(path) as file:
        for number in range(SAMPLES):
            offset = (stored.nbytes - SAMPLE) * number // (SAMPLES - 1)
            read_range(path, file, buffer, stored.begin + offset)
            yield buffer


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); copy it again") from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{path} has no weight_map that says where the weights are; copy it again")
    for name, file in places.items():
        # The output's files take these names: none may lead out of its folder.
        plain = isinstance(file, str) and Path(file).name == file
        if not plain or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path} puts {name} into {file!r}, which is no name of a .safetensors file in its "
                f"folder; copy it again"
            )
    return index


def _check_present(folder: Path, files: list[str]) -> None:
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(files)} shards that its index names: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; copy them again"
        )


def _check_index(folder: Path, places: dict[str, str], shards: dict[str, Shard]) -> None:
    for name, file in places.items():
        if name not in shards[file].tensors:
            raise ValueError(
                f"{folder / INDEX} puts {name} into {file}, which does not hold it; copy index and "
                f"shards again from one place"
            )
    for file, shard in shards.items():
        for name in shard.tensors:
            if places.get(name) != file:
                other = f"puts into {places[name]}" if name in places else "does not name"
                raise ValueError(
                    f"{folder / file} holds {name}, which the index {other}; copy index and shards "
                    f"again from one place"
                )


def _check_dtype(folder: Path, name: str, stored: Stored) -> None:
    """Refuse matrices that are not plain floating-point weights; tables and masks may be."""
    if len(stored.shape) < 2 or stored.dtype in (*WEIGHTS, torch.bool):
        return
    last = name.rpartition(".")[2]
    eight_bits = stored.dtype.itemsize == 1 and not last.endswith("bias")  # GPT-2's causal mask
    if stored.dtype.is_floating_point and not eight_bits and "weight" in last:
        raise ValueError(
            f"{folder / stored.file}: {name} is stored as {stored.dtype}; save the checkpoint in "
            f"float32, float16 or bfloat16"
        )
    if eight_bits or "weight" in last:
        raise ValueError(
            f"{folder / stored.file}: {name} is stored as {stored.dtype}, so the checkpoint is "
            f"quantised and cannot be pruned as it is; use the one that it was quantised from"
        )
