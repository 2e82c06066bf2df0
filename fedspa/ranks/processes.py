"""Which processes of this host are alive, told from what they published about themselves."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path


def place(rank: int) -> str:
    """Equal for the ranks that can see each other's processes, and no other.

    Containers may share a host's name but not its processes, and several hosts may share a name,
    so that the boot and the namespace of process ids belong to it. It is a digest: no host's name
    leaves the host. Where the system does not list its processes every rank is alone.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = os.readlink("/proc/self/ns/pid")
        Path(f"/proc/{os.getpid()}/stat").read_bytes()
    except OSError:
        return f"rank {rank}"
    seen = f"{socket.gethostname()} {boot.strip()} {namespace}"
    return hashlib.sha256(seen.encode()).hexdigest()[:32]


def mark(pid: int) -> str:
    """A process that lives: its id and the time at which it started, for ids are used again.

    Empty where there is no such process; one that has ended but that nobody has waited for yet
    is none. Raises OSError where the table of processes cannot be read.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    # The name of the program stands in parentheses, and may hold both blanks and parentheses.
    fields = stat.rpartition(b")")[2].decode().split()
    state, started = fields[0], fields[19]
    return "" if state in "ZX" else f"{pid} {started}"


def lives(marked: str) -> bool:
    """Whether the process that `mark` described is still there, on the same host."""
    try:
        return mark(int(marked.split()[0])) == marked
    except OSError:
        # Nothing can be told, as where this process has too many open files: nobody is dead yet.
        return True
