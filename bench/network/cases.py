"""Which runs are measured: the models, the clients, and what a message holds."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# Seconds that a message or the joining may take here, since all share the cores of one machine; and
# the dtype of messages on both sides, which the app alone would have another default for.
PATIENT = {"deadline": 600.0, "join-timeout": 600.0, "message-dtype": "float32"}
SMOLLM2_DOMAINS = ("speeches", "database_manual", "scripture")
SMOLLM2_WINDOWS = {"samples": 8, "seqlen": 256}


@dataclass(frozen=True)
class Case:
    """One run, over the network and in one process.

    group:   "fixed", "clients", "bytes", "database" or "smollm2"
    hidden:  width of a random Llama-like model; None: the tests' smallest, or SmolLM2
    blocks:  its decoder blocks
    config:  of the run, by kebab-case key
    poll:    seconds between two looks of Flower for work at each of its processes; 1.0 is its own
    keep:    every client writes its own copy of the result
    database: the SuperLink keeps its state, and what is under way, in a file
    """

    group: str
    name: str
    clients: int = 3
    hidden: int | None = None
    blocks: int = 3
    config: dict[str, Any] = field(default_factory=dict)
    poll: float = 0.1
    keep: bool = False
    database: bool = False


def _bytes(hidden: int, together: int, group: str = "bytes") -> Case:
    config = {"pruner": "magnitude", "sparsity": 0.5, "blocks-per-message": together}
    name = f"hidden {hidden}, {together} a message"
    return Case(group, name, 3, hidden, 4, config, database=group == "database")


def _smollm2(name: str, **config: Any) -> Case:
    given = {"sparsity": 0.6, "dtype": "bfloat16", "message-dtype": "bfloat16"}
    given |= {**SMOLLM2_WINDOWS, **config}
    return Case("smollm2", name, 3, None, 30, given, keep=True)


CASES = (
    Case("fixed", "Flower's own polls", config={"sparsity": 0.6}, poll=1.0),
    Case("fixed", "polls of 0.1 s", config={"sparsity": 0.6}),
    *(Case("clients", f"{n} clients", n, config={"sparsity": 0.6}) for n in (2, 4, 8, 16)),
    *(_bytes(hidden, together) for together in (1, 2) for hidden in (96, 320, 544, 1024)),
    _bytes(1024, 1, "database"),
    _smollm2("one-shot l0"),
    _smollm2("statistics", aggregation="statistics", **{"synchronize-every": 10}),
)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))


def choose(groups: Iterable[str], name: str) -> list[Case]:
    """The cases of these groups whose name has this in it.

    raises: ValueError for an unknown group, or where no case is left
    """
    groups = list(groups)
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"group {group!r} is not known; choose from {', '.join(GROUPS)}")
    found = [case for case in CASES if case.group in groups and name in case.name]
    if not found:
        names = ", ".join(repr(case.name) for case in CASES if case.group in groups)
        raise ValueError(
            f"no case of {', '.join(groups)} has {name!r} in its name; there are {names}"
        )
    return found
