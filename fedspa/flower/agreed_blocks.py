"""The agreed blocks of a run as frames on the server's disk, for clients that get them later."""

from __future__ import annotations

from pathlib import Path

from fedspa.streaming.disk import write_whole
from fedspa.wire import payload_size

PREFIX = "agreed"


def write(folder: Path, block: int, version: int, frame: bytes) -> None:
    """Keep a block's frame; of its earlier versions the last one stays.

    The committed state speaks of the earlier version until this one is committed, and a client may
    have to repeat what it did with it. A frame of this version is one that was not committed.
    """
    for old in sorted(v for v in _versions(folder, block) if v < version)[:-1]:
        _path(folder, block, old).unlink()
    write_whole(_path(folder, block, version), frame)


def find(folder: Path, block: int, version: int) -> tuple[Path, int]:
    """A frame's file, and the bytes of masks and values in it."""
    path = _path(folder, block, version)
    return path, payload_size(path)


def _path(folder: Path, block: int, version: int) -> Path:
    return folder / f"{PREFIX}-{block:05}.round-{version}.frame"


def _versions(folder: Path, block: int) -> list[int]:
    names = (path.name for path in folder.glob(f"{PREFIX}-{block:05}.round-*.frame"))
    return [int(name.split(".")[1].removeprefix("round-")) for name in names]
