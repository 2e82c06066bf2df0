"""What `flwr run --run-config` says: the settings of the pruning, and those of the network."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fedspa.config import known_key
from fedspa.loading import check_dtype
from fedspa.settings import Settings, is_number

WHERE = "run-config"
EXAMPLE = '--run-config \'model="path/to/model" out="pruned" clients=3\''
# The types of values that TOML and Flower have, as a sentence asks for them.
KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: 'a text in quotes, as in {key}="..."',
}


@dataclass(frozen=True)
class Network:
    """Who takes part in a run over a network, and how they meet; checked when it is made.

    model: the checkpoint's folder or Hugging Face id at the server, and at each client whose
        node-config names none.
    out: the server's folder for the pruned checkpoint, the masks and the report.
    clients: how many are waited for before the run begins.
    min_clients: how many must answer for each block; in a run-config 0 stands for all.
    dtype: of the weights in memory; "auto" keeps the checkpoint's.
    device: the server's, and of each client whose node-config names none.
    join_timeout: seconds that the server waits for the clients.
    deadline: seconds that a client has for one task.
    patience: seconds that the server waits on where fewer than `min_clients` answered.
    blocks_per_message: decoder blocks in one message; None (in a run-config 0): as many as
        `message_mib` MiB hold.
    norm_bound: how many times its pretrained norm a layer that a client sends may have.
    samples, seqlen: calibration windows, and tokens in each, of a client whose node-config says
        nothing else.
    restart: forget what a killed run left, and start anew.
    texts: the clients' texts by their partition, for Flower's simulation, whose nodes have no
        node-config of their own; in a run-config separated by ";".

    Raises ValueError with the values and a way out.
    """

    model: str
    out: Path
    clients: int
    min_clients: int
    dtype: str = "auto"
    device: str = "cpu"
    join_timeout: float = 600.0
    deadline: float = 3600.0
    patience: float = 600.0
    blocks_per_message: int | None = None
    message_mib: float = 256.0
    norm_bound: float = 10.0
    samples: int = 128
    seqlen: int = 2048
    restart: bool = False
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        for name in ("clients", "min_clients", "samples", "seqlen", "blocks_per_message"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{WHERE}: {_key(name)} must be at least 1, not {value}")
        if self.min_clients > self.clients:
            raise ValueError(
                f"{WHERE}: min-clients {self.min_clients} is more than the {self.clients} clients "
                f"that are waited for; give at most clients, or 0 for all of them"
            )
        for name in ("join_timeout", "deadline", "message_mib", "norm_bound"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{WHERE}: {_key(name)} must be more than 0 and finite, not {value}"
                )
        if not 0 <= self.patience < math.inf:
            raise ValueError(f"{WHERE}: patience must be 0 or more seconds, not {self.patience}")
        if self.texts and (len(self.texts) < self.clients or not all(self.texts)):
            raise ValueError(
                f"{WHERE}: texts must name one text for each of the {self.clients} clients, "
                f"separated by ';', and names {[text for text in self.texts if text]}"
            )


def read_run_config(config: Mapping[str, Any]) -> tuple[Settings, Network]:
    """The settings of a run and of its network, from the keys of app/pyproject.toml.

    config: values by kebab-case key; where one is missing or "", its default holds.
    raises: ValueError for an unknown key, a missing one, or a value that cannot be.
    """
    hints = {**get_type_hints(Settings), **get_type_hints(Network)}
    # A pruner object of one's own cannot travel; its name can. The other two are made of a text.
    hints |= {"pruner": str, "out": str, "texts": str}
    given = read_values(WHERE, config, hints)
    need(WHERE, given, ("model", "out", "clients"), EXAMPLE)
    settings = Settings(**{f.name: given[f.name] for f in fields(Settings) if f.name in given})
    network = {f.name: given[f.name] for f in fields(Network) if f.name in given}
    network["model"] = os.path.expanduser(given["model"])
    network["out"] = Path(given["out"]).expanduser()
    network["min_clients"] = given.get("min_clients") or given["clients"]
    network["blocks_per_message"] = given.get("blocks_per_message") or None
    texts = given["texts"].split(";") if "texts" in given else []
    network["texts"] = tuple(os.path.expanduser(text.strip()) for text in texts)
    return settings, Network(**network)


def read_values(where: str, config: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are set, by their snake_case names; those that are "" are not.

    where:  the first word of a sentence about them
    hints:  the type of each value that may be given; a None among its types is ""
    raises: ValueError for an unknown key or another type; an int where a float is meant is one
    """
    keys = {_key(name): name for name in hints}
    values = {}
    for key, value in config.items():
        name = keys[known_key(where, key, keys)]
        if isinstance(value, str) and not value.strip():
            continue
        kind = next((kind for kind in get_args(hints[name]) if kind in KINDS), hints[name])
        values[name] = _value(where, key, value, kind)
    return values


def need(where: str, given: Mapping[str, Any], names: Sequence[str], example: str) -> None:
    """Raise ValueError unless all the names were given; `example` shows how."""
    missing = [_key(name) for name in names if name not in given]
    if missing:
        raise ValueError(f"{where} has no {' and no '.join(missing)}; give it as in {example}")


def _value(where: str, key: str, value: object, kind: type) -> Any:
    if kind is float and is_number(value):
        return float(value)  # type: ignore[arg-type]
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: {key} is {value!r}; give {KINDS[kind].format(key=key)}")


def _key(name: str) -> str:
    return name.replace("_", "-")
