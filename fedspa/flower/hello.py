"""How a client joins: its model and its text are looked at, and its windows drawn and kept."""

from __future__ import annotations

from typing import Any

import torch

from fedspa.config import ClientSpec
from fedspa.flower.node_config import Node
from fedspa.flower.run_config import Network
from fedspa.flower.site import (
    WINDOWS,
    check_same_model,
    locked,
    open_checkpoint,
    own_settings,
    write_windows,
)
from fedspa.ranks import alone
from fedspa.run import order_key, prepare
from fedspa.settings import Settings
from fedspa.streaming.blocks import StreamedBlocks
from fedspa.streaming.fingerprint import model_digest


def introduce(node: Node, network: Network, settings: Settings, servers: str) -> dict[str, Any]:
    """Who this client is, for the server; its windows are drawn, and kept on its own disk.

    servers: the digest of the server's model
    raises:  OtherModel where this client's is another, ValueError where its model or its text
             cannot be used
    """
    source = open_checkpoint(node.model, network, node.device)
    model = model_digest(source)
    check_same_model(node, model, servers)
    spec = ClientSpec(node.name, node.text, node.capacity, node.sparsity, node.samples, node.seqlen)
    client = spec.client(source, spec.read("node-config: text"), settings.seed)
    # Checks that the windows, the model and the settings go together before anybody waits for it.
    blocks = StreamedBlocks(source, torch.device(node.device))
    try:
        prepare(source.model, blocks, [client], own_settings(settings), None, None, alone())
    finally:
        blocks.close()
    node.work.mkdir(parents=True, exist_ok=True)
    with locked(node.work, network.deadline):
        write_windows(node.work / WINDOWS, client.tokens, model)
    return {
        "name": node.name,
        "partition": node.partition,
        "samples": client.tokens.shape[0],
        "seqlen": client.tokens.shape[1],
        "capacity": node.capacity,
        "sparsity": node.sparsity,
        "digest": order_key(client),
        "model": model,
        "wants": node.out is not None,
    }
