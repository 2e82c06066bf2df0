"""What the server asks of a client in one message, and the codes that a client answers with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# What a client says became of a task; the words are the server's, never the client's own.
DONE = "done"
LACKS = "lacks"
STRANGER = "stranger"
REASONS = {
    "refused": "its settings, text or data do not fit, as its own log explains",
    "machine": "its machine could not do it (memory, disk, device), as its own log explains",
    "other model": "its model differs from the server's",
    STRANGER: "it does not have the windows with which it joined any more",
    "failed": "it failed, and its own log says how",
}
# Asking again within an exchange would bring the same.
USELESS = "useless"
FINAL = ("refused", "other model", USELESS)


@dataclass(frozen=True)
class Task:
    """A client's work for one message.

    nonce:    a word that the answer must repeat
    run:      the run's id; what a client keeps on its disk belongs to one
    model:    the content hash of the server's checkpoint
    digest:   of the windows with which the client joined
    round:    from 0
    drawn:    the decoder blocks that the client drew in this round
    together: first block and end of those that are exchanged at a time
    blocks:   first block and end of those to work on now; empty where frames alone are sent
    asked:    for each of these blocks that it drew, how many clients are asked
    holds:    the round of the agreed version of each block that it needs
    seconds:  that it has
    copies:   whether the client writes its own copy of the result, at the end
    """

    nonce: str
    run: str
    model: str
    digest: str
    round: int
    drawn: tuple[int, ...]
    together: tuple[int, int]
    blocks: tuple[int, int]
    asked: dict[int, int]
    holds: dict[int, int]
    seconds: float
    copies: bool = False

    def to_record(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Task:
        """From what `to_record` made, also after a way through JSON.

        Raises ValueError where it is no task: the server runs another version.
        """
        try:
            return cls(
                **dict(record)
                | {
                    "drawn": tuple(map(int, record["drawn"])),
                    "together": _pair(record["together"]),
                    "blocks": _pair(record["blocks"]),
                    "asked": _numbered(record["asked"]),
                    "holds": _numbered(record["holds"]),
                }
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the server's task cannot be read ({error}); install the same version of FedSpa "
                f"on both sides"
            ) from None


def _pair(values: Any) -> tuple[int, int]:
    begin, end = map(int, values)
    return begin, end


def _numbered(values: Mapping[str, int]) -> dict[int, int]:
    return {int(key): int(value) for key, value in values.items()}
