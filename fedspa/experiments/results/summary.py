"""From the records of a grid to the rows of its tables: the mean and the spread over seeds.

A record is one line of a results file: what identifies a case, and what was measured or the error
that ended it. Of several with the same key the last counts.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import Any

from fedspa.settings import Settings

Record = Mapping[str, Any]
Target = float | str | None
STANDALONE = ("mean", "best client", "worst client")
# What a record's settings may hold that is its case's and not its method's.
OF_THE_CASE = ("sparsity", "pattern", "seed", "kind")


# Settings that are shown in tables of their own, also where a method has one value of them alone.
APART = ("statistics_dtype", "participation", "dropout")


@dataclass(frozen=True)
class Place:
    """Where methods compete: one model and one federation."""

    model: str
    clients: int | None
    partition: str | None
    capacities: tuple[float, ...] | None


@dataclass(frozen=True)
class Row:
    """A method at one target and place, over its seeds.

    target:     share of weights to prune, or a pattern "n:m"; None for the dense model
    method:     as tables show it: "standalone, best client" is of the method `named` "standalone"
    axes:       the settings that vary within the method, and their values here
    seeds:      those that were measured; empty where every one failed
    by_seed:    the geometric mean perplexity of each of them
    failed:     how many ended in an error
    mean:       mean over the seeds of the geometric mean perplexity over the domains
    spread:     sample standard deviation over the seeds; nan for fewer than two
    perplexity: by domain, the mean over the seeds, as all that follows
    sparsity:   exact share pruned; bytes_up, bytes_down: of a client over the run
    exchanges:  how often clients and server met; seconds: of pruning
    """

    model: str
    target: Target
    clients: int | None
    partition: str | None
    capacities: tuple[float, ...] | None
    method: str
    named: str
    kind: str
    pruner: str
    aggregation: str
    axes: tuple[tuple[str, Any], ...]
    seeds: tuple[int | None, ...]
    by_seed: tuple[float, ...]
    failed: int
    mean: float
    spread: float
    perplexity: dict[str, float]
    sparsity: float
    bytes_up: float
    bytes_down: float
    exchanges: float
    seconds: float

    @property
    def place(self) -> Place:
        """Where it competes; dense and centralised compete everywhere in their model."""
        return Place(self.model, self.clients, self.partition, self.capacities)

    @property
    def plain(self) -> bool:
        """Whether its method has no axis, but for several pruners: it is a line of main tables."""
        return all(name == "pruner" for name, _ in self.axes)

    @property
    def label(self) -> str:
        """The method, and where it is on its axes: "FedPrLLM, scaling=true"."""
        return ", ".join(
            [self.method, *(f"{name}={axis_text(value)}" for name, value in self.axes)]
        )


def axis_text(value: Any) -> str:
    """A setting's value as an experiment file spells it, a text without its quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def number(value: Any) -> float:
    """A number of a record, where "inf" and "nan" are text; nan where it is absent."""
    return math.nan if value is None else float(value)


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of each key, in the order of the keys' first appearance."""
    return list({record["key"]: record for record in records}.values())


def summarise(records: Iterable[Record]) -> list[Row]:
    """Make a row of the records that differ in their seed alone; three of a standalone's."""
    kept = latest(records)
    models = _model_names(kept)
    axes = _axes(kept, models)
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record, model in zip(kept, models, strict=True):
        everywhere = record["kind"] in ("dense", "centralised")
        capacities = None if everywhere else record.get("capacities")
        values = _settings(record)
        identity = (
            model,
            record.get("target"),
            None if everywhere else record.get("clients"),
            None if everywhere else record.get("partition"),
            None if capacities is None else tuple(map(float, capacities)),
            record["method"],
            record["kind"],
            str(values["pruner"]),
            str(values["aggregation"]),
            tuple((n, values[n]) for n in _named(axes[model, record["method"]], values)),
        )
        groups.setdefault(identity, []).append(record)
    return [row for identity, group in groups.items() for row in _rows(identity, group)]


