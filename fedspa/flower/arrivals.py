"""What clients sent of the blocks that were asked last, on the server's disk until it is added."""

from __future__ import annotations

from collections.abc import Sequence
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

    def begin(self, name: str, nonce: str) -> None:
        """Take note of the task that a client answers."""
        self._nonces[name] = nonce

    def store(self, name: str, block: int, frame: bytes) -> None:
        """Put a client's frame of a block on the disk."""
        self._path(name, block).write_bytes(frame)

    def has(self, name: str, block: int) -> bool:
        """Whether a client sent a block."""
        return self._path(name, block).exists()

    def read(self, name: str, block: int) -> tuple[bytes, str]:
        """A frame, and the nonce that it must have."""
        return self._path(name, block).read_bytes(), self._nonces[name]

    def remove(self, block: int) -> None:
        """Remove the frames of a block that is agreed on."""
        for name in self._numbers:
            self._path(name, block).unlink(missing_ok=True)

    def _path(self, name: str, block: int) -> Path:
        return self._folder / f"{PREFIX}-{self._numbers[name]}-{block}"
