"""Who takes part: the nodes that are connected, asked once who they are."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from fedspa.data import Client
from fedspa.flower.introductions import Introduction, not_the_same, read_introduction
from fedspa.flower.letters import HELLO, read_letter, write_letter
from fedspa.flower.mailbox import Mailbox
from fedspa.flower.run_config import Network
from fedspa.flower.tasks import DONE, REASONS
from fedspa.members import Member
from fedspa.settings import Settings

log = logging.getLogger("flwr")

# Seconds between two looks at the network, and until a node that was refused is asked again.
LOOK, AGAIN = 0.5, 10.0


@dataclass
class _Greeting:
    """A node that was asked who it is: the message, "" once it has answered; when to ask again."""

    message_id: str
    again: float = math.inf


class Roster:
    """The clients of a run, and the nodes that they are at."""

    def __init__(
        self,
        grid: Grid,
        mailbox: Mailbox,
        network: Network,
        settings: Settings,
        model: str,
        run: str = "",
        known: Sequence[Introduction] = (),
    ) -> None:
        """model: the digest that every client's model must have.

        run, known: the id and the clients of a run that was interrupted.
        """
        self.members: list[Member] = []
        self._introduced = {found.name: found for found in known}
        self._resumed = bool(known)
        self._grid = grid
        self._mailbox = mailbox
        self._network = network
        self._settings = settings
        self._letter = {"nonce": HELLO, "model": model, "run": run}
        self._model = model
        self._greeted: dict[int, _Greeting] = {}
        self._refused: dict[int, str] = {}

    def join(self) -> None:
        """Wait for as many clients as the run has; in one that was interrupted, fewer may come.

        Raises ValueError where two nodes have one partition or name, or the interrupted run has
        another number of clients, and RuntimeError where too few join in time.
        """
        network, here = self._network, set[str]()
        if self._resumed and len(self._introduced) != network.clients:
            raise ValueError(
                f"the interrupted run has {len(self._introduced)} clients, and clients is "
                f"{network.clients}; give the same number, or restart=true to begin anew"
            )
        end = time.monotonic() + network.join_timeout
        while len(here) < network.clients:
            before = here
            if self._resumed:
                here = here | self.welcome_back()
            else:
                self._welcome()
                # One that another has taken the place of is not here any more.
                here = set(self._introduced)
            for name in sorted(here - before):
                log.info("fedspa: %r is here, %d of %d clients", name, len(here), network.clients)
            if time.monotonic() > end and len(here) < network.clients:
                if self._resumed and len(here) >= network.min_clients:
                    break
                raise RuntimeError(self._too_few(here))
            if len(here) < network.clients:
                time.sleep(LOOK)
        self.members = [_member(found) for found in self.introductions]

    @property
    def introductions(self) -> list[Introduction]:
        """All clients of the run, by their partitions."""
        return sorted(self._introduced.values(), key=lambda found: found.partition)

    def node_of(self, name: str) -> int:
        """The node that a client is at, or was at last."""
        return self._introduced[name].node

    def wants_result(self, name: str) -> bool:
        """Whether a client writes a pruned checkpoint of its own."""
        return self._introduced[name].wants

    def online(self) -> set[int]:
        """The nodes that are connected now."""
        return set(self._grid.get_node_ids())

    def ask_again(self, name: str) -> None:
        """Let a client introduce itself once more, as one must that lost what it had."""
        self._greeted.pop(self.node_of(name), None)

    def welcome_back(self) -> set[str]:
        """Look for clients at new nodes, as one that was started again has; their names."""
        back = set()
        for found in self._look():
            known = self._introduced.get(found.name)
            why = None if known is None else not_the_same(known, found)
            if known is None or why:
                log.warning("fedspa: %r takes no part: %s", found.name, why or "it joined too late")
                continue
            # What it said when it joined holds: the run was planned with it.
            self._introduced[found.name] = replace(known, node=found.node)
            back.add(found.name)
            log.info("fedspa: %r is back", found.name)
        return back

    def _welcome(self) -> None:
        """Take in those who have answered since the last look."""
        for found in self._look():
            if len(self._introduced) < self._network.clients or found.name in self._introduced:
                self._introduce(found)
            else:
                log.warning("fedspa: %r takes no part: it joined too late", found.name)

    def _look(self) -> list[Introduction]:
        """Ask new nodes who they are, and return those that have answered since the last look."""
        connected, now = self.online(), time.monotonic()
        # A node that left is asked again when it is back: its client may have been started anew.
        for node in self._greeted.keys() - connected:
            self._mailbox.forget(self._greeted.pop(node).message_id)
        for node in connected:
            if node not in self._greeted or now > self._greeted[node].again:
                content = write_letter(self._letter, {})
                # For the answer a model of any size is read: it may take as long as joining may.
                message = Message(content, node, HELLO, ttl=self._network.join_timeout)
                (message_id,) = self._grid.push_messages([message])
                if message_id:
                    self._greeted[node] = _Greeting(message_id)
        found = []
        for node, greeting in self._greeted.items():
            for reply in self._mailbox.look(greeting.message_id):
                greeting.message_id = ""
                introduction = self._read(node, reply)
                if introduction is not None:
                    found.append(introduction)
                else:
                    greeting.again = now + AGAIN
        return found

    def _read(self, node: int, reply: Message | None) -> Introduction | None:
        """What a node says, or None where it cannot take part, which is logged."""
        try:
            record, _ = read_letter(reply)
            if record.get("code") != DONE:
                raise ValueError(REASONS.get(str(record.get("code")), REASONS["failed"]))
            if record.get("model") != self._model:
                raise ValueError(REASONS["other model"])
            introduction = read_introduction(node, record, self._settings, self._network)
        except ValueError as error:
            if self._refused.get(node) != str(error):
                log.warning("fedspa: node %d cannot take part: %s", node, error)
            self._refused[node] = str(error)
            return None
        self._refused.pop(node, None)
        return introduction

    def _introduce(self, found: Introduction) -> None:
        online = self.online()
        for name, other in list(self._introduced.items()):
            again = other.node == found.node or other.node not in online
            if again or not not_the_same(other, found):
                # Started again: for a minute the network also shows the node that it was.
                if found.name == other.name or found.partition == other.partition:
                    del self._introduced[name]
            elif other.partition == found.partition:
                raise ValueError(
                    f"nodes {other.node} and {found.node} both have partition-id "
                    f"{found.partition}; give each node another in --node-config, and start the "
                    f"run again"
                )
            elif other.name == found.name:
                raise ValueError(
                    f"nodes {other.node} and {found.node} are both named {found.name!r}; give each "
                    f"another name=... in --node-config, and start the run again"
                )
        self._introduced[found.name] = found

    def _too_few(self, here: set[str]) -> str:
        network = self._network
        names = ", ".join(map(repr, sorted(here))) or "none"
        why = "".join(f"; node {node} was refused: {text}" for node, text in self._refused.items())
        silent = sum(bool(greeting.message_id) for greeting in self._greeted.values())
        if silent:
            why += (
                f"; {silent} nodes are connected and have not answered yet: where a SuperNode's "
                f"log has come to a stop, start it again"
            )
        return (
            f"{len(here)} of {network.clients} clients joined within {network.join_timeout:g} s "
            f"({names}){why}; start the others, or give fewer clients or a longer join-timeout"
        )


def _member(found: Introduction) -> Member:
    # Tokens stay with their client: here they have a shape, and no place in memory.
    tokens = torch.empty(found.samples, found.seqlen, dtype=torch.int64, device="meta")
    client = Client(tokens, found.capacity, found.name, found.sparsity)
    return Member(client, found.name, found.digest)
