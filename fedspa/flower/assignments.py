"""A client's next task as the letters that carry it, with the agreed blocks that it has not got."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fedspa.flower import agreed_blocks
from fedspa.flower.letters import WORK
from fedspa.flower.tasks import Task
from fedspa.members import Member, Run


@dataclass(frozen=True)
class Letter:
    """One message to a client.

    frames: of agreed blocks that travel with it: the file, and the bytes of masks and values in it.
    last: whether its answer is the client's part; a letter before it only brings frames.
    """

    member: Member
    kind: str
    task: Task
    frames: dict[int, tuple[Path, int]]
    last: bool


def letters(member: Member, task: Task, kind: str, folder: Path, room: float) -> list[Letter]:
    """A task in messages of at most `room` bytes, or of a single block that is larger."""
    parts: list[dict[int, tuple[Path, int]]] = [{}]
    size = 0
    for block, version in task.holds.items():
        if member.holds.get(block) == version:
            continue
        path, payload = agreed_blocks.find(folder, block, version)
        if parts[-1] and size + payload > room:
            parts.append({})
            size = 0
        parts[-1][block] = path, payload
        size += payload
    *before, last = parts
    return [
        *(_bringing(member, task, part) for part in before),
        Letter(member, kind, task, last, True),
    ]


def _bringing(member: Member, task: Task, part: dict[int, tuple[Path, int]]) -> Letter:
    holds = {block: task.holds[block] for block in part}
    return Letter(member, WORK, replace(task, blocks=(0, 0), holds=holds), part, False)


def versions_for(
    run: Run, member: Member, round_index: int, blocks: range, together: range
) -> dict[int, int]:
    """For each agreed block that a client needs for a task the round of the version it needs."""
    versions = {}
    for block in member.drawn[-1]:
        if block < blocks.stop and block in run.agreed:
            rounds = [result.round for result in run.results if result.block == block]
            # Within an exchange clients go on from what there was before it.
            rounds = [r for r in rounds if r < round_index or block not in together]
            if rounds:
                versions[block] = max(rounds)
    return versions
