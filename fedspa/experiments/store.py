"""Results as JSON lines: appended as they come, whole whatever ends the run, read to resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS_FILE = "results.jsonl"
Record = dict[str, Any]


def read_records(path: str | Path) -> dict[str, Record]:
    """Every key's last record, in the order in which the keys came first; {} without a file.

    A last line without its end, as a kill leaves it, is not read.
    raises: ValueError, naming the line, where another line is not a record.
    """
    path = Path(path)
    if not path.is_file():
        return {}
    records: dict[str, Record] = {}
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"results: {path}, line {number} is not a record ({type(error).__name__}: "
                f"{error}); remove the line, and what it held is run again"
            ) from error
    return records


def succeeded(record: Record) -> bool:
    """Whether a record holds measurements; one of a failure is tried again."""
    return "error" not in record


def plain(value: float) -> float | str:
    """A number that JSON can hold: infinite and undefined ones as "inf" and "nan"."""
    return value if math.isfinite(value) else str(value)


def sentence(error: BaseException) -> str:
    """What an exception says, after its kind where it is none of those that say it in words."""
    if isinstance(error, ValueError | RuntimeError | OSError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}"


@contextmanager
def appending(path: str | Path) -> Iterator[Callable[[Record], None]]:
    """Yield a function that appends a record; what it wrote stays, whatever happens next.

    A last line without its end is overwritten.
    raises: RuntimeError where another process is appending to the same file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        _lock(file, path)
        file.seek(0)
        content = file.read()
        file.truncate(len(content) - len(content.rpartition(b"\n")[2]))

        def append(record: Record) -> None:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        yield append


def _lock(file: Any, path: Path) -> None:
    """Let one process append at a time, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(
            f"results: another run is appending to {path}; wait for it, or choose another folder "
            f"with --out"
        ) from error
