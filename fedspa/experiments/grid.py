"""One [[grid]] of an experiment file, spelled out as cases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fedspa.demo import demo_model
from fedspa.experiments.cases import MESSAGE_DTYPE, Case, Data
from fedspa.experiments.known import check_keys, check_known
from fedspa.experiments.partition import check_partition
from fedspa.settings import is_number

DEMO_MODEL = "smollm2-135m"
GRID = ("targets", "clients", "partitions", "seeds", "methods", "capacities")


@dataclass(frozen=True)
class Ground:
    """What all grids of a file have in common. folder: where relative paths start."""

    models: list[str]
    dtype: str
    data: Data
    methods: Mapping[str, dict[str, Any]]
    folder: Path


def cases_of(where: str, grid: Mapping[str, Any], place: int, ground: Ground) -> Iterator[Case]:
    """Every case of one [[grid]], checked; those of dense and centralised come up repeatedly.

    where: how to call it in an error. place: in the file, from 0.
    raises: ValueError naming what is unknown, impossible or empty.
    """
    axes = _axes(where, grid, ground)
    capacities = _capacities(where, axes.get("capacities"))
    names = ("targets", "clients", "partitions", "seeds", "methods")
    order = product(ground.models, *(axes[name] for name in names))
    for model, target, clients, partition, seed, name in order:
        kind = ground.methods[name].get("kind", "federated")
        dealt = kind in ("federated", "standalone")
        for settings in _each_setting(ground.methods[name], kind):
            case = Case(
                model=model,
                dtype=ground.dtype,
                target=None if kind == "dense" else _whole(target),
                clients=clients if dealt else None,
                partition=partition if dealt else None,
                capacities=capacities if dealt else None,
                seed=None if kind == "dense" else seed,
                method=name,
                kind=kind,
                settings=settings,
                data=ground.data,
                source=_model_source(model, ground.folder),
                grid=place,
            )
            _check_case(where, case)
            yield case


def _axes(where: str, grid: Mapping[str, Any], ground: Ground) -> dict[str, list[Any]]:
    """A grid's lists, complete, and each value of them checked but for targets."""
    check_keys(where, grid, GRID)
    axes = {"seeds": [0], "partitions": ["iid"], **grid}
    for key in ("methods", "targets", "clients"):
        if key not in axes:
            raise ValueError(f"{where} has no {key}, so it is empty; give a list of at least one")
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: {key} is {values!r}; give a list of at least one")
    for name in axes["methods"]:
        check_known(where, "method", name, ground.methods)
    for seed in axes["seeds"]:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"{where}: seeds has {seed!r}; give whole numbers of at least 0")
    sizes = [ground.data.windows] * len(ground.data.calibration)
    for partition, clients in product(axes["partitions"], axes["clients"]):
        if not isinstance(clients, int) or isinstance(clients, bool):
            raise ValueError(f"{where}: clients has {clients!r}; give whole numbers")
        try:
            check_partition(partition, clients, sizes)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return axes


def _each_setting(method: Mapping[str, Any], kind: str) -> Iterable[dict[str, Any]]:
    """A method's settings, once for each value of those that are lists."""
    if kind == "dense":
        return [{}]
    given = {"message_dtype": MESSAGE_DTYPE, **method}
    given.pop("kind", None)
    values = [value if isinstance(value, list) else [value] for value in given.values()]
    return [dict(zip(given, chosen, strict=True)) for chosen in product(*values)]


def _check_case(where: str, case: Case) -> None:
    """Let the settings judge themselves, before anything runs."""
    if case.kind == "dense":
        return
    try:
        case.federation()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}, method {case.method!r}: {error}") from error


def _capacities(where: str, values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    for value in values:
        if not is_number(value) or not 0 < value <= 1:
            raise ValueError(
                f"{where}: capacities has {value!r}; it is the share of blocks that a client "
                f"prunes, in (0, 1]"
            )
    return tuple(float(value) for value in values)


def _model_source(model: str, folder: Path) -> str:
    """What `fedspa.loading.load` takes."""
    if model == DEMO_MODEL:
        return model
    path = folder / Path(model).expanduser()
    return str(path.absolute()) if path.exists() or model.startswith((".", "~")) else model


def model_file(source: str) -> str | Path:
    """The demo's model by its name, else the source itself; RuntimeError where it is missing."""
    return demo_model() if source == DEMO_MODEL else source


def _whole(target: Any) -> Any:
    """A sparsity as a float, so that 0 and 0.0 are one case; all else is for Settings to judge."""
    return float(target) if is_number(target) else target
