"""How a process finds the other ranks: the environment of torchrun, a store, a process group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fedspa.ranks.group import SPLITS, Ranks
from fedspa.ranks.peers import name_ranks
from fedspa.ranks.watch import Watch

_HOW = "torchrun --nproc-per-node N -m fedspa prune ... --split samples"
# Ranks may compute for days between two collectives; the watch alone says which are dead.
_FOR_EVER = timedelta(days=7)


@dataclass(frozen=True)
class _Place:
    """What torchrun, or whoever starts the ranks without it, says to one of them.

    local_rank: among the ranks of its host. agent: whether a torchrun serves the store, not rank 0.
    attempt: how often torchrun has started them again.
    """

    rank: int
    size: int
    local_rank: int | None
    host: str
    port: int
    agent: bool
    attempt: int


def alone() -> Ranks:
    """One rank that has all the work."""
    return Ranks(0, 1, None, None)


def join(
    split: str | None,
    device: str | torch.device,
    *,
    period: float = 2.0,
    patience: float = 45.0,
    arrival: float = 600.0,
) -> Ranks:
    """Join the ranks that torchrun started, or be alone where it did not start this process.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which can also be set without
    torchrun. Tensors on the CPU go over gloo, those on GPUs over NCCL.

    split: what the ranks divide. device: "cpu", or "cuda" for one GPU each, which the result's
        `device` names. period, patience, arrival: seconds between two signs of life, of silence
        after which a host is taken for dead, and until the last rank must have come.
    raises: ValueError where there are ranks but no split, or a split but no ranks, for an
        environment that cannot be read and for a device that ranks cannot have; RuntimeError where
        the others cannot be reached
    """
    device = torch.device(device)
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if split is not None:
            raise ValueError(
                f"--split {split} divides work over ranks, and there are none (RANK and WORLD_SIZE "
                f"are not set); start them with {_HOW}"
            )
        return Ranks(0, 1, None, device)
    here = _read_place(os.environ)
    if here.size > 1 and split is None:
        raise ValueError(
            f"{here.size} ranks would all do the same work: say what they divide (--split samples "
            f"or --split clients), or start one process without torchrun"
        )
    if here.size == 1:
        return Ranks(0, 1, split, device)
    return _join(here, split, device, period, patience, arrival)


def _read_place(environment: Mapping[str, str]) -> _Place:
    """What the environment says, or a ValueError."""

    def number(name: str, least: int, below: int | None = None) -> int:
        text = environment.get(name)
        if text is None:
            raise ValueError(f"RANK and WORLD_SIZE are set, {name} is not; start ranks with {_HOW}")
        if not text.isdecimal() or int(text) < least or (below is not None and int(text) >= below):
            bounds = f"at least {least}" if below is None else f"from {least} to {below - 1}"
            raise ValueError(f"{name} is {text!r}; it must be a whole number {bounds}")
        return int(text)

    size = number("WORLD_SIZE", 1)
    rank = number("RANK", 0, size)
    if size > 1 and not environment.get("MASTER_ADDR"):
        raise ValueError(
            f"RANK and WORLD_SIZE are set, MASTER_ADDR is not; start ranks with {_HOW}"
        )
    return _Place(
        rank=rank,
        size=size,
        local_rank=number("LOCAL_RANK", 0, size) if "LOCAL_RANK" in environment else None,
        host=environment.get("MASTER_ADDR", ""),
        port=number("MASTER_PORT", 1, 65536) if size > 1 else 0,
        agent=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=number("TORCHELASTIC_RESTART_COUNT", 0)
        if "TORCHELASTIC_RESTART_COUNT" in environment
        else 0,
    )


def _own_device(here: _Place, device: torch.device) -> torch.device:
    """The device of one rank: each has a GPU of its own."""
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"ranks compute on cpu or cuda, not on {device}")
    if device.index is not None:
        raise ValueError(
            f"device {device} is one GPU, and there are {here.size} ranks; give --device cuda, "
            f"which is another one for each rank of a host"
        )
    count = torch.cuda.device_count()
    # Without torchrun every host is taken to have as many ranks as GPUs.
    local_rank = here.local_rank if here.local_rank is not None else here.rank % max(count, 1)
    if local_rank >= count:
        raise ValueError(
            f"{name_ranks([here.rank], here.size)} is number {local_rank} on its host (LOCAL_RANK, "
            f"from 0), where there are {count} GPUs; start at most one rank for each GPU"
        )
    if not dist.is_nccl_available():
        raise RuntimeError("this PyTorch was built without NCCL, over which ranks on GPUs add up")
    return torch.device("cuda", local_rank)


def _join(
    here: _Place,
    split: str | None,
    device: torch.device,
    period: float,
    patience: float,
    arrival: float,
) -> Ranks:
    serves = here.rank == 0 and not here.agent
    # The first connection is the server, where this rank serves; the watch needs one of its own.
    store = _connect(here, serves, arrival)
    watch = Watch(
        _connect(here, False, arrival),
        here.rank,
        here.size,
        agent=here.agent,
        period=period,
        patience=patience,
        arrival=arrival,
    )
    ranks = Ranks(here.rank, here.size, split, device, watch)
    try:
        # After the watch, so that the others hear of a rank that cannot have its device.
        ranks.device = _own_device(here, device)
        if device.type == "cuda":
            torch.cuda.set_device(ranks.device)
        with ranks.naming():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=here.rank,
                world_size=here.size,
                timeout=_FOR_EVER,
            )
            watch.all_came()
    except BaseException as error:
        ranks.__exit__(type(error), error, None)
        raise
    return ranks


def _connect(here: _Place, serve: bool, arrival: float) -> dist.Store:
    """A connection to the store of this run, or of this attempt of torchrun at it."""
    try:
        store = dist.TCPStore(
            here.host,
            here.port,
            is_master=serve,
            wait_for_workers=False,
            timeout=timedelta(seconds=arrival),
        )
    except RuntimeError as error:
        who = name_ranks([here.rank], here.size)
        if serve:
            raise RuntimeError(
                f"{who} cannot listen on MASTER_PORT {here.port} ({str(error).splitlines()[0]}); "
                f"set another one"
            ) from error
        raise RuntimeError(
            f"{who} found no store at MASTER_ADDR and MASTER_PORT {here.port} within "
            f"{arrival:g} s; is rank 0 running, and can its host be reached from here?"
        ) from error
    return dist.PrefixStore(f"fedspa/{here.attempt}", store)
