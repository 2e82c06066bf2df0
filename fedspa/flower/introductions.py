"""What a node says of its client when it joins, and how the server knows it again."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from hmac import compare_digest
from typing import Any

from fedspa.flower.node_config import LONGEST_NAME
from fedspa.flower.run_config import Network
from fedspa.settings import Settings
from fedspa.wire.header import shown

# No count is larger; and what a client may have more than the run-config says, in tokens.
MOST, WEIGHTIEST = 2**31, 4


@dataclass(frozen=True)
class Introduction:
    """What a node says of its client; every value is checked.

    digest: orders the clients. word: by which it is known again at another node.
    wants: whether it writes a pruned checkpoint of its own.
    """

    node: int
    name: str
    partition: int
    samples: int
    seqlen: int
    capacity: float
    sparsity: float | None
    digest: str
    word: str
    wants: bool


def not_the_same(known: Introduction, found: Introduction) -> str:
    """Why a node is not a client that was here before, or "" where it is."""
    if known.name != found.name or known.digest != found.digest:
        return "it has another name or other windows than before"
    if known.node != found.node and not compare_digest(known.word, found.word):
        return "it does not know this client's secret word"
    return ""


def read_introduction(
    node: int, record: dict[str, Any], settings: Settings, network: Network
) -> Introduction:
    """Check every value of a node's answer; raises ValueError for one that cannot be."""

    def check(name: str, fits: Callable[[Any], bool]) -> Any:
        value = record.get(name)
        if not fits(value):
            raise ValueError(f"it says {name} {shown(value)}, which cannot be")
        return value

    def count(value: Any) -> bool:
        return type(value) is int and 0 < value < MOST

    def share(value: Any) -> bool:
        # Compared before anything else is done with it: a whole number may be of any size.
        return type(value) in (int, float) and 0 < value <= 1

    def sparsity(value: Any) -> bool:
        if value is None:
            return True
        own = settings.aggregation != "statistics" and settings.pattern is None
        return own and type(value) in (int, float) and 0 <= value < 1

    def is_name(value: Any) -> bool:
        return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()

    def is_hexadecimal(value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None

    samples, seqlen = check("samples", count), check("seqlen", count)
    # What a client weighs in the result follows from what it says here.
    most = WEIGHTIEST * network.samples * network.seqlen
    if samples * seqlen > most:
        raise ValueError(
            f"it says that it has {samples} windows of {seqlen} tokens, and a client may have "
            f"{WEIGHTIEST} times the samples and seqlen of the run-config, {most} tokens; raise "
            f"those if that is right"
        )
    return Introduction(
        node=node,
        name=check("name", is_name),
        partition=check("partition", lambda value: type(value) is int and 0 <= value < MOST),
        samples=samples,
        seqlen=seqlen,
        capacity=check("capacity", share),
        sparsity=check("sparsity", sparsity),
        digest=check("digest", is_hexadecimal),
        word=check("word", is_hexadecimal),
        wants=check("wants", lambda value: isinstance(value, bool)),
    )
