"""The parties of a deployment: folders, homes and logs of their own; killed, and ended."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from processes import Found, find, interrupt, send, start, wait_for

TREE = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent  # not resolved: a virtual environment's python is a link
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Parties:
    """The processes of several parties, each as on a machine of its own.

    folder:       each party has a folder in it: FLWR_HOME (home) and logs
    modules:      folders of modules that Python may import, besides this tree
    environment:  variables for every process
    """

    def __init__(
        self,
        folder: Path,
        modules: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
    ):
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FLWR_")},
            "PATH": os.pathsep.join([str(PROGRAMS), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(map(str, [*modules, TREE, TREE / "kernels"])),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            # Flower 1.41 asks for new tasks every second, on both sides of every message.
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            **(environment or {}),
        }
        self.started: dict[int, str] = {}  # process id -> mark of its party
        self.children: list[subprocess.Popen[bytes]] = []

    def start(
        self, party: str, command: Sequence[str], log: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process of this party; what it prints goes to its log."""
        environment = {**self.environment, "FLWR_HOME": str(self.home(party))}
        process = start(command, self._mark(party), environment, log or self.log(party))
        self.started[process.pid] = self._mark(party)
        self.children.append(process)
        # Read at once how it ended: Flower's children take a zombie for a parent that still runs.
        threading.Thread(target=process.wait, daemon=True).start()
        return process

    def _mark(self, party: str) -> str:
        return str(self.folder / party)

    def home(self, party: str) -> Path:
        """Its FLWR_HOME."""
        return self.folder / party / "home"

    def log(self, party: str) -> Path:
        """What it and its apps printed."""
        return self.folder / party / f"{party}.log"

    def text(self, party: str) -> str:
        """Its log so far, colours taken out."""
        return read(self.log(party))

    def wait_for_text(self, party: str, part: str, timeout: float = 60, times: int = 1) -> None:
        """Wait until its log has this in it, as many times."""
        what = f"{part!r} {times} times in the log of {party}"
        wait_for(lambda: self.text(party).count(part) >= times, what, timeout)

    def processes(self, party: str | None = None, program: str | None = None) -> list[Found]:
        """Running processes: everybody's, a party's, or those of one program of it."""
        marks = {self._mark(party)} if party else set(self.started.values())
        found = [process for process in find(self.started) if process.party in marks]
        return [process for process in found if program is None or process.runs(program)]

    def kill(self, party: str, program: str | None = None) -> int:
        """kill -9 a party, or its processes of one program, such as flwr-clientapp; how many."""
        killed: set[int] = set()
        # One that started another while it was looked for is found the second time.
        while processes := self.processes(party, program):
            processes = [process for process in processes if process.pid not in killed]
            send(processes, signal.SIGKILL)
            killed |= {process.pid for process in processes}
            if program is not None:
                break
            time.sleep(0.02)
        return len(killed)

    def end(self, patience: float = 20) -> list[Found]:
        """Ctrl-C in every terminal, the SuperLink's last; then kill what is left.

        returns: what was left `patience` seconds later
        """
        link = self._mark("superlink")
        for last in (False, True):
            for child in self.children:
                if child.poll() is None and (self.started[child.pid] == link) == last:
                    interrupt(child.pid)
            try:
                wait_for(partial(self._ended, last), "the end", patience)
            except TimeoutError:
                pass  # what is left is returned
        left = self.processes()
        while processes := self.processes():
            send(processes, signal.SIGKILL)
            time.sleep(0.02)
        for child in self.children:
            child.wait()
        return left

    def _ended(self, superlink_too: bool) -> bool:
        link = self._mark("superlink")
        return all(one.party == link and not superlink_too for one in self.processes())


def read(log: Path) -> str:
    """A log so far, colours taken out; "" where there is none yet."""
    return COLOURS.sub("", log.read_text(errors="replace")) if log.exists() else ""
