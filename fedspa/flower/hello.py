"""How a client joins: its model and its text are looked at, and its windows drawn and kept."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from fedspa.config import ClientSpec
from fedspa.flower import windows
from fedspa.flower.node_config import Node
from fedspa.flower.run_config import Network
from fedspa.flower.site import (
    check_same_model,
    open_checkpoint,
    own_run,
    remove_old_runs,
)
from fedspa.run import order_key
from fedspa.settings import Settings
from fedspa.streaming.architecture import Source
from fedspa.streaming.blocks import StreamedBlocks
from fedspa.streaming.fingerprint import model_digest


def introduce(node: Node, network: Network, settings: Settings, servers: str) -> dict[str, Any]:
    """Who this client is, for the server; its windows are drawn, and kept on its own disk.

    servers: the digest of the server's model
    raises:  OtherModel where this client's is another, ValueError where its model or its text
             cannot be used, RuntimeError where its disk is too small
    """
    source = open_checkpoint(node.model, network, node.device)
    model = model_digest(source)
    check_same_model(node, model, servers)
    spec = ClientSpec(node.name, node.text, node.capacity, node.sparsity, node.samples, node.seqlen)
    client = spec.client(source, spec.read("node-config: text"), settings.seed)
    # Checks that the windows, the model and the settings go together before anybody waits for it.
    blocks = StreamedBlocks(source, torch.device(node.device))
    try:
        own_run(source, blocks, client, settings)
    finally:
        blocks.close()
    node.work.mkdir(parents=True, exist_ok=True)
    _check_room(node, source, settings, client.tokens.numel())
    remove_old_runs(node.work)
    digest = order_key(client)
    windows.write(node.work, client.tokens, digest, model)
    return {
        "name": node.name,
        "partition": node.partition,
        "samples": client.tokens.shape[0],
        "seqlen": client.tokens.shape[1],
        "capacity": node.capacity,
        "sparsity": node.sparsity,
        "digest": digest,
        "word": windows.secret_word(node.work),
        "model": model,
        "wants": node.out is not None,
    }


def _check_room(node: Node, source: Source, settings: Settings, tokens: int) -> None:
    """Refuse to begin with too little disk for agreed blocks, hidden states and a result."""
    config = source.model.config.get_text_config(decoder=True)
    # The agreed blocks, in walks of several exchanges or rounds, and for the result.
    again = settings.walking == "synchronous" or settings.rounds > 1 or node.out is not None
    needed = source.checkpoint.nbytes * (again + (node.out is not None))
    # Four places are kept at a time at most.
    needed += 4 * tokens * config.hidden_size * source.dtype.itemsize
    free = shutil.disk_usage(node.work).free
    if needed > free:
        raise RuntimeError(
            f"{node.work}: this run may take {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} "
            f"GB are free; free some, or name another work=... in --node-config"
        )
