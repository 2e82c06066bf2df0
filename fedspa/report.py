"""What a run leaves behind: numbers that can be written as JSON, read again, and shown."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedspa.machine import machine, peak_gpu_memory, peak_memory, versions
from fedspa.tables import client_table, method_rows, method_table

__all__ = [
    "BlockResult",
    "ClientResult",
    "LayerResult",
    "Method",
    "Report",
    "client_table",
    "machine",
    "method_rows",
    "method_table",
    "peak_gpu_memory",
    "peak_memory",
    "versions",
    "write_html",
]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Method:
    """One way to a pruned model, measured: a line of the comparison.

    perplexity: by domain
    sparsity:   exact share of the prunable weights that the mask prunes
    bytes_up, bytes_down: mean of a client over the whole run
    """

    name: str
    perplexity: dict[str, float]
    sparsity: float
    bytes_up: int
    bytes_down: int

    @property
    def geometric_mean(self) -> float:
        """exp(mean over the domains of log perplexity); nan where none was measured."""
        if not self.perplexity:
            return math.nan
        logs = [math.log(perplexity) for perplexity in self.perplexity.values()]
        return math.exp(sum(logs) / len(logs))


@dataclass(frozen=True)
class LayerResult:
    """One weight matrix after one round.

    clients:  how many pruned and sent it
    sparsity: exact share pruned after the expansion
    votes:    votes[v] weights were kept by exactly v of the clients, v = 0 .. clients; () where
              nobody voted, as when sums of statistics are aggregated
    """

    round: int
    block: int
    layer: str
    shape: tuple[int, ...]
    clients: int
    sparsity: float
    votes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse votes that do not account for every weight once."""
        if self.votes and (len(self.votes) != self.clients + 1 or sum(self.votes) != self.size):
            raise ValueError(
                f"{self.layer} of block {self.block}: {len(self.votes)} votes that sum to "
                f"{sum(self.votes)}; {self.clients} clients and {self.size} weights need "
                f"{self.clients + 1} counts that sum to {self.size}"
            )

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def intersection(self) -> float:
        """Share that every client pruned: the sparsity before the expansion; nan without votes."""
        return self.votes[0] / self.size if self.votes and self.size else math.nan

    @property
    def agreement(self) -> float:
        """Share that all clients kept or all pruned; nan without votes."""
        if not self.votes or not self.size:
            return math.nan
        unanimous = self.size if self.clients == 0 else self.votes[0] + self.votes[-1]
        return unanimous / self.size


@dataclass(frozen=True)
class BlockResult:
    """Who took part in a decoder block in a round.

    clients:  those whose results are in it
    left_out: others who were asked for it, and why they are not in it
    """

    round: int
    block: int
    clients: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientResult:
    """One client over the whole run.

    sparsity: share of the weights that it pruned that it set to zero; nan where it pruned none
    blocks:   the decoder blocks that it drew, by round
    loss:     sum of its pruning losses; 0 where the pruner has none
    wire_up, wire_down: bytes of whole messages on a network, with what they say of themselves; 0
        where the client was in the same process
    """

    name: str
    samples: int
    seqlen: int
    capacity: float
    sparsity: float
    blocks: tuple[tuple[int, ...], ...]
    bytes_up: int
    bytes_down: int
    loss: float = 0.0
    wire_up: int = 0
    wire_down: int = 0


@dataclass(frozen=True)
class Report:
    """Everything that a run measured.

    settings:   Settings.to_dict(), plain values
    model:      name, type, blocks, parameters, prunable
    unprunable: names of weights inside the blocks that were left alone, and why
    layers:     one entry for every round and weight matrix that was aggregated
    blocks:     one entry for every round and block that was aggregated: who took part
    methods:    the comparison, where it was measured
    result:     the name of the method that is this run's own; None: the last
    seconds:    by step of the run
    peak_memory, peak_gpu_memory: bytes of main memory, and in tensors on a GPU; 0: not known, none
    masks:      what was kept, by the full name of each pruned weight; in memory only, not in JSON
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    unprunable: tuple[str, ...]
    clients: tuple[ClientResult, ...]
    layers: tuple[LayerResult, ...]
    blocks: tuple[BlockResult, ...] = ()
    methods: tuple[Method, ...] = ()
    result: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    peak_gpu_memory: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    masks: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def final_layers(self) -> tuple[LayerResult, ...]:
        """Each weight matrix as its last round left it, by block."""
        last: dict[tuple[int, str], LayerResult] = {}
        for layer in sorted(self.layers, key=lambda layer: layer.round):
            last[layer.block, layer.layer] = layer
        return tuple(sorted(last.values(), key=lambda layer: layer.block))

    @property
    def sparsity(self) -> float:
        """Pruned weights over all weights of the matrices that were aggregated; 0 without any."""
        layers = self.final_layers
        weights = sum(layer.size for layer in layers)
        pruned = sum(round(layer.sparsity * layer.size) for layer in layers)
        return pruned / weights if weights else 0.0

    @property
    def final_method(self) -> Method | None:
        """The method named by `result`, else the last one; None without a comparison."""
        if not self.methods:
            return None
        by_name = {method.name: method for method in self.methods}
        return self.methods[-1] if self.result is None else by_name.get(self.result)

    def to_json(self) -> str:
        """Write JSON that any reader takes: infinite and undefined numbers as "inf" and "nan"."""
        record = dataclasses.asdict(dataclasses.replace(self, masks={}))
        del record["masks"]
        return json.dumps(_finite(record), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what to_json wrote; raises ValueError where the text is no such report."""
        try:
            record = json.loads(text)
        except ValueError as error:
            raise ValueError(f"report: this is not JSON ({error}); give report.json") from error
        found = record.get("format_version") if isinstance(record, dict) else None
        if found != FORMAT_VERSION:
            raise ValueError(
                f"report: format_version is {found}, this FedSpa reads {FORMAT_VERSION}; "
                "read it with the version that wrote it, or run again"
            )
        try:
            return _report(record)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"report: a field is missing or unknown ({error}); the file is not a whole report"
            ) from error


def write_html(report: Report, path: str | Path) -> None:
    """Write the report as one self-contained page."""
    # Imported here: matplotlib takes a second to load, and only the page needs it.
    from fedspa import pictures

    pictures.write_html(report, path)


def _report(record: dict[str, Any]) -> Report:
    return Report(
        **record
        | {
            "unprunable": tuple(record["unprunable"]),
            "clients": _each(
                ClientResult, record["clients"], blocks=_nested, sparsity=float, loss=float
            ),
            "layers": _each(LayerResult, record["layers"], shape=tuple, votes=tuple),
            "blocks": _each(BlockResult, record.get("blocks", ()), clients=tuple),
            "methods": _each(Method, record["methods"], perplexity=_floats),
            "seconds": _floats(record["seconds"]),
        }
    )


def _each(kind: type, records: Iterable[dict[str, Any]], **convert: Callable[[Any], Any]) -> Any:
    return tuple(
        kind(**{key: convert[key](value) if key in convert else value for key, value in r.items()})
        for r in records
    )


def _floats(values: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items()}


def _nested(lists: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, lists))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
