"""Flower's network in one process: the real ServerApp and ClientApp, their messages handed over.

What a fault does is decided by the test: it may change an answer, keep it back, or lose a node.
"""

import random
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from small_models import make_model, save_with_tokenizer

from fedspa.flower import client_app, server_app
from fedspa.flower.run_config import read_run_config

# What the tests' app is run with where they say nothing else.
USUAL = {"samples": 3, "seqlen": 16, "deadline": 20.0, "patience": 0.0, "join-timeout": 20.0}

# Given a client's name, the message's type and its answer; returns what arrives, or None.
Tamper = Callable[[str, str, Message], Message | None]


class NearbyGrid(Grid):
    """A SuperLink and its SuperNodes.

    nodes: the --node-config by node. sent: every message, its name and type. tamper: see above.
    """

    def __init__(self, nodes: dict[int, dict], run_config: dict, tamper: Tamper | None = None):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.nodes = dict(nodes)
        self.run_config = run_config
        self.tamper = tamper
        self.sent: list[tuple[str, str]] = []
        # By message who it went to; and the node of the last one.
        self.owners: dict[str, tuple[str, str]] = {}
        self.last = 0
        self._replies: dict[str, Message] = {}

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str | None:
        node = message.metadata.dst_node_id
        if node not in self.nodes:
            return None
        message_id = f"m{len(self.sent)}"
        message.metadata.__dict__["_message_id"] = message_id
        config = self.nodes[node]
        name, kind = config.get("name", f"client {node}"), message.metadata.message_type
        self.sent.append((name, kind))
        self.owners[message_id] = name, kind
        self.last = node
        context = Context(1, node, config, RecordDict(), self.run_config)
        reply = client_app.app(message, context)
        if self.tamper is not None:
            reply = self.tamper(name, kind, reply)
        if reply is not None:
            self._replies[message_id] = reply
        return message_id

    def pull_messages(self, message_ids):
        return [self._replies.pop(m) for m in message_ids if m in self._replies]

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError


def make_federation(
    folder: Path, clients: int = 3, layers: int = 3, **config
) -> tuple[dict[int, dict], dict]:
    """A checkpoint, texts, and the configurations of nodes and run; config in snake_case."""
    save_with_tokenizer(make_model(layers=layers), folder / "model")
    nodes = {}
    for number in range(clients):
        draw = random.Random(number)
        words = " ".join(f"word{draw.randrange(20 * number, 20 * number + 40)}" for _ in range(90))
        text = folder / f"{number}.txt"
        text.write_text(words)
        nodes[11 + number] = {
            "partition-id": number,
            "num-partitions": clients,
            "name": f"c{number}",
            "text": str(text),
            "work": str(folder / f"work{number}"),
            "out": str(folder / f"out{number}"),
        }
    run = {"model": str(folder / "model"), "out": str(folder / "out"), "clients": clients}
    given = {key.replace("_", "-"): value for key, value in config.items()}
    return nodes, USUAL | run | given


def serve(grid: NearbyGrid):
    """Run the server; returns the report."""
    with without_page():
        return server_app.serve(grid, *read_run_config(grid.run_config))


def without_page():
    """The report's page takes longer to draw than all else here, and is tested elsewhere."""
    return mock.patch("fedspa.output.write_html")
