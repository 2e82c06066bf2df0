"""An experiment file: read, checked to the last key, and spelled out as cases."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedspa.domains import DOMAINS
from fedspa.experiments.cases import CLIENT_SIDE, KINDS, SETTINGS, Case, Data
from fedspa.experiments.grid import DEMO_MODEL, Ground, cases_of
from fedspa.experiments.known import check_keys, check_known, tables_of
from fedspa.experiments.results.expectations import Expectation, read_expectations
from fedspa.experiments.results.summary import STANDALONE
from fedspa.experiments.sources import SHIPPED, resolve_text
from fedspa.loading import check_dtype

TOP = ("name", "models", "dtype", "data", "method", "grid", "expect")
COUNTS = ("windows", "seqlen", "eval_windows")
DATA = (*COUNTS, "domains", "evaluate")
# What a method of each kind may set.
ALLOWED = {
    "federated": SETTINGS,
    "dense": (),
    "standalone": CLIENT_SIDE,
    "centralised": (
        *("pruner", "block_size", "damping", "batch_size", "message_dtype"),
        "statistics_dtype",
    ),
}


@dataclass(frozen=True)
class Experiment:
    """A file's cases, each once, in the file's order; and the orderings that it promises."""

    name: str
    cases: tuple[Case, ...]
    expectations: tuple[Expectation, ...] = ()


def shipped_grids() -> dict[str, Path]:
    """The files that the package carries, by their names."""
    folder = Path(str(files("fedspa.experiments") / "grids"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_experiment(source: str | Path) -> Experiment:
    """Read an experiment file, or the shipped one of that name (`shipped_grids`).

    raises: ValueError, naming it, for what is missing, unknown or impossible in the file; whether
        models and texts are there shows when their cases run.
    """
    path = find_experiment(source)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"experiment: {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"experiment: {path} is not TOML: {error}") from error
    where = f"experiment {path.name}"
    check_keys(where, table, TOP)
    name = table.get("name")
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f'{where}: name is {name!r}; give it one, such as name = "{path.stem}"')
    ground = Ground(
        models=_texts(where, "models", table.get("models")),
        dtype=table.get("dtype", "auto"),
        data=_read_data(f"{where}, [data]", table.get("data"), path.parent),
        methods=_read_methods(where, table.get("method")),
        folder=path.parent,
    )
    check_dtype(ground.dtype)
    cases: dict[str, Case] = {}
    for place, grid in enumerate(tables_of(where, "grid", table.get("grid"))):
        for case in cases_of(f"{where}, grid {place + 1}", grid, place, ground):
            cases.setdefault(case.key, case)
    expectations = _expectations(where, table.get("expect"), list(cases.values()))
    return Experiment(name, tuple(cases.values()), expectations)


def find_experiment(source: str | Path) -> Path:
    """The file of that path, or the shipped one of that name; ValueError where neither is there."""
    path, shipped = Path(source), shipped_grids()
    if path.is_file():
        return path
    if str(source) in shipped:
        return shipped[str(source)]
    raise ValueError(
        f"experiment: there is no file {source}, and no shipped grid of that name; give a TOML "
        f"file, or one of {list(shipped)}"
    )


def _read_data(where: str, table: Any, folder: Path) -> Data:
    if not isinstance(table, dict):
        raise ValueError(f"{where} is missing; give windows, seqlen and eval_windows")
    check_keys(where, table, DATA)
    counts: dict[str, int] = {}
    for key in COUNTS:
        value = table.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: {key} is {value!r}; give a whole number of at least 1")
        counts[key] = value
    domains: Any = table.get("domains", {name: SHIPPED + name for name in DOMAINS})
    judged: Any = table.get("evaluate", domains)
    for key, named in (("domains", domains), ("evaluate", judged)):
        if not isinstance(named, dict) or not named:
            raise ValueError(f'{where}: {key} is {named!r}; give NAME = "SOURCE" for each')
        for name, source in named.items():
            if isinstance(source, dict):
                check_keys(f"{where}, {key}, {name}", source, ("calibration", "heldout"))
    both = "evaluate" not in table
    return Data(
        **counts,
        calibration={
            name: resolve_text(f"{where}, {name}", source, "calibration", folder, both=both)
            for name, source in domains.items()
        },
        heldout={
            name: resolve_text(f"{where}, {name}", source, "heldout", folder, both=False)
            for name, source in judged.items()
        },
        written=table,
    )


def _read_methods(where: str, table: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(table, dict) or not table:
        raise ValueError(f'{where} has no methods; give some, headed such as [method."FedSpaLLM"]')
    for name, method in table.items():
        here = f"{where}, method {name!r}"
        if not isinstance(method, dict):
            raise ValueError(f"{here} is {method!r}; give a table, headed [method.{name!r}]")
        kind = method.get("kind", "federated")
        check_known(here, "kind", kind, KINDS)
        check_keys(f"{here} of kind {kind!r}", method, ("kind", *ALLOWED[kind]))
        if not isinstance(method.get("pruner", ""), str | list):
            raise ValueError(f"{here}: pruner is {method['pruner']!r}; name one, as a text")
        empty = [key for key, value in method.items() if value == []]
        if empty:
            raise ValueError(f"{here}: {empty[0]} is an empty list; give at least one value")
    return table


def _expectations(where: str, tables: Any, cases: Sequence[Case]) -> tuple[Expectation, ...]:
    """The [[expect]] tables, of methods, targets, partitions and clients that the cases have."""
    if tables is None:
        return ()
    try:
        found = read_expectations(tables_of(where, "expect", tables))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    here = f"{where}, expect"
    names = {name for case in cases for name in _shown(case)}
    for expectation in found:
        for name in (expectation.lower, expectation.higher):
            # A method may be named with its place on its axes, "FedPrLLM, expansion=row".
            method = name.partition("=")[0].rpartition(", ")[0] if "=" in name else name
            check_known(here, "method", method, names)
        for key, values in (
            ("target", {case.target for case in cases}),
            ("partition", {case.partition for case in cases}),
            ("client", {case.clients for case in cases}),
        ):
            for value in getattr(expectation, f"{key}s") or ():
                if value not in values:
                    raise ValueError(f"{here}: no case of the grids has {key}s {value!r}")
    return tuple(found)


def _shown(case: Case) -> list[str]:
    """How tables name a case's method."""
    if case.kind != "standalone":
        return [case.method]
    return [f"{case.method}, {part}" for part in STANDALONE]


def _texts(where: str, key: str, values: Any) -> list[str]:
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise ValueError(f'{where}: {key} is {values!r}; give a list such as ["{DEMO_MODEL}"]')
    return values
