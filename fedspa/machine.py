"""What a run ran on: versions, machine, and the memory that it took."""

import ctypes
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("fedspa", "torch", "transformers", "triton", "numpy", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Processor, cores that this process may use, memory, GPUs and platform; never a host name."""
    described = {"cpu": _processor(), "cores": str(_cores())}
    memory = _memory()
    if memory:
        described["memory"] = f"{memory / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        described["gpu"] = ", ".join(
            f"{torch.cuda.get_device_name(index)} "
            f"({torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB)"
            for index in range(torch.cuda.device_count())
        )
    return described | {"platform": f"{platform.system()} {platform.machine()}"}


def peak_memory() -> int:
    """Bytes of main memory that this process has held at most; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def memory_now() -> int:
    """Bytes of main memory that this process holds; 0 where the system does not tell."""
    counts = Path("/proc/self/statm")
    if not counts.is_file():
        return 0
    # Pages of the whole address space, then those in main memory.
    return int(counts.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_free() -> int:
    """Bytes of main memory that can still be taken without swapping; 0 where nothing tells."""
    listing = Path("/proc/meminfo")
    if not listing.is_file():
        return 0
    found = re.search(r"MemAvailable:\s+(\d+) kB", listing.read_text())
    return 1024 * int(found[1]) if found else 0


def peak_gpu_memory() -> int:
    """Bytes that this process has held at most in tensors on a GPU, of several the fullest's."""
    if not torch.cuda.is_initialized():
        return 0
    return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def gpu_memory_now() -> int:
    """Bytes that this process holds in tensors on a GPU, of several the fullest's."""
    if not torch.cuda.is_initialized():
        return 0
    return max(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))


def keep_freed_memory() -> None:
    """Let tensors on the CPU take the pages of freed ones, and have large ones, where glibc is.

    It returns more than 32 MiB at once and maps it anew, and clearing those pages took a quarter
    of a run. Must be called before the first large tensor. A user's own settings stand.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's own, for 2 MiB pages
    _set_malloc(2**31 - 1)


def give_back_freed_memory() -> None:
    """Let the system have the pages of every tensor of 1 MB or more as soon as it is freed.

    For a run whose memory is counted: what it takes is then what its tensors take. A user's own
    settings stand.
    """
    if platform.libc_ver()[0] == "glibc":
        _set_malloc(2**20)


def _set_malloc(threshold: int) -> None:
    mallopt = ctypes.CDLL(None).mallopt
    for option, variable in ((-1, "MALLOC_TRIM_THRESHOLD_"), (-3, "MALLOC_MMAP_THRESHOLD_")):
        if variable not in os.environ:
            mallopt(option, threshold)


def return_freed_memory() -> None:
    """Give pages of freed tensors back to the system, where glibc is.

    Blocks that come and go leave holes which malloc does not fill evenly: without this a run of
    60 blocks grew by up to one of them each time.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0
