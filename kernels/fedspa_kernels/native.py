"""The compiled library: what was built, why the rest was not, how it is loaded and called.

setup.py leaves a record of each build beside the library. A source tree that was never installed
has neither.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("libfedspa_native.so")
RECORD = Path(__file__).with_name("_build.json")
REBUILD = "`pip install --no-build-isolation --no-deps --force-reinstall .` in FedSpa's source tree"
PARTS = {"cpu": "library", "cuda": "CUDA part of the library"}


def built() -> tuple[str, ...]:
    """The devices that the native library was compiled for: (), ("cpu",) or ("cpu", "cuda")."""
    return tuple(_record()["built"])


def why_not() -> str:
    """Why `built()` is not longer, as half a sentence; "" where nothing is missing."""
    return str(_record()["why_not"])


@functools.cache
def load() -> bool:
    """Register the operators of `torch.ops.fedspa_native`, once; False where no library was built.

    raises: RuntimeError where the library is there and cannot be loaded into this torch
    """
    if not built():
        return False
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise RuntimeError(
            f"fedspa_kernels: {LIBRARY} was built with torch {_record()['torch']} and does not "
            f"load into torch {torch.__version__} ({error}); rebuild it with {REBUILD}"
        ) from error
    return True


@functools.cache
def why_not_on(device: torch.device) -> str:
    """Why the library does not serve a device, as half a sentence, or "" where it does.

    raises: RuntimeError where the library is there and cannot be loaded into this torch
    """
    load()
    if device.type not in built():
        part = PARTS.get(device.type, f"library for {device.type}")
        return f"the {part} is not built: {why_not()}; with what is missing there, run {REBUILD}"
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return "the library is for CUDA, and this torch is not"
    oldest = tuple(_record()["oldest_gpu"])
    gpu = torch.cuda.get_device_properties(device)
    if (gpu.major, gpu.minor) < oldest:
        return (
            f"{gpu.name} has compute capability {gpu.major}.{gpu.minor} and the library has code "
            f"for {oldest[0]}.{oldest[1]} and newer"
        )
    return _why_no_launch(device)


def _why_no_launch(device: torch.device) -> str:
    """Why a first, small kernel does not run, such as a driver older than the compiler; or ""."""
    try:
        KERNELS.pack_mask(torch.ones(1, 8, dtype=torch.bool, device=device)).item()
    except RuntimeError as error:
        return f"its kernels do not run here ({str(error).splitlines()[0]})"
    return ""


class _Kernels:
    """The compiled kernels as functions, each on the current stream of its tensors' device."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.fedspa_native, name).default

        def launch(*arguments: Any) -> Any:
            return operator(*arguments, _current_stream(arguments[0]))

        # An attribute from now on: the next call does not come here.
        setattr(self, name, launch)
        return launch


KERNELS = _Kernels()


def _current_stream(argument: Tensor | list[Tensor]) -> int:
    """Return the cudaStream_t as an integer: the stable ABI of torch 2.10 has no way to ask."""
    tensor = argument if isinstance(argument, Tensor) else argument[0]
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _record() -> dict[str, Any]:
    if not RECORD.is_file():
        return {"built": [], "why_not": "fedspa was not installed (`make build` does it)"}
    return json.loads(RECORD.read_text())
