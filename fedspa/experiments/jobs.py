"""Jobs: cases that share one walk over the blocks are one; running a job yields their records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from statistics import mean
from time import perf_counter
from typing import Any

from torch import Tensor

from fedspa.compare import BYTES_PER_TOKEN, aggregate_again, mean_download, pruned_share
from fedspa.data import client_names
from fedspa.experiments.cases import CLIENT_SIDE, Case
from fedspa.experiments.store import Record, plain, sentence
from fedspa.experiments.workbench import Workbench
from fedspa.machine import machine, peak_memory, versions
from fedspa.messages import BlockMessage
from fedspa.report import Method
from fedspa.run import federate
from fedspa.schedule import exchanged_together


@dataclass(frozen=True)
class Job:
    """Cases that one process runs one after the other; with `one_walk` their clients walk once."""

    cases: tuple[Case, ...]
    one_walk: bool

    @property
    def order(self) -> tuple[int, str, int]:
        """By the file's grids, and there by model, since loading one takes time.

        The longest come first, so that workers end together.
        """
        return min(case.grid for case in self.cases), self.cases[0].model, -self.cost

    @property
    def cost(self) -> int:
        """How many models it prunes and evaluates, about."""
        walked = max(_walked(case) for case in self.cases)
        return walked + sum(
            case.clients if case.kind == "standalone" and case.clients else 1 for case in self.cases
        )


def _walked(case: Case) -> int:
    """How many models are pruned for a case."""
    if case.kind == "dense":
        return 0
    if case.kind == "centralised" or case.settings.get("aggregation") == "statistics":
        return 1
    return (case.clients or 1) * case.settings.get("rounds", 1)


def deal_jobs(cases: Sequence[Case]) -> list[Job]:
    """Cases as jobs, in the order in which they should be started."""
    walks: dict[str, list[Case]] = {}
    for case in cases:
        walks.setdefault(case.one_walk or case.key, []).append(case)
    jobs = [Job(tuple(some), some[0].one_walk is not None) for some in walks.values()]
    return sorted(jobs, key=lambda job: job.order)


def run_job(bench: Workbench, job: Job) -> Iterator[Record]:
    """A record for every case, as it is done; one that fails has the reason in its record."""
    if not job.one_walk:
        for case in job.cases:
            yield _attempt(case, partial(_run_alone, bench, case))
        return
    try:
        walked = _walk(bench, job.cases)
    except Exception as error:  # Every failure is one of these cases, and is told in its record.
        for case in job.cases:
            yield failure(case, sentence(error))
        return
    for case in job.cases:
        run = _stand_alone if case.kind == "standalone" else _aggregate
        yield _attempt(case, partial(run, bench, case, walked))


def failure(case: Case, why: str) -> Record:
    """The record of a case that has no result."""
    return {"key": case.key, **case.identity, **_circumstances(), "error": why}


def _attempt(case: Case, run: Callable[[], Record]) -> Record:
    try:
        return {"key": case.key, **case.identity, **run(), **_circumstances()}
    except Exception as error:  # Told in the record; the cases after it can still be run.
        return failure(case, sentence(error))


def _circumstances() -> Record:
    return {
        "peak_memory": peak_memory(),
        "versions": versions(),
        "machine": machine(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _run_alone(bench: Workbench, case: Case) -> Record:
    """A case that shares nothing: a federation of its own, all data in one place, or no pruning."""
    bench.lay_out(case)
    heldout = bench.heldout(case)
    if case.kind == "dense":
        return _measured(bench, heldout, sparsity=0.0, up=0, down=0, exchanges=0, prune=0.0)
    clients = bench.clients(case)
    settings = case.federation()
    start = perf_counter()
    report = federate(bench.model, clients, settings, progress=False)
    seconds = perf_counter() - start
    blocks = len(bench.dense)
    up = round(mean(client.bytes_up for client in report.clients))
    exchanges = math.ceil(blocks / exchanged_together(settings, blocks)) * settings.rounds
    if case.kind == "centralised":
        # What its clients together would upload if their tokens could leave them.
        up, exchanges = clients[0].tokens.numel() * BYTES_PER_TOKEN, 1
    return _measured(
        bench,
        heldout,
        sparsity=pruned_share(report),
        up=up,
        down=round(mean(client.bytes_down for client in report.clients)),
        exchanges=exchanges,
        prune=seconds,
    )


@dataclass(frozen=True)
class _Walk:
    """What one walk of the clients left: their names and samples, and what they sent."""

    samples: dict[str, int]
    messages: list[BlockMessage]
    heldout: dict[str, Tensor]
    seconds: float


def _walk(bench: Workbench, cases: Sequence[Case]) -> _Walk:
    """Let the clients of cases walk all blocks once, and keep what they send."""
    case = cases[0]
    bench.lay_out(case)
    heldout = bench.heldout(case)
    clients = bench.clients(case)
    local = {name: value for name, value in case.settings.items() if name in CLIENT_SIDE}
    # Weights are many times as large as masks, and kept for every client.
    masks = all(c.kind == "federated" and c.settings.get("aggregation") == "mask" for c in cases)
    settings = replace(case, settings=local).federation(
        aggregation="mask" if masks else "l0", schedule="one-shot"
    )
    messages: list[Any] = []
    start = perf_counter()
    federate(bench.model, clients, settings, progress=False, observe=messages.append)
    seconds = perf_counter() - start
    names = client_names(clients)
    samples = {name: len(c.tokens) for name, c in zip(names, clients, strict=True)}
    return _Walk(samples, messages, heldout, seconds)


def _aggregate(bench: Workbench, case: Case, walked: _Walk) -> Record:
    """What a server makes of the clients' messages."""
    settings = case.federation()
    start = perf_counter()
    agreed = aggregate_again(bench.dense, walked.messages, settings)
    seconds = perf_counter() - start
    bench.write(agreed)
    clients = len(walked.samples)
    if settings.aggregation == "mask":
        layers = [layer for message in walked.messages for layer in message.layers.values()]
        up = sum(layer.bits.nbytes for layer in layers)
    else:
        up = sum(message.nbytes for message in walked.messages)
    return _measured(
        bench,
        walked.heldout,
        sparsity=_pruned(agreed) / bench.prunable,
        up=round(up / clients),
        down=mean_download(walked.messages, agreed, clients),
        exchanges=1,
        prune=walked.seconds + seconds,
    )


