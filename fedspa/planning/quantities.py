"""Sizes in bytes as people write them, and what this machine has of them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

from fedspa.machine import memory_free, memory_now

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Where Linux says what a container may use.
LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
USED = (
    Path("/sys/fs/cgroup/memory.current"),
    Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "80GB" (1e9), "80GiB" (2**30), "512 MB" or "1000000".

    Raises ValueError with the text and the way to write it.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise ValueError(f"size {text!r} is unclear; write it such as 80GB, 79.6GiB or 512MB")
    size = int(float(found[1]) * UNITS[found[2].upper()])
    if size < 1:
        raise ValueError(f"size {text!r} is no space at all; write it such as 80GB")
    return size


def written(size: float) -> str:
    """Bytes in GB (1e9) with two digits behind the point, small ones in MB or kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= 0.995 * unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size / 1e3:.2f} kB" if size else "0"


def device_memory() -> int | None:
    """All memory of this machine's first GPU; None where there is none."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def free_memory() -> int | None:
    """Main memory that this process holds or could still take; None where nothing tells."""
    free = memory_free()
    for limit, used in zip(LIMITS, USED, strict=True):
        if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
            free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0) + memory_now() if free else None


def free_disk(folder: Path) -> int:
    """Free bytes where a folder is or would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
