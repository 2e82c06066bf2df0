"""What a frame says of itself, and what it was expected to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import Repr
from typing import Any

import torch

from fedspa.pruners import SUMS

# The names of dtypes that travel; bfloat16 as its 16 bits, which few libraries have a name for.
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}
KINDS = ("weights", "mask", *SUMS)
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Envelope:
    """What every frame of a run says of itself.

    model: content hash of the checkpoint, hex. run: the run's id, hex. task: nonce of the task that
    the frame answers, or of the task that brings it.
    """

    model: str
    run: str
    task: str


@dataclass(frozen=True)
class Expected:
    """What a frame must be; anything else is refused. Checked itself when it is made.

    sender: the client's name, or "server" for agreed blocks.
    samples: calibration windows that the sender announced; None: not checked.
    shapes: every layer of the block with its rows and columns, in the block's order.
    kind: "weights" or "mask", or of statistics one of `pruners.SUMS`.
    dtype: of values or of statistics; None for masks.
    """

    envelope: Envelope
    sender: str
    round: int
    block: int
    samples: int | None
    shapes: Mapping[str, tuple[int, int]]
    kind: str
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        dtypes = [None] if self.kind == "mask" else list(NAMES)
        if self.kind not in KINDS or self.dtype not in dtypes:
            raise ValueError(
                f"a frame of {self.kind!r} with dtype {self.dtype} cannot be expected; it is one "
                f"of {list(KINDS)}, masks without a dtype and all others with one of "
                f"{sorted(DTYPES)}"
            )

    @property
    def frame_kind(self) -> str:
        """What the frame says that it holds; statistics of all kinds look alike on the wire."""
        return self.kind if self.kind in ("weights", "mask") else "statistics"

    @property
    def who(self) -> str:
        """How sentences about the frame begin."""
        return f"{self.sender!r}, block {self.block}"


def check_header(header: dict[str, Any], expected: Expected) -> None:
    """Compare what a frame says of itself with what it was expected to be.

    Raises ValueError naming the first of its fields that is missing or another.
    """
    dtype = None if expected.dtype is None else NAMES[expected.dtype]
    wanted: dict[str, tuple[Any, str]] = {
        "kind": (expected.frame_kind, "all must run with the same settings"),
        "model": (expected.envelope.model, "load the very checkpoint that the server has"),
        "run": (expected.envelope.run, "it belongs to another run"),
        "task": (expected.envelope.task, "it answers a task that is not open"),
        "sender": (expected.sender, "nobody speaks for another"),
        "round": (expected.round, "it was not asked for now"),
        "block": (expected.block, "it was not asked for now"),
        "samples": (expected.samples, "the number of windows stays as it was announced"),
        "dtype": (dtype, "all must run with the same settings"),
    }
    for name, (value, why) in wanted.items():
        found = field(header, name, expected.who)
        if name == "samples":
            check_whole(found, name, expected.who)
            value = found if value is None else value
        # True is 1, and 1.0 is 1, but neither is what was asked.
        if type(found) is not type(value) or found != value:
            raise ValueError(
                f"{expected.who}: the frame says {name} {shown(found)}, and {shown(value)} was "
                f"expected: {why}"
            )


def field(header: dict[str, Any], name: str, who: str) -> Any:
    """A field of a header; raises ValueError where it is missing."""
    if name not in header:
        raise ValueError(f"{who}: the frame's header has no {name!r}")
    return header[name]


def check_whole(value: Any, name: str, who: str) -> int:
    """Return a number of things as it is; raises ValueError unless it is a whole number >= 0."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{who}: the frame says {name} {shown(value)}, and not a whole number")
    return value


def shown(value: Any) -> str:
    """A value from elsewhere for a sentence, cut where it is long, whatever it is."""
    return _SHOWN.repr(value)


_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80
