"""The hidden folders in which a streamed run builds its output, and keeps what it resumes from."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fedspa.output import is_full, publish
from fedspa.ranks import Ranks
from fedspa.streaming.disk import sync_folder
from fedspa.streaming.state import STATE_FILE


class Folders(NamedTuple):
    """output: takes the result's name at the end. state: what a killed run goes on with."""

    output: Path
    state: Path


def folders_of(out: str | Path) -> Folders:
    """Where the same command finds what a killed run has left: beside the result's folder."""
    out = Path(out).absolute()
    return Folders(
        out.with_name(f".{out.name}.partial"),
        out.with_name(f".{out.name}.state"),
    )


@contextmanager
def building(out: str | Path, ranks: Ranks, *, restart: bool) -> Iterator[Folders]:
    """Yield the hidden folders; the output takes the name `out` if nothing went wrong.

    What a run has finished stays there if it ends before, and the same command goes on with it.
    restart: remove what an earlier run left.
    Raises RuntimeError where another process builds the same output, or the disk is full.
    """
    out = Path(out).absolute()
    folders = folders_of(out)
    if not ranks.first:
        ranks.barrier()
        yield folders
        ranks.barrier()
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    folders.state.mkdir(exist_ok=True)
    with _locked(folders.state, out):
        # A state without the output that it is about is what a finished run could not remove.
        if restart or not (_is_there(folders.state) and folders.output.is_dir()):
            _clear(folders)
        folders.output.mkdir(exist_ok=True)
        ranks.barrier()
        finished = False
        try:
            yield folders
            publish(folders.output)
            folders.output.rename(out)
            finished = True
            sync_folder(out.parent)
            ranks.barrier()
        except BaseException as error:
            resumable = _is_there(folders.state)
            if not resumable:
                _clear(folders)
            if isinstance(error, Exception) and is_full(error):
                raise _explained(error, out, resumable) from error
            raise
        finally:
            if finished or not _is_there(folders.state):
                shutil.rmtree(folders.state, ignore_errors=True)


@contextmanager
def _locked(state: Path, out: Path) -> Iterator[None]:
    """Keep other processes away from the folders; the system lets go whatever ends this one."""
    with (state / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"another process is building {out}; wait for it, or choose another folder"
            ) from error
        yield


def _is_there(state: Path) -> bool:
    return (state / STATE_FILE).is_file()


def _clear(folders: Folders) -> None:
    """Remove everything but the lock, which this process holds; the state first."""
    (folders.state / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folders.output, ignore_errors=True)
    for path in folders.state.iterdir():
        if path.name != "lock":
            # Another rank may be removing what it wrote itself.
            path.unlink(missing_ok=True)


def _explained(error: Exception, out: Path, resumable: bool) -> RuntimeError:
    if not resumable:
        return RuntimeError(
            f"no space left on the disk of {out.parent}; nothing was written to {out}: free some "
            f"space or choose a folder on another disk"
        )
    return RuntimeError(
        f"no space left on the disk of {out.parent}; free some space and run the same "
        f"command again: it goes on after the last finished block"
    )