def common_means(one: Row, other: Row) -> tuple[float, float]:
    """The means of two rows over the seeds that both have; over their own where they share none."""
    shared = [seed for seed in one.seeds if seed in other.seeds]
    if not shared:
        return one.mean, other.mean
    pairs = [dict(zip(row.seeds, row.by_seed, strict=True)) for row in (one, other)]
    first, second = (_mean([by_seed[seed] for seed in shared]) for by_seed in pairs)
    return first, second


def _named(axes: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """The axes of a method, and what makes it another experiment than the main tables' methods."""
    defaults = {f.name: f.default for f in fields(Settings)}
    return [*axes, *(n for n in APART if n not in axes and values[n] != defaults[n])]


def _model_names(records: Sequence[Record]) -> list[str]:
    """Each record's model; with what differs where one was measured on several data or dtypes."""
    setups = [{"dtype": record.get("dtype")} | (record.get("data") or {}) for record in records]
    seen: dict[str, list[dict[str, Any]]] = {}
    for record, setup in zip(records, setups, strict=True):
        seen.setdefault(record["model"], []).append(setup)
    differing = {model: _differing(of_model) for model, of_model in seen.items()}
    return [
        ", ".join(
            [record["model"]]
            + [f"{name} {axis_text(setup.get(name))}" for name in differing[record["model"]]]
        )
        for record, setup in zip(records, setups, strict=True)
    ]


def _axes(records: Sequence[Record], models: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Which settings vary within each method of each model."""
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record, model in zip(records, models, strict=True):
        seen.setdefault((model, record["method"]), []).append(_settings(record))
    return {
        method: [name for name in _differing(settings) if name not in OF_THE_CASE]
        for method, settings in seen.items()
    }


def _settings(record: Record) -> dict[str, Any]:
    """A record's settings, with what it leaves out as Settings has it."""
    return {f.name: f.default for f in fields(Settings)} | (record.get("settings") or {})


def _differing(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names whose values are not the same in all tables; one that is absent is null."""
    names = dict.fromkeys(name for table in tables for name in table)
    return [
        name
        for name in names
        if len({json.dumps(table.get(name), sort_keys=True) for table in tables}) > 1
    ]


def _rows(identity: tuple[Any, ...], records: Sequence[Record]) -> Iterator[Row]:
    model, target, clients, partition, capacities, named, kind, pruner, aggregation, axes = identity
    measured = [record for record in records if not record.get("error")]
    parts = STANDALONE if kind == "standalone" else (None,)
    for part in parts:
        views = [record if part is None else _of_clients(record, part) for record in measured]
        means = [number(view["geometric_mean"]) for view in views]
        several = len(means) > 1 and all(map(math.isfinite, means))
        domains = dict.fromkeys(domain for view in views for domain in view["perplexity"])
        yield Row(
            model=model,
            target=target,
            clients=clients,
            partition=partition,
            capacities=capacities,
            method=named if part is None else f"{named}, {part}",
            named=named,
            kind=kind,
            pruner=pruner,
            aggregation=aggregation,
            axes=axes,
            seeds=tuple(record.get("seed") for record in measured),
            by_seed=tuple(means),
            failed=len(records) - len(measured),
            mean=_mean(means),
            spread=stdev(means) if several else math.nan,
            perplexity={
                domain: _mean([number(view["perplexity"].get(domain)) for view in views])
                for domain in domains
            },
            seconds=_mean([number((view.get("seconds") or {}).get("prune")) for view in views]),
            **{
                name: _mean([number(view.get(name)) for view in views])
                for name in ("sparsity", "bytes_up", "bytes_down", "exchanges")
            },
        )


def _of_clients(record: Record, part: str) -> Record:
    """A standalone record with the numbers of its best or worst client; or the mean, as it is."""
    if part == "mean":
        return record

    def rank(member: Record) -> float:
        value = number(member["geometric_mean"])
        # A model whose perplexity is undefined is no better than one whose perplexity is infinite.
        return math.inf if math.isnan(value) else value

    ranked = sorted(record["members"], key=rank)
    return {**record, **ranked[0 if part == "best client" else -1]}


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan
