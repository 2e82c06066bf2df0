"""Checks of an experiment file's tables, with the nearest name that is known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def tables_of(where: str, key: str, values: Any) -> list[dict[str, Any]]:
    """The tables [[key]] of a file; ValueError where there is none, or it is something else."""
    if not isinstance(values, list) or not values or not all(isinstance(v, dict) for v in values):
        raise ValueError(f"{where} has no {key}; give tables headed [[{key}]], with two brackets")
    return values


def check_keys(where: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise ValueError for a key that is not among the known."""
    for key in table:
        check_known(where, "key", key, known)


def check_known(where: str, what: str, name: Any, known: Iterable[str]) -> None:
    """Raise ValueError, with the nearest that is known, where a name is not."""
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {sorted(known)}"
    raise ValueError(f"{where} has the unknown {what} {name!r}; {hint}")
