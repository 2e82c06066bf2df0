"""Memory that a call takes at its worst moment, beyond what was there before it."""

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CLEAR = Path("/proc/self/clear_refs")


def peak(run: Callable[[], Any], device: torch.device | str) -> tuple[int | None, Any]:
    """Run once; return the peak of its extra bytes, its results included, and what it returned.

    On a CPU it is the high-water mark of the resident memory, in pages: below some 100 KiB it says
    nothing. None where the system does not tell. On a GPU it is what PyTorch's allocator counted.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    if not os.access(CLEAR, os.W_OK):
        return None, run()
    _return_free_memory()
    CLEAR.write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    result = run()
    return max(0, _status("VmHWM") - before), result


def available(device: torch.device | str) -> int | None:
    """Return the bytes that can still be allocated on a device, None where nothing tells."""
    if torch.device(device).type == "cuda":
        # What the allocator keeps for later is free to us as well.
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept
    listing = Path("/proc/meminfo")
    if not listing.is_file():
        return None
    return _kilobytes(listing, "MemAvailable")


def _status(field: str) -> int:
    return _kilobytes(Path("/proc/self/status"), field)


def _kilobytes(listing: Path, field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", listing.read_text())
    if found is None:
        raise RuntimeError(f"{listing} has no {field}, so that no memory can be measured")
    return 1024 * int(found[1])


def _return_free_memory() -> None:
    # Pages that malloc kept from an earlier call would serve this one without being counted.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
