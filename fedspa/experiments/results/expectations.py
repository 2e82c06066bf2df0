"""Orderings that a grid promises, such as "statistics is no worse than FedSpaLLM", held to it."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedspa.experiments.results.cells import place_text, target_text, value_text
from fedspa.experiments.results.places import at, places, targets
from fedspa.experiments.results.summary import (
    Place,
    Record,
    Row,
    Target,
    common_means,
    summarise,
)
from fedspa.settings import is_number


@dataclass(frozen=True)
class Expectation:
    """How the geometric means of two methods compare, wherever both were measured on all blocks.

    Clients of unequal capacities prune a part of the blocks each, and so promise nothing.

    lower, higher: methods; also "standalone, mean" or "standalone, best client", and a method with
                   its place on its axes as tables show it, "FedPrLLM, scaling=true"
    at_least:      higher over lower must be at least this; 1 where neither this nor `within` is set
    within:        they differ by at most this share, in either direction
    targets, partitions, clients: only there; None: everywhere
    """

    lower: str
    higher: str
    at_least: float | None = None
    within: float | None = None
    targets: tuple[float | str, ...] | None = None
    partitions: tuple[str, ...] | None = None
    clients: tuple[int, ...] | None = None

    def __str__(self) -> str:
        """Say what is expected."""
        if self.within is not None:
            return f"{self.lower} and {self.higher} within {100 * self.within:g} %"
        return f"{self.higher} at least {self.at_least or 1:g} times {self.lower}"


@dataclass(frozen=True)
class Outcome:
    """What became of an expectation at one place: a sentence with the numbers."""

    expectation: Expectation
    met: bool
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def read_expectations(tables: Sequence[Mapping[str, Any]]) -> list[Expectation]:
    """The [[expect]] tables of an experiment file.

    raises: ValueError for a key that is unknown or missing, and a value of another kind
    """
    return [_read(f"expect {index}", dict(table)) for index, table in enumerate(tables, start=1)]


def _read(who: str, table: dict[str, Any]) -> Expectation:
    names = [field.name for field in dataclasses.fields(Expectation)]
    for name in table:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
            raise ValueError(f"{who}: {name!r} is unknown; {hint}")
    for name in ("lower", "higher"):
        if not isinstance(table.get(name), str):
            raise ValueError(f"{who}: {name} must name a method, not {table.get(name)!r}")
    if "at_least" in table and "within" in table:
        raise ValueError(f"{who}: at_least and within exclude each other; make two of it")
    for name in ("at_least", "within"):
        if name in table and not (is_number(table[name]) and 0 <= table[name] < math.inf):
            raise ValueError(f"{who}: {name} must be a number of 0 or more, not {table[name]!r}")
    kinds = {"targets": int | float | str, "partitions": str, "clients": int}
    for name, kind in kinds.items():
        if name in table:
            values = table[name]
            if not isinstance(values, list) or not values:
                raise ValueError(f"{who}: {name} must be a list of at least one, not {values!r}")
            for value in values:
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise ValueError(f"{who}: {value!r} is none of the {name} that there can be")
            table[name] = tuple(values)
    return Expectation(**table)


def check(records: Iterable[Record], expectations: Iterable[Expectation]) -> list[Outcome]:
    """Compare, expectation by expectation, at every place and target that has both methods.

    An expectation that found nothing to compare is not met; neither is one of a failed method.
    Methods with common axes are compared where these have the same values.
    """
    rows = summarise(records)
    outcomes = []
    here: list[Target] = [*targets(rows)] or [None]
    for expectation in expectations:
        found = [
            _outcome(expectation, place, target, lower, higher)
            for place in _where(rows)
            if not place.capacities
            for target in here
            if _meant(expectation, place, target)
            for lower, higher in _pairs(at(rows, place), expectation, target)
        ]
        nothing = f"{expectation}: no results to compare; run a grid that has both methods"
        outcomes += found or [Outcome(expectation, False, nothing)]
    return outcomes


def _where(rows: Sequence[Row]) -> list[Place]:
    """Every place; or the models alone where nothing was federated."""
    models = dict.fromkeys(row.model for row in rows)
    federated = places(rows)
    bare = [Place(m, None, None, None) for m in models if m not in {p.model for p in federated}]
    return federated + bare


def _meant(expectation: Expectation, place: Place, target: Target) -> bool:
    return all(
        chosen is None or value in chosen
        for chosen, value in (
            (expectation.targets, target),
            (expectation.partitions, place.partition),
            (expectation.clients, place.clients),
        )
    )


def _pairs(rows: Sequence[Row], expectation: Expectation, target: Target) -> list[tuple[Row, Row]]:
    here = [row for row in rows if row.kind == "dense" or row.target == target]
    lower, higher = (
        [row for row in here if name in (row.method, row.label)]
        for name in (expectation.lower, expectation.higher)
    )
    pairs = []
    for one in lower:
        for other in higher:
            mine, theirs = dict(one.axes), dict(other.axes)
            named = expectation.lower == one.label or expectation.higher == other.label
            same = all(mine[name] == theirs[name] for name in mine.keys() & theirs.keys())
            if same or named and (mine.keys() == theirs.keys()):
                pairs.append((one, other))
    return pairs


def _outcome(
    expectation: Expectation, place: Place, target: Target, lower: Row, higher: Row
) -> Outcome:
    where = [place.model, target_text(target)]
    where += [place_text(place)] if place.clients is not None else []
    measured = [
        f"{row.label} {value_text(row.mean) if row.seeds else 'failed'}" for row in (lower, higher)
    ]
    least, most = common_means(lower, higher)
    ratio = most / least if least else math.nan
    if expectation.within is None:
        met = ratio >= (1.0 if expectation.at_least is None else expectation.at_least)
    else:
        met = abs(ratio - 1) <= expectation.within
    times = "" if math.isnan(ratio) else f", {ratio:.4f} times"
    verdict = "met" if met else "not met"
    return Outcome(
        expectation,
        met,
        f"{expectation}: {verdict} at {', '.join(where)}: {', '.join(measured)}{times}",
    )
