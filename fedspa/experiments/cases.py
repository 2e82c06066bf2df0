"""A case: one model pruned in one way, as it is asked for and as it is found again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedspa.settings import Settings

KINDS = ("federated", "dense", "standalone", "centralised")
# What a target and a seed decide, beside a method's own settings.
NOT_OF_A_METHOD = ("sparsity", "pattern", "seed")
# What only a client reads: one walk over the blocks serves all that differ in the others.
CLIENT_SIDE = (
    "pruner",
    "layers_per_client",
    "every_block",
    "block_size",
    "damping",
    "batch_size",
    "message_dtype",
)
SETTINGS = tuple(f.name for f in fields(Settings) if f.name not in NOT_OF_A_METHOD)
# Weights in messages where a method does not say; AUTO is the model's own dtype.
MESSAGE_DTYPE, AUTO = "bfloat16", "auto"
Source = tuple[str, str]


@dataclass(frozen=True)
class Text:
    """Where text is read: a source of `fedspa.sources`, and the part of it that is meant."""

    source: str
    part: str


@dataclass(frozen=True)
class Data:
    """Windows of a domain to calibrate and to evaluate on, their tokens, and where text is.

    written: as the file has it, for records; the texts are resolved.
    """

    windows: int
    seqlen: int
    eval_windows: int
    calibration: dict[str, Text]
    heldout: dict[str, Text]
    written: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One result that a grid asks for; None stands for what does not matter to its kind.

    model: as the file has it; source: what is loaded. target: a sparsity or a pattern.
    settings: of its method, resolved to one value each. grid: the place in the file, from 0.
    """

    model: str
    dtype: str
    target: float | str | None
    clients: int | None
    partition: str | None
    capacities: tuple[float, ...] | None
    seed: int | None
    method: str
    kind: str
    settings: dict[str, Any]
    data: Data
    source: str = field(compare=False)
    grid: int = field(default=0, compare=False)

    @property
    def identity(self) -> dict[str, Any]:
        """What its record begins with, and all that its key depends on."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "target": self.target,
            "clients": self.clients,
            "partition": self.partition,
            "capacities": None if self.capacities is None else list(self.capacities),
            "seed": self.seed,
            "method": self.method,
            "kind": self.kind,
            "settings": self.settings,
            "data": self.data.written,
        }

    @property
    def key(self) -> str:
        """16 hexadecimal digits, the same for the same case in every experiment file."""
        texts = [*self.data.calibration.values(), *self.data.heldout.values()]
        files = {text.source for text in texts if Path(text.source).is_absolute()}
        if self.source != self.model:
            files.add(self.source)
        # The same relative path in another folder is another file.
        located = {"files": sorted(files)} if files else {}
        return digest({**self.identity, **located})[:16]

    @property
    def title(self) -> str:
        """The case in a line."""
        told = {k: v for k, v in self.settings.items() if k not in ("message_dtype", "pruner")}
        facts = [self.method, *(f"{name}={value}" for name, value in told.items())]
        if self.target is not None:
            sparsity = isinstance(self.target, float)
            facts.append(f"{100 * self.target:g}%" if sparsity else str(self.target))
        if self.clients is not None:
            facts.append(f"{self.clients} clients {self.partition}")
        if self.capacities is not None:
            facts.append(f"capacities {', '.join(f'{c:g}' for c in self.capacities)}")
        if self.seed is not None:
            facts.append(f"seed {self.seed}")
        return ", ".join(facts)

    def federation(self, **other: Any) -> Settings:
        """Its settings for `fedspa.federate`; `other` ones replace its own."""
        target: dict[str, Any] = {"sparsity": self.target}
        if isinstance(self.target, str):
            target = {"pattern": self.target}
        if self.kind == "centralised":
            # On the agreed block, as sums of statistics are; with one client all else is the same.
            target["schedule"] = "synchronous"
            if "statistics_dtype" in self.settings:
                # Only statistics have one; those of one client are those of all data.
                target["aggregation"] = "statistics"
        own = dict(self.settings)
        if own.get("message_dtype") == AUTO:
            own["message_dtype"] = None
        return Settings(**{**own, **target, "seed": self.seed, **other})

    @property
    def one_walk(self) -> str | None:
        """What cases have in common that can be had from one walk; None: it needs its own.

        The clients' messages of one one-shot round hold everything that a client's own model, and
        the aggregations of it, are made of. Where clients stay away or leave it is not known from
        the messages alone who received what, so that these are run one by one.
        """
        if self.kind == "federated":
            ours = self.federation()
            if (
                ours.walking != "one-shot"
                or ours.rounds > 1
                or ours.aggregation not in ("l0", "mean", "mask")
                or ours.participation < 1
                or ours.dropout > 0
            ):
                return None
        elif self.kind != "standalone":
            return None
        client_side = {name: v for name, v in self.settings.items() if name in CLIENT_SIDE}
        same = {"method": None, "kind": None, "settings": client_side}
        return digest({**self.identity, **same})


def digest(value: Any) -> str:
    """A sha256 over plain values, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
