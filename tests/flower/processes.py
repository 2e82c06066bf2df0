"""Processes of a deployment: started with a mark in their environment, found by it, ended.

Flower starts children in sessions of their own (a SuperLink's SuperExec), so that a process group
holds only a part of a party. Whatever descends from a party carries the party's mark.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "FEDSPA_TEST_PARTY"


@dataclass(frozen=True)
class Found:
    """A process that runs now."""

    pid: int
    party: str
    command: tuple[str, ...]

    def runs(self, program: str) -> bool:
        """Whether it is this program, such as flwr-clientapp: a script behind its Python."""
        return any(Path(word).name == program for word in self.command[:2])


def start(
    command: Sequence[str], party: str, environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a party's process in a session of its own; what it prints is appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env={**environment, MARK: party},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def find(parties: Mapping[int, str]) -> list[Found]:
    """The running processes of these parties (by the process ids that they were started with)."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state = folder.joinpath("stat").read_text().rpartition(")")[2].split()[0]
            command = tuple(folder.joinpath("cmdline").read_text().split("\0")[:-1])
            party = _party(folder, command, parties)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended between two of these lines
        # Z: it has ended, and its parent has not yet read how.
        if state not in "ZX" and party is not None and party in parties.values():
            found.append(Found(int(folder.name), party, command))
    return found


def _party(folder: Path, command: tuple[str, ...], parties: Mapping[int, str]) -> str | None:
    try:
        environment = folder.joinpath("environ").read_bytes()
    except PermissionError:
        # Another user's process; or a SuperExec, which forbids even its own user to read its
        # environment (PR_SET_DUMPABLE) and has the id of the party's process on its command line.
        if "--parent-pid" not in command:
            return None
        return parties.get(int(command[command.index("--parent-pid") + 1]))
    entries = (entry.partition(b"=") for entry in environment.split(b"\0"))
    return next((value.decode() for name, _, value in entries if name == MARK.encode()), None)


def send(processes: Sequence[Found], number: signal.Signals) -> None:
    """Send a signal to those that still run."""
    for process in processes:
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            pass  # ended by itself meanwhile, which is what a signal is sent for


def interrupt(session: int) -> None:
    """Ctrl-C in the terminal of a process that was started here."""
    try:
        os.killpg(session, signal.SIGINT)
    except ProcessLookupError:
        pass  # it and all its children in that terminal have ended


def wait_for(condition: Callable[[], object], what: str, timeout: float) -> None:
    """Ask again until it holds; TimeoutError with `what` after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {timeout:g} s")
        time.sleep(0.05)


def tail(log: Path, lines: int = 30) -> str:
    """The end of a log, for an error message."""
    if not log.exists():
        return f"{log.name}: nothing"
    return f"{log.name}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
