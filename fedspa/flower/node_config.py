"""What `flower-supernode --node-config` says of a client: its text, and what it can carry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from fedspa.flower.run_config import Network, need, read_values
from fedspa.settings import check_sparsity

WHERE = "node-config"
EXAMPLE = "--node-config 'partition-id=0 num-partitions=3 text=\"notes.txt\"'"
# Flower's own names, which its simulation gives to every node.
FLOWER_KEYS = {"partition_id": "partition", "num_partitions": "partitions"}
LONGEST_NAME = 100


@dataclass(frozen=True)
class Node:
    """One client, as its own machine describes it; checked when it is made.

    partition, partitions: its number among so many, from 0; None where that was not said.
    name: for the report and the work folder.
    text: what `fedspa.data.read_text` reads; it stays on this machine.
    model: the client's own checkpoint folder or Hugging Face id.
    device: where it computes.
    capacity: the share of decoder blocks that it prunes a round, in (0, 1].
    sparsity: its own target in [0, 1), where it differs from the run's.
    samples, seqlen: its calibration windows, and the tokens in each.
    work: the folder that holds its state between two messages.
    out: the folder for its own copy of the pruned checkpoint; None: it keeps none.

    Raises ValueError with the values and a way out.
    """

    partition: int
    partitions: int | None
    name: str
    text: str
    model: str
    device: str
    capacity: float
    sparsity: float | None
    samples: int
    seqlen: int
    work: Path
    out: Path | None

    def __post_init__(self) -> None:
        if self.partition < 0 or self.partitions is not None and self.partition >= self.partitions:
            among = "" if self.partitions is None else f" of num-partitions {self.partitions}"
            raise ValueError(
                f"{WHERE}: there is no partition-id {self.partition}{among}; partitions are "
                f"numbered from 0, up to num-partitions - 1"
            )
        if not _names_a_folder(self.name):
            raise ValueError(
                f"{WHERE}: name {self.name!r} must also do for a folder; give at most "
                f"{LONGEST_NAME} printable characters without '/'"
            )
        if not 0 < self.capacity <= 1:
            raise ValueError(
                f"{WHERE}: capacity {self.capacity} is outside (0, 1]; it is the share of blocks "
                f"that a client prunes"
            )
        if self.sparsity is not None:
            check_sparsity(WHERE, self.sparsity)
        for name in ("samples", "seqlen"):
            if getattr(self, name) < 1:
                raise ValueError(f"{WHERE}: {name} must be at least 1, not {getattr(self, name)}")


def read_node_config(node: Mapping[str, Any], network: Network) -> Node:
    """A client from its node-config, and where that is silent from the run's.

    node:   values by kebab-case key, of which partition-id must be there, and text unless the
            run names the texts of all
    raises: ValueError for an unknown key, a missing one, or a value that cannot be
    """
    hints = get_type_hints(Node) | {"work": str, "out": str}
    hints |= {flower: hints.pop(ours) for flower, ours in FLOWER_KEYS.items()}
    given = read_values(WHERE, node, hints)
    need(WHERE, given, ("partition_id",), EXAMPLE)
    values = {FLOWER_KEYS.get(name, name): value for name, value in given.items()}
    partition = values["partition"]
    if 0 <= partition < len(network.texts):
        values.setdefault("text", network.texts[partition])
    need(WHERE, values, ("text",), EXAMPLE)
    name = values.setdefault("name", f"client {partition + 1}")
    silent = {"partitions": None, "capacity": 1.0, "sparsity": None, "out": None}
    silent |= {key: getattr(network, key) for key in ("model", "device", "samples", "seqlen")}
    silent["work"] = flower_home() / "fedspa" / name
    values = silent | values
    for key in ("text", "model"):
        values[key] = os.path.expanduser(values[key])
    for key in ("work", "out"):
        if values[key] is not None:
            values[key] = Path(values[key]).expanduser()
    return Node(**values)


def flower_home() -> Path:
    """The folder of Flower's own files on this machine, $FLWR_HOME or ~/.flwr."""
    return Path(os.environ.get("FLWR_HOME") or "~/.flwr").expanduser()


def _names_a_folder(name: str) -> bool:
    whole = Path(name).name == name and name != ".."
    return whole and name.isprintable() and len(name) <= LONGEST_NAME
