"""A run's id and its clients, beside the state that a killed server goes on with."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fedspa.flower.introductions import Introduction
from fedspa.streaming.disk import write_whole
from fedspa.streaming.state import STATE_FILE

FILE = "network.json"


def interrupted(folder: Path) -> tuple[str, list[Introduction]]:
    """The id and the clients of the run that a killed server left in a folder, if it did."""
    path = folder / FILE
    if not (path.is_file() and (folder / STATE_FILE).is_file()):
        return "", []
    record = json.loads(path.read_text())
    return record["run"], [Introduction(**found) for found in record["clients"]]


def opened(folder: Path, clients: Sequence[Introduction]) -> str:
    """The id of the run in a folder, which begins now where there was none."""
    path = folder / FILE
    if not path.is_file():
        run = {"run": secrets.token_hex(16), "clients": [asdict(found) for found in clients]}
        write_whole(path, json.dumps(run).encode())
    identity: str = json.loads(path.read_text())["run"]
    return identity
