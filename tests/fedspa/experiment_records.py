"""Invented records of a grid, with numbers near what SmolLM2-135M has."""

import hashlib
import itertools
import json
import math

DOMAINS = ("speeches", "novel", "scripture", "database_manual", "python_manual")
DATA = {"windows": 8, "seqlen": 256, "eval_windows": 4}
# By target: centralised, and how many times that the other methods reach.
CENTRALISED = {0.5: 30.2, 0.6: 52.4, 0.7: 168.0, 0.8: 940.0, "2:4": 61.0}
FACTORS = {0.5: 1.05, 0.6: 1.15, 0.7: 1.4, 0.8: 1.9, "2:4": 1.2}
ORDER = (
    "dense",
    "standalone",
    "plain mean",
    "FedPrLLM",
    "FedSpaLLM",
    "FedSpaLLM, synchronous",
    "statistics",
    "centralised",
)
FEDERATED = {
    "plain mean": ({"aggregation": "mean"}, 2.6, 150e6),
    "FedPrLLM": ({"aggregation": "mask"}, 1.5, 13.3e6),
    "FedSpaLLM": ({"aggregation": "l0"}, 1.3, 121e6),
    "FedSpaLLM, synchronous": ({"aggregation": "l0", "schedule": "synchronous"}, 1.2, 119e6),
    "statistics": ({"aggregation": "statistics"}, 0.0, 1.9e8),
}


def record(method, kind="federated", *, geometric_mean=50.0, **changes):
    """One line of a results file; `changes` replace or add to its fields."""
    fields = {
        "model": "smollm2-135m",
        "dtype": "bfloat16",
        "target": 0.6,
        "clients": 4,
        "partition": "domain",
        "capacities": None,
        "seed": 0,
        "method": method,
        "kind": kind,
        "settings": {},
        "data": DATA,
        "perplexity": {"speeches": geometric_mean, "novel": geometric_mean},
        "geometric_mean": geometric_mean,
        "sparsity": 0.6,
        "bytes_up": 2_000_000,
        "bytes_down": 1_500_000,
        "exchanges": 1,
        "seconds": {"prune": 10.0, "evaluate": 2.0},
        "peak_memory": 10**9,
    }
    if kind in ("dense", "centralised"):
        fields |= {"clients": None, "partition": None}
    if kind == "dense":
        fields |= {"target": None, "seed": None, "bytes_up": 0, "bytes_down": 0, "exchanges": 0}
    fields |= changes
    identity = [
        fields[name]
        for name in "model dtype target clients partition capacities seed method settings".split()
    ]
    key = hashlib.sha256(json.dumps([identity, fields["data"]]).encode()).hexdigest()[:16]
    return {"key": key} | fields


def failed(method, sentence, kind="federated", **changes):
    """The record of a case that ended in an error: without any measurement."""
    measured = ("perplexity", "geometric_mean", "sparsity", "bytes_up", "bytes_down", "exchanges")
    whole = record(method, kind, **changes)
    return {n: v for n, v in whole.items() if n not in measured} | {"error": sentence}


def standalone(means, **changes):
    """A record of clients whose geometric means are these."""
    members = [
        {
            "name": f"client {index}",
            "samples": 8,
            "perplexity": {"speeches": value, "novel": value},
            "geometric_mean": str(value) if isinstance(value, float) and value > 1e30 else value,
            "sparsity": 0.6,
        }
        for index, value in enumerate(means)
    ]
    mean = sum(means) / len(means)
    return record(
        "standalone", "standalone", geometric_mean=mean, members=members, bytes_up=0, **changes
    )


def grid(clients=(4, 8, 16), partitions=("domain", "iid"), targets=tuple(CENTRALISED)):
    """The main grid, two seeds of it."""
    lines = [_measured("dense", "dense", 22.1)]
    for seed, target in itertools.product((0, 1), targets):
        pooled = CENTRALISED[target] * (1 + 0.004 * seed)
        lines.append(
            _measured("centralised", "centralised", pooled, target=target, seed=seed, bytes_up=2048)
        )
        for count, partition in itertools.product(clients, partitions):
            spread = (FACTORS[target] - 1) * (1 if partition == "domain" else 0.3)
            spread *= math.log2(count) / 2
            place = {"clients": count, "partition": partition, "seed": seed, "target": target}
            alone = [pooled * (1 + spread * (1.7 + 0.8 * i / count)) for i in range(count)]
            lines.append(standalone(alone, **place))
            for method, (settings, distance, up) in FEDERATED.items():
                value = pooled * (1 + distance * spread) * (1.001 if not distance else 1)
                lines.append(
                    _measured(method, "federated", value, settings=settings, bytes_up=up, **place)
                )
    return lines


def curves():
    """Exchanges from one to thirty, of two methods."""
    lines = []
    for every, (name, aggregation, distance) in itertools.product(
        (1, 2, 5, 10, 30), (("curve", "statistics", 0.05), ("l0 curve", "l0", 0.28))
    ):
        settings = {
            "aggregation": aggregation,
            "schedule": "synchronous",
            "synchronize_every": every,
        }
        value = 52.4 * (1 + distance * (1 + math.log(every)) / 2)
        exchanges = math.ceil(30 / every)
        lines.append(
            _measured(name, "federated", value, settings=settings, exchanges=exchanges, clients=8)
        )
    return lines


def variants():
    """FedPrLLM's own: two axes."""
    factors = {"layer": 1.0, "row": 1.01, "column": 9.0}
    return [
        record(
            "FedPrLLM variants",
            geometric_mean=70 * factor * (1.3 if scaling else 1),
            settings={"aggregation": "mask", "expansion": expansion, "scaling": scaling},
        )
        for (expansion, factor), scaling in itertools.product(factors.items(), (False, True))
    ]


def _measured(method, kind, value, **changes):
    perplexity = {name: value * 1.2 ** (i - 2) for i, name in enumerate(DOMAINS)}
    return record(method, kind, geometric_mean=value, perplexity=perplexity, **changes)
