"""Which backend runs a call, and how an operator becomes `torch.ops.fedspa.<name>`.

An operator family declares its backends next to its door:

    dispatch.add("smallest_mask", "reference", reference_smallest_mask)
    dispatch.add_kernels("smallest_mask", kernel.smallest_mask, family="selection")
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedspa_kernels import native

# The order of preference without a choice. Triton reaches CPU tensors only in its interpreter,
# which is for tests. Other device types are those that Triton may serve.
ORDER = {
    "cuda": ("native", "triton", "reference"),
    "cpu": ("native", "reference", "triton"),
    "xpu": ("triton", "reference"),
}
BACKENDS = ("native", "triton", "reference")

# The operators live as long as this object does.
_LIBRARY = torch.library.Library("fedspa", "FRAGMENT")


def takes_no_float64(*arguments: Any) -> str:
    """Why a kernel that computes in float32 does not take these arguments, or ""."""
    flat = (item for a in arguments for item in (a if isinstance(a, (list, tuple)) else (a,)))
    if any(isinstance(item, Tensor) and item.dtype == torch.float64 for item in flat):
        return "its kernels compute in float32, and a tensor is float64"
    return ""


class Backend(NamedTuple):
    """One implementation of an operator.

    devices: the device types that it serves, None means all
    refuses: why it does not take these arguments, or ""
    """

    run: Callable[..., Any]
    devices: tuple[str, ...] | None = None
    refuses: Callable[..., str] = lambda *arguments: ""


_BACKENDS: dict[str, dict[str, Backend]] = {}
_PUBLIC: set[str] = set()


def define(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator of `torch.ops.fedspa` from its schema, body and fake implementation."""
    name = schema.partition("(")[0]
    _PUBLIC.add(name)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Nothing here is differentiable: without the fallthrough, PyTorch would mark the outputs of
    # parameters as requiring a gradient that only fails in backward.
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _LIBRARY.impl(name, torch.no_grad()(body), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fedspa::{name}", fake, lib=_LIBRARY)


def add(operator: str, backend: str, run: Callable[..., Any], *rest: Any) -> None:
    """Declare a backend of an operator; what else it takes stands at `Backend`."""
    _BACKENDS.setdefault(operator, {})[backend] = Backend(run, *rest)


def add_kernels(
    operator: str,
    launch: Callable[..., Any],
    family: str,
    refuses: Callable[..., str] = takes_no_float64,
) -> None:
    """Declare the compiled and the Triton backend of an operator.

    launch: called with the kernels, which are functions of the same names and arguments whatever
            the backend (the family's kernel.py says which), and the operator's own arguments
    """
    add_native(operator, launch, refuses)
    add_triton(operator, launch, family, refuses)


def add_native(
    operator: str, launch: Callable[..., Any], refuses: Callable[..., str] = takes_no_float64
) -> None:
    """Declare the compiled backend of an operator."""
    run = functools.partial(launch, native.KERNELS)
    add(operator, "native", run, ("cpu", "cuda"), refuses)


def add_triton(
    operator: str,
    launch: Callable[..., Any],
    family: str,
    refuses: Callable[..., str] = takes_no_float64,
) -> None:
    """Declare the Triton backend of an operator: the module `triton` in the family's folder."""

    def run(*arguments: Any) -> Any:
        # Imported at the first call: whoever never runs it does not need Triton.
        return launch(importlib.import_module(f"fedspa_kernels.{family}.triton"), *arguments)

    add(operator, "triton", run, ("cuda", "xpu", "cpu"), refuses)


def operators() -> tuple[str, ...]:
    """Return the names of all operators of `torch.ops.fedspa`."""
    return tuple(sorted(_PUBLIC))


def available(operator: str, device_type: str) -> tuple[str, ...]:
    """Return the backends that can run an operator on a device type now, the preferred first."""
    order = ORDER.get(device_type, ("reference",))
    return tuple(name for name in order if not _why_not(operator, name, device_type))


def run(operator: str, device: torch.device, backend: str | None, *arguments: Any) -> Any:
    """Run an operator on the backend that was asked for, or else on the preferred one."""
    implementation = _choose(operator, device.type, backend, arguments)
    # Inside an autocast region the float32 products would silently run in half precision.
    with torch.autocast(device.type, enabled=False):
        return implementation(*arguments)


def _choose(
    operator: str, device_type: str, backend: str | None, arguments: tuple
) -> Callable[..., Any]:
    backends = _BACKENDS[operator]
    if backend is None:
        backend = os.environ.get("FEDSPA_BACKEND") or None
    there = available(operator, device_type)
    if backend is None:
        return next(backends[name].run for name in there if not backends[name].refuses(*arguments))
    if backend not in BACKENDS:
        raise ValueError(
            f"{operator}: backend {backend!r} is not known; choose from {', '.join(BACKENDS)}"
        )
    if backend not in there:
        raise RuntimeError(
            f"{operator}: no {backend} backend for {device_type} tensors, "
            f"{_why_not(operator, backend, device_type)}; available: {', '.join(there)}"
        )
    refusal = backends[backend].refuses(*arguments)
    if refusal:
        raise RuntimeError(
            f"{operator}: the {backend} backend cannot run this call, {refusal}; "
            "leave the backend to be chosen, or convert"
        )
    return backends[backend].run


def _why_not(operator: str, name: str, device_type: str) -> str:
    """Why a backend cannot run on a device type, as half a sentence, or ""."""
    backend = _BACKENDS[operator].get(name)
    if backend is None or not (backend.devices is None or device_type in backend.devices):
        return "none is written"
    if name == "native":
        return native.why_not_on(device_type)
    return _why_no_triton(device_type) if name == "triton" else ""


def _why_no_triton(device_type: str) -> str:
    # The variable is Triton's own; its kernels become interpreted ones when they are imported.
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on a GPU (on a CPU only with TRITON_INTERPRET=1, for tests)"
    return "" if _has_triton() else "triton is not installed (`pip install triton`)"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
