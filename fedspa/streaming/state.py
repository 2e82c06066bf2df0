"""What a killed run leaves: what it is, how far it came, and its accounts; whole or not there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedspa.report import BlockResult, LayerResult
from fedspa.streaming.disk import sync_folder, write_whole

__all__ = ["Account", "State", "commit", "load"]

FORMAT_VERSION = 2
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Account:
    """A member of a run as the server accounts for it, but for its text and its hidden states.

    drawn: its blocks of every round begun. loss: the sum of its pruning losses, to the last bit.
    holds: for each block the round whose version it holds.
    """

    drawn: tuple[tuple[int, ...], ...] = ()
    bytes_up: int = 0
    bytes_down: int = 0
    wire_up: int = 0
    wire_down: int = 0
    pruned: int = 0
    weights: int = 0
    loss: float = 0.0
    holds: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """A run between two blocks. Nothing in it is random: draws follow from the seed and the round.

    run:      what the run is, from `fingerprint`
    round, block: what is to be done next
    accounts: by the members' names
    hidden:   by the name that the caller chose, what `Hidden.describe` said; without hidden states
              that the next block needs, without an entry
    layers, results: of weight matrices and of blocks, so far
    agreed, sent: for every block that was pruned the round of its last broadcast, and its bytes
    seconds:  by stage
    """

    run: dict[str, Any]
    round: int
    block: int
    accounts: dict[str, Account] = field(default_factory=dict)
    hidden: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: tuple[LayerResult, ...] = ()
    results: tuple[BlockResult, ...] = ()
    agreed: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def commit(folder: str | Path, state: State) -> None:
    """Make this the state in a folder: after a kill or a power failure it is there, or the former.

    Files that it speaks of must be on the disk before.
    Raises OSError where the disk refuses; the former state then still stands.
    """
    folder = Path(folder)
    record = {"format_version": FORMAT_VERSION, **asdict(state)}
    # A float's repr is the shortest text that reads as the same float.
    write_whole(folder / STATE_FILE, (json.dumps(record) + "\n").encode())
    sync_folder(folder)


def load(folder: str | Path) -> State | None:
    """The state in a folder, or None where none was committed.

    Raises ValueError where it is damaged or another version's.
    """
    path = Path(folder) / STATE_FILE
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        record = json.loads(text)
    except ValueError as error:
        raise _damaged(path, f"it is not JSON ({error})") from error
    found = record.pop("format_version", None) if isinstance(record, dict) else None
    if found != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {found}, this FedSpa goes on with {FORMAT_VERSION}; let "
            f"the version that wrote it finish the run, or start over with --restart"
        )
    try:
        return _state(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"a field is missing, unknown or wrong: {error}") from error


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path}: the state of the interrupted run is damaged, {why}; start over with --restart"
    )


def _state(record: dict[str, Any]) -> State:
    """JSON has neither tuples nor numbers as keys."""
    accounts = {
        name: Account(
            **account | {"drawn": _nested(account["drawn"]), "holds": _numbered(account["holds"])}
        )
        for name, account in record["accounts"].items()
    }
    layers = tuple(
        LayerResult(**layer | {"shape": tuple(layer["shape"]), "votes": tuple(layer["votes"])})
        for layer in record["layers"]
    )
    results = tuple(
        BlockResult(**result | {"clients": tuple(result["clients"])})
        for result in record["results"]
    )
    return State(
        **record
        | {
            "round": int(record["round"]),
            "block": int(record["block"]),
            "accounts": accounts,
            "layers": layers,
            "results": results,
            "agreed": _numbered(record["agreed"]),
            "sent": _numbered(record["sent"]),
        }
    )


def _numbered(values: dict[str, int]) -> dict[int, int]:
    return {int(key): value for key, value in values.items()}


def _nested(lists: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, lists))
