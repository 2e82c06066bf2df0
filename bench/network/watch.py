"""Every process of a deployment, looked at while it runs: when it began, its CPU, its memory."""

import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from parties import Parties

TICKS = os.sysconf("SC_CLK_TCK")
# Seconds between two looks at the known processes, and looks until new ones are looked for.
LOOK, SEARCH = 0.1, 3
PROGRAMS = ("flwr-serverapp", "flwr-clientapp", "flower-superlink", "flower-supernode")
PROGRAMS += ("flower-superexec", "flwr")
# By process id its party and program.
Processes = dict[int, tuple[str, str]]


def now() -> float:
    """Seconds on the clock that processes' beginnings are given on: since the machine's start."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine have taken since its start."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _waiting, *interrupts = map(int, fields[:7])
    return (user + nice + system + sum(interrupts)) / TICKS


@dataclass
class Watched:
    """One process; what it did after the last look, LOOK seconds at most, is missing.

    party, program: such as "node-0" and "flwr-clientapp"
    began, seen:    its beginning and the last look at it, as `now` tells
    cpu:            seconds of all its threads
    peak:           bytes of main memory that it held at most, files that it mapped included
    """

    party: str
    program: str
    began: float
    seen: float = 0.0
    cpu: float = 0.0
    peak: int = 0


class Watch:
    """Looks at the processes of a deployment as long as the context is open."""

    def __init__(self, parties: Parties) -> None:
        self._parties = parties
        self._found: dict[tuple[int, float], Watched] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def processes(self, program: str, party: str | None = None) -> list[Watched]:
        """Those of one program in the order of their beginnings; of one party, or of all."""
        every = [one for one in self._found.values() if one.program == program]
        mine = [one for one in every if party is None or one.party == party]
        return sorted(mine, key=lambda one: one.began)

    def _watch(self) -> None:
        known: Processes = {}
        look = 0
        while not self._over.wait(LOOK):
            if look % SEARCH == 0:
                known = self._search()
            look += 1
            for pid, process in known.items():
                self._look(pid, process, known)

    def _search(self) -> Processes:
        known = {}
        for process in self._parties.processes():
            program = next((p for p in PROGRAMS if process.runs(p)), None)
            if program is not None:
                known[process.pid] = Path(process.party).name, program
        return known

    def _look(self, pid: int, process: tuple[str, str], known: Processes) -> None:
        try:
            folder = Path("/proc") / str(pid)
            # Behind the name in brackets, which may hold anything: state is field 3 of 52.
            fields = folder.joinpath("stat").read_text().rpartition(")")[2].split()
            status = folder.joinpath("status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return  # it has ended
        if known.get(int(fields[1])) == process:
            return  # a child that is about to become another program
        began = int(fields[19]) / TICKS
        one = self._found.setdefault((pid, began), Watched(*process, began))
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        if fields[0] == "Z" or peak is None:
            return
        one.seen, one.cpu = now(), (int(fields[11]) + int(fields[12])) / TICKS
        one.peak = max(one.peak, 1024 * int(peak[1]))
