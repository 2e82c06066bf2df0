"""The safetensors format: a length, a JSON header that says where each tensor lies, the bytes.

- 8 bytes: the header's length, little-endian.
- The header: {"__metadata__": {text: text}, NAME: {"dtype", "shape", "data_offsets"}, ...}, padded
  with spaces to a multiple of 8 bytes.
- The tensors: row-major, little-endian, without holes or overlaps; offsets count from their start.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The safetensors library reads no longer ones.
LONGEST_HEADER = 100_000_000
POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: the file's name, and its bytes counted from the file's start."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.end - self.begin


@dataclass(frozen=True)
class Shard:
    """What a header says: the tensors by their offset, the metadata, and the file's size."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]
    nbytes: int


def read_header(path: Path) -> Shard:
    """Read and check the header of a safetensors file; the tensors' bytes are not touched.

    Raises ValueError where the file is not whole or the header is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(POINTER))
        if start == POINTER:
            raise ValueError(
                f"{path} is a pointer of git LFS and not the weights; fetch them with `git lfs "
                f"pull` in that folder"
            )
        if size < 8:
            raise _damaged(path, f"it has {size} bytes, too few for a header")
        length = int.from_bytes(start[:8], "little")
        if length > LONGEST_HEADER:
            raise _damaged(path, f"a header of {length} bytes is announced")
        if size < 8 + length:
            raise _truncated(path, 8 + length, size)
        file.seek(8)
        raw = file.read(length)
    shard = _parse(path, raw)
    if shard.nbytes > size:
        raise _truncated(path, shard.nbytes, size)
    if shard.nbytes < size:
        raise _damaged(path, f"the header accounts for {shard.nbytes} bytes of {size}")
    return shard


def lay_out(
    file: str,
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> tuple[bytes, Shard]:
    """The head of a file (length and header, up to the first tensor) and where each tensor goes.

    Wide elements come first and the order is kept otherwise, as the safetensors library does it:
    a reader that maps the file then finds every tensor at a multiple of its element's size.
    """
    order = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    ranges, offset = {}, 0
    for name, dtype, shape in order:
        end = offset + math.prod(shape) * dtype.itemsize
        ranges[name] = (dtype, shape, offset, end)
        entries[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    stored = {
        name: Stored(file, dtype, shape, len(head) + begin, len(head) + end)
        for name, (dtype, shape, begin, end) in ranges.items()
    }
    return head, Shard(stored, dict(metadata), len(head) + offset)


def _parse(path: Path, raw: bytes) -> Shard:
    try:
        entries = json.loads(raw, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the header is no JSON object: {error}") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "the header is no JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "__metadata__ is not made of texts")
    start = 8 + len(raw)
    found = [(name, _stored(path, name, entry, start)) for name, entry in entries.items()]
    found.sort(key=lambda item: (item[1].begin, item[1].end))
    end, before = start, "the header"
    for name, stored in found:
        if stored.begin < end:
            raise _damaged(path, f"{name} starts at byte {stored.begin}, inside {before}")
        if stored.begin > end:
            raise _damaged(path, f"bytes {end} to {stored.begin}, before {name}, belong to nothing")
        end, before = stored.end, name
    return Shard(dict(found), metadata, end)


def _stored(path: Path, name: str, entry: Any, start: int) -> Stored:
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"{name} lacks a dtype, a shape or two offsets") from error
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(
            f"{path}: {name} is stored as {kind}, which cannot be read here; if the checkpoint is "
            f"quantised, use the one that it was quantised from"
        )
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _damaged(path, f"{name} has shape {shape} and offsets {begin} to {end}")
    nbytes = math.prod(shape) * DTYPES[kind].itemsize
    if end - begin != nbytes:
        raise _damaged(
            path, f"{name} has {end - begin} bytes, but {kind} of shape {shape} takes {nbytes}"
        )
    return Stored(path.name, DTYPES[kind], tuple(shape), start + begin, start + end)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twin!r} stands there twice")
    return entries


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged or no safetensors file: {reason}; copy it again")


def _truncated(path: Path, wanted: int, size: int) -> ValueError:
    return ValueError(
        f"{path} is truncated: its header says {wanted} bytes, the file has {size}; copy it again"
    )
