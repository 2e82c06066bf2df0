"""What clients sent of the blocks that were asked last, on the server's disk until it is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedspa.members import Member

PREFIX = "arrived"


class Arrivals:
    """Frames by client and block, each with the nonce of the task that it answers."""

    def __init__(self, folder: Path, members: Sequence[Member]) -> None:
        """folder: must be there when the first frame comes."""
        self._folder = folder
        self._numbers = {member.name: number for number, member in enumerate(members)}
        self._nonces: dict[str, str] = {}

    def clear(self) -> None:
        """Remove all, those that a killed server left too."""
        self._nonces.clear()
        for path in self._folder.glob(f"{PREFIX}-*"):
            path.unlink()

    def store(
        self,
        name: str,
        nonce: str,
        frames: Mapping[str, bytes],
        asked: Sequence[int],
        limits: Mapping[int, int],
    ) -> None:
        """Put a client's frames on the disk.

        asked: the blocks that were asked of it. limits: bytes of a frame, by block.
        Raises ValueError, and takes none of them, where one was not asked for or is too large.
        """
        for block, frame in frames.items():
            if block not in map(str, asked):
                raise ValueError(f"it sent a frame {block!r:.40}, and was asked for blocks {asked}")
            if len(frame) > limits[int(block)]:
                raise ValueError(
                    f"its frame of block {block} has {len(frame)} bytes, and such a block comes to "
                    f"{limits[int(block)]} at most"
                )
        self._nonces[name] = nonce
        for block, frame in frames.items():
            self._path(name, int(block)).write_bytes(frame)

    def has(self, name: str, block: int) -> bool:
        """Whether a client sent a block."""
        return self._path(name, block).exists()

    def read(self, name: str, block: int) -> tuple[bytes, str]:
        """A frame, and the nonce that it must have."""
        return self._path(name, block).read_bytes(), self._nonces[name]

    def drop(self, name: str, block: int) -> None:
        """Remove a client's frame, which is of no use, if there is one."""
        self._path(name, block).unlink(missing_ok=True)

    def remove(self, block: int) -> None:
        """Remove the frames of a block that is agreed on."""
        for name in self._numbers:
            self.drop(name, block)

    def _path(self, name: str, block: int) -> Path:
        return self._folder / f"{PREFIX}-{self._numbers[name]}-{block}"
