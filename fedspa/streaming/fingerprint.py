"""What a run is: everything that its bits depend on, so that another run is not taken for it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedspa.data import Client, client_names
from fedspa.machine import versions
from fedspa.settings import Settings
from fedspa.streaming.architecture import Source
from fedspa.streaming.checkpoint import content_digest
from fedspa.streaming.companions import CONFIG
from fedspa_kernels import dispatch

# Whose code computes what a run writes.
PACKAGES = ("fedspa", "torch", "transformers")
# Differences that are spelled out, and characters of a value; the first few say what happened.
SHOWN, LONGEST = 4, 80


def fingerprint(
    model: Mapping[str, Any],
    settings: Settings,
    clients: Sequence[Client],
    batches: Sequence[int],
    device: torch.device | str,
    ranks: Mapping[str, Any] | None = None,
    digests: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What a run is, as plain values by topic.

    model:   such as the digest of its content and the dtype that it is computed in
    batches: for every client, how many windows go through a block at once
    device:  where blocks are computed
    ranks:   such as their number and what is split; None: one
    digests: of the clients' tokens, where they are elsewhere; None: they are here
    """
    digests = digests or [tokens_digest(client.tokens) for client in clients]
    described = zip(clients, batches, digests, strict=True)
    named = zip(client_names(clients), described, strict=True)
    return {
        "model": dict(model),
        "settings": _settings(settings),
        "clients": {name: _client(*of) for name, of in named},
        "machine": _machine(torch.device(device)),
        "ranks": dict(ranks or {}),
    }


def model_identity(source: Source) -> dict[str, str]:
    """What a model is: its weights, its configuration, and the dtype that it is computed in."""
    config = (source.checkpoint.folder / CONFIG).read_bytes()
    return {
        "content": content_digest(source.checkpoint),
        "configuration": hashlib.sha256(config).hexdigest(),
        "dtype": str(source.dtype),
    }


def model_digest(source: Source) -> str:
    """One SHA-256 of `model_identity`, by which two machines know that they have the same model."""
    return hashlib.sha256(json.dumps(model_identity(source)).encode()).hexdigest()


def tokens_digest(tokens: Tensor) -> str:
    """SHA-256 of the shape and the values of tokens, (samples, length) int64."""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def compare(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that is not this one.

    stored, now: from `fingerprint`; the stored one may have been through JSON.
    Raises ValueError saying of what topic which value changed, from what to what.
    """
    changes = list(_changes([], _plain(stored), _plain(now)))
    if not changes:
        return
    more = len(changes) - SHOWN
    also = f"; and {more} more" if more > 0 else ""
    raise ValueError(
        f"the interrupted run cannot be continued by another one: {'; '.join(changes[:SHOWN])}"
        f"{also}. Run the same command again, start over with --restart, or choose another output "
        f"folder"
    )


def _settings(settings: Settings) -> dict[str, Any]:
    """The settings; of a pruner object its repr, without the address, which each process chooses.

    The batch size is left to the clients, where it is what the run really takes.
    """
    values = settings.to_dict()
    values["pruner"] = re.sub(r" at 0x[0-9a-fA-F]+", "", values["pruner"])
    del values["batch_size"]
    return values


def _client(client: Client, batch: int, digest: str) -> dict[str, Any]:
    return {
        "tokens": digest,
        "samples": client.tokens.shape[0],
        "length": client.tokens.shape[1],
        "capacity": client.capacity,
        "sparsity": client.sparsity,
        "batch": batch,
    }


def _machine(device: torch.device) -> dict[str, Any]:
    """The code and the hardware that decide how a sum is rounded."""
    installed = versions()
    found: dict[str, Any] = {package: installed.get(package) for package in PACKAGES}
    found["device"] = device.type
    found["backend"] = dispatch.preferred("obs_prune", device)
    found["float32 products"] = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    else:
        # A product is cut into parts by the number of threads, and so is obs_prune's sweep of wide
        # blocks; each way to cut adds up in an order of its own.
        found["threads"] = torch.get_num_threads()
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
    return found


def _plain(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(values))


def _changes(path: list[str], stored: Any, now: Any) -> Iterator[str]:
    """Every value that differs, as "topic key was this and is that"."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in [*stored, *(key for key in now if key not in stored)]:
            where = [*path, key]
            if key not in now:
                yield f"{_where(where)} was there and is not"
            elif key not in stored:
                yield f"{_where(where)} is there and was not"
            else:
                yield from _changes(where, stored[key], now[key])
    elif stored != now and repr(stored) != repr(now):  # nan is unlike itself
        yield f"{_where(path)} was {_shown(stored)} and is {_shown(now)}"


def _where(path: Sequence[str]) -> str:
    """The topic, for a client its name, and the key."""
    if path[0] == "clients" and len(path) > 1:
        return " ".join(["client", repr(path[1]), *path[2:]])
    return " ".join(path)


def _shown(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{40,}", value):
        return f"{value[:12]}…"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
