"""What a client answers to a letter, and in which words the server says that it failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from fedspa.flower.assignments import Letter
from fedspa.flower.letters import read_letter
from fedspa.flower.tasks import DONE, LACKS, REASONS


@dataclass(frozen=True)
class Answer:
    """What came back: done, or which agreed blocks the client lacks; with its frames by name."""

    letter: Letter
    nonce: str
    lacks: tuple[int, ...]
    frames: dict[str, bytes]


class Failed(ValueError):
    """A client's failure, which has a code; the words are the server's."""

    def __init__(self, code: str, why: str = "") -> None:
        super().__init__(why or REASONS.get(code, REASONS["failed"]))
        self.code = code


def read_answer(reply: Message | None, letter: Letter, nonce: str) -> Answer:
    """A client's answer; raises ValueError where it has failed, in the server's own words."""
    record, frames = read_letter(reply)
    if record.get("nonce") != nonce:
        raise ValueError("it answered another task than it was asked")
    code = record.get("code")
    if code not in (DONE, LACKS):
        raise Failed(str(code))
    lacks = _numbers(record.get("lacks"))
    known = len(set(lacks)) == len(lacks) and set(lacks) <= set(letter.task.holds)
    if (code == LACKS) != bool(lacks) or not known:
        raise ValueError("it lacks blocks that it was not to have")
    return Answer(letter, nonce, lacks, frames)


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError("it answered something else than a list of blocks")
    return tuple(values)
