"""The agreed blocks of a run as frames on the server's disk, for clients that get them later."""

from __future__ import annotations

from pathlib import Path

from fedspa.streaming.disk import write_whole

PREFIX = "agreed"


def write(folder: Path, block: int, version: int, payload: int, frame: bytes) -> None:
    """Keep a block's frame; of its earlier versions the last one stays.

    payload: bytes of masks and values in it. The committed state speaks of the earlier version
    until this one is committed, and a client may have to repeat what it did with it.
    """
    earlier = sorted(_versions(folder, block))
    for old in earlier[:-1] if version not in earlier else earlier[:-2]:
        find(folder, block, old)[0].unlink()
    write_whole(folder / f"{PREFIX}-{block:05}.round-{version}.{payload}.frame", frame)


def find(folder: Path, block: int, version: int) -> tuple[Path, int]:
    """A frame's file, and the bytes of masks and values in it."""
    (path,) = folder.glob(f"{PREFIX}-{block:05}.round-{version}.*.frame")
    return path, int(path.name.split(".")[2])


def _versions(folder: Path, block: int) -> list[int]:
    names = (path.name for path in folder.glob(f"{PREFIX}-{block:05}.round-*.frame"))
    return [int(name.split(".")[1].removeprefix("round-")) for name in names]
