"""Who takes part: the nodes that are connected, asked once who they are."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from fedspa.data import Client
from fedspa.flower.letters import HELLO, read_letter, write_letter
from fedspa.flower.run_config import Network
from fedspa.flower.tasks import DONE, REASONS
from fedspa.members import Member
from fedspa.settings import is_number

log = logging.getLogger("flwr")

# Seconds between two looks at the network.
LOOK = 0.5
LONGEST_NAME = 100
# More windows, or longer ones, no client has.
MOST = 2**40


@dataclass(frozen=True)
class Introduction:
    """What a node says of its client; every value is checked.

    digest: orders the clients. wants: whether it writes a pruned checkpoint of its own.
    """

    node: int
    name: str
    partition: int
    samples: int
    seqlen: int
    capacity: float
    sparsity: float | None
    digest: str
    wants: bool


class Roster:
    """The clients of a run, and the nodes that they are at."""

    def __init__(self, grid: Grid, network: Network, model: str, run: str) -> None:
        """model: the digest that every client's model must have. run: "" where none has begun."""
        self.members: list[Member] = []
        self._introduced: dict[str, Introduction] = {}
        self._grid = grid
        self._network = network
        self._letter = {"nonce": HELLO, "model": model, "run": run}
        self._model = model
        # Nodes that were asked who they are: the message, or "" once they have answered.
        self._asked: dict[int, str] = {}
        self._refused: dict[int, str] = {}

    def join(self) -> None:
        """Wait for as many clients as the run has.

        Raises ValueError where two nodes have one partition or name, and RuntimeError where too
        few join in time.
        """
        network = self._network
        end = time.monotonic() + network.join_timeout
        said = 0
        while len(self._introduced) < network.clients:
            for found in self.look():
                self._introduce(found)
                said = len(self._introduced)
                log.info("fedspa: %r is here, %d of %d clients", found.name, said, network.clients)
            if len(self._introduced) < network.clients:
                if time.monotonic() > end:
                    raise RuntimeError(self._too_few())
                time.sleep(LOOK)
        ordered = sorted(self._introduced.values(), key=lambda found: found.partition)
        self.members = [_member(found) for found in ordered]

    def node_of(self, name: str) -> int:
        """The node that a client is at."""
        return self._introduced[name].node

    def wants_result(self, name: str) -> bool:
        """Whether a client writes a pruned checkpoint of its own."""
        return self._introduced[name].wants

    def online(self) -> set[int]:
        """The nodes that are connected now."""
        return set(self._grid.get_node_ids())

    def welcome_back(self) -> set[str]:
        """Look for clients at new nodes, as one that was started again has; their names."""
        back = set()
        for found in self.look():
            known = self._introduced.get(found.name)
            # Nobody but the client and this server knows the digest of its windows.
            if known is None or found.digest != known.digest:
                log.warning("fedspa: %r joined too late, and takes no part", found.name)
                continue
            self._introduced[found.name] = found
            back.add(found.name)
            log.info("fedspa: %r is back", found.name)
        return back

    def look(self) -> list[Introduction]:
        """Ask new nodes who they are, and return those that have answered since the last look."""
        connected = self.online()
        new = [node for node in connected if node not in self._asked]
        for node in new:
            message = Message(
                write_letter(self._letter, {}), node, HELLO, ttl=self._network.deadline
            )
            (self._asked[node],) = self._grid.push_messages([message])
        found = []
        for node, message_id in self._asked.items():
            if message_id and node in connected:
                for reply in self._grid.pull_messages([message_id]):
                    self._asked[node] = ""
                    introduction = self._read(node, reply)
                    if introduction is not None:
                        found.append(introduction)
        return found

    def _read(self, node: int, reply: Message) -> Introduction | None:
        """What a node says, or None where it cannot take part, which is logged."""
        try:
            if reply.has_error():
                raise ValueError(REASONS["failed"])
            record, _ = read_letter(reply.content)
            if record.get("code") != DONE:
                raise ValueError(REASONS.get(str(record.get("code")), REASONS["failed"]))
            if record.get("model") != self._model:
                raise ValueError(REASONS["other model"])
            return _introduction(node, record)
        except ValueError as error:
            self._refused[node] = str(error)
            log.warning("fedspa: node %d cannot take part: %s", node, error)
            return None

    def _introduce(self, found: Introduction) -> None:
        for other in self._introduced.values():
            if other.partition == found.partition:
                raise ValueError(
                    f"nodes {other.node} and {found.node} both have partition-id "
                    f"{found.partition}; give each node another in --node-config, and start the "
                    f"run again"
                )
            if other.name == found.name:
                raise ValueError(
                    f"nodes {other.node} and {found.node} are both named {found.name!r}; give each "
                    f"another name=... in --node-config, and start the run again"
                )
        self._introduced[found.name] = found

    def _too_few(self) -> str:
        network = self._network
        names = ", ".join(map(repr, self._introduced)) or "none"
        why = "".join(f"; node {node} was refused: {text}" for node, text in self._refused.items())
        return (
            f"{len(self._introduced)} of {network.clients} clients joined within "
            f"{network.join_timeout:g} s ({names}){why}; start the others, or give fewer clients "
            f"or a longer join-timeout"
        )


def _member(found: Introduction) -> Member:
    # Tokens stay with their client: here they have a shape, and no place in memory.
    tokens = torch.empty(found.samples, found.seqlen, dtype=torch.int64, device="meta")
    client = Client(tokens, found.capacity, found.name, found.sparsity)
    return Member(client, found.name, found.digest)


def _introduction(node: int, record: dict[str, Any]) -> Introduction:
    """Check every value of a node's answer; raises ValueError for one that cannot be."""

    def check(name: str, fits: Callable[[Any], bool]) -> Any:
        value = record.get(name)
        if not fits(value):
            raise ValueError(f"it says {name} {value!r:.60}, which cannot be")
        return value

    def count(least: int) -> Callable[[Any], bool]:
        return lambda value: type(value) is int and least <= value < MOST

    def share(value: Any) -> bool:
        return is_number(value) and math.isfinite(value) and 0 < value <= 1

    def is_name(value: Any) -> bool:
        return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()

    return Introduction(
        node=node,
        name=check("name", is_name),
        partition=check("partition", count(0)),
        samples=check("samples", count(1)),
        seqlen=check("seqlen", count(1)),
        capacity=check("capacity", share),
        sparsity=check("sparsity", lambda value: value is None or value == 0 or share(value)),
        digest=check("digest", lambda value: isinstance(value, str) and len(value) == 64),
        wants=check("wants", lambda value: isinstance(value, bool)),
    )