def _stand_alone(bench: Workbench, case: Case, walked: _Walk) -> Record:
    """Every client's own model, measured; the record's numbers are their means."""
    members, seconds = [], 0.0
    for name in walked.samples:
        mine = [message for message in walked.messages if message.sender == name]
        bench.write(mine)
        perplexity, took = bench.evaluate(walked.heldout)
        seconds += took
        sparsity = _pruned(mine) / bench.prunable
        members.append(Method(name, perplexity, sparsity, 0, 0))
    by_domain = {
        domain: mean(member.perplexity[domain] for member in members) for domain in walked.heldout
    }
    return {
        "perplexity": {domain: plain(value) for domain, value in by_domain.items()},
        "geometric_mean": plain(mean(member.geometric_mean for member in members)),
        "members": [
            {
                "name": member.name,
                "samples": walked.samples[member.name],
                "perplexity": {d: plain(value) for d, value in member.perplexity.items()},
                "geometric_mean": plain(member.geometric_mean),
                "sparsity": member.sparsity,
            }
            for member in members
        ],
        "sparsity": mean(member.sparsity for member in members),
        "bytes_up": 0,
        "bytes_down": 0,
        "exchanges": 0,
        "seconds": {"prune": walked.seconds, "evaluate": seconds},
    }


def _measured(
    bench: Workbench,
    heldout: dict[str, Tensor],
    *,
    sparsity: float,
    up: int,
    down: int,
    exchanges: int,
    prune: float,
) -> Record:
    """The model's perplexity as it stands, with what it took to get there."""
    perplexity, seconds = bench.evaluate(heldout)
    method = Method("", perplexity, sparsity, up, down)
    return {
        "perplexity": {domain: plain(value) for domain, value in perplexity.items()},
        "geometric_mean": plain(method.geometric_mean),
        "sparsity": sparsity,
        "bytes_up": up,
        "bytes_down": down,
        "exchanges": exchanges,
        "seconds": {"prune": prune, "evaluate": seconds},
    }


def _pruned(messages: Sequence[BlockMessage]) -> int:
    return sum(layer.pruned for message in messages for layer in message.layers.values())
