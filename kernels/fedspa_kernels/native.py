"""The compiled library: what was built, why the rest was not, and how it is loaded.

setup.py leaves a record of each build beside the library. A source tree that was never installed
has neither.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("libfedspa_native.so")
RECORD = Path(__file__).with_name("_build.json")


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
            f"load into torch {torch.__version__} ({error}); rebuild it with `pip install "
            "--no-build-isolation --no-deps --force-reinstall .` in FedSpa's source tree"
        ) from error
    return True


def _record() -> dict[str, Any]:
    if not RECORD.is_file():
        return {"built": [], "why_not": "fedspa was not installed (`make build` does it)"}
    return json.loads(RECORD.read_text())
