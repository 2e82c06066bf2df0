"""Files as the disk has them: ranges read and written whole, space reserved, names kept."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Behind the name of a file that is not whole yet.
PARTIAL = ".partial"
# What a file system says that cannot reserve space.
UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let the system's errors name the file; calls on a descriptor leave it out."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The descriptor of a file for reading, closed at the end."""
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def read_range(path: Path, file: int, buffer: memoryview, begin: int) -> None:
    """Fill a buffer from a file's byte `begin` on.

    Raises OSError where the disk fails, RuntimeError where the file ends before.
    """
    done = 0
    with named(path):
        while done < len(buffer):
            count = os.preadv(file, [buffer[done:]], begin + done)
            if count == 0:
                raise RuntimeError(
                    f"{path} ended at byte {begin + done} while it was read up to byte "
                    f"{begin + len(buffer)}; something cut it during the run: copy it again"
                )
            done += count


def write_range(path: Path, file: int, buffer: memoryview, begin: int) -> None:
    """Write a buffer to a file from byte `begin` on; raises OSError where the disk refuses."""
    done = 0
    with named(path):
        while done < len(buffer):
            done += os.pwrite(file, buffer[done:], begin + done)


def reserve(path: Path, head: bytes, nbytes: int) -> int:
    """A new file of `nbytes` that starts with `head`; its descriptor."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with named(path):
            _allocate(file, nbytes)
        write_range(path, file, memoryview(head), 0)
    except BaseException:
        os.close(file)
        path.unlink()
        raise
    return file


def _allocate(file: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(file, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
    os.ftruncate(file, nbytes)


def reopen(path: Path, head: bytes, nbytes: int) -> int:
    """The file of a killed run, found as `reserve` made it; its descriptor."""
    whole = path.with_suffix("")  # where it was killed while the shards got their names
    if not path.exists() and whole.is_file():
        whole.rename(path)
    if not path.is_file():
        raise ValueError(f"{path} of the killed run is gone; start anew with --restart")
    size = path.stat().st_size
    with path.open("rb") as begin:
        found = begin.read(len(head))
    if found != head or size != nbytes:
        raise ValueError(
            f"{path} of the killed run has {size} bytes and not the layout of {nbytes} bytes that "
            f"this run writes; start anew with --restart"
        )
    return os.open(path, os.O_RDWR)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file that is either whole under its name or not there."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
