"""Which backend runs a call, and how an operator becomes `torch.ops.fedspa.<name>`.

An operator family declares its backends next to its door:

    dispatch.add("smallest_mask", "reference", reference_smallest_mask)
    dispatch.add_kernels("smallest_mask", kernel.smallest_mask, family="selection")
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
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
VARIABLE = "FEDSPA_BACKEND"
# What a kernel refuses is read back from the GPU, which no CUDA graph can record.
TAGS = tuple(
    getattr(torch.Tag, name)
    for name in ("pt2_compliant_tag", "cudagraph_unsafe")
    if hasattr(torch.Tag, name)
)

# The operators live as long as this object does.
_LIBRARY = torch.library.Library("fedspa", "FRAGMENT")


def takes_all(*arguments: Any) -> str:
    """Refuse nothing."""
    return ""


def takes_no_float64(*arguments: Any) -> str:
    """Why a kernel that computes in float32 does not take these arguments, or ""."""
    for argument in arguments:
        for item in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(item, Tensor) and item.dtype == torch.float64:
                return "its kernels compute in float32, and a tensor is float64"
    return ""


class Backend(NamedTuple):
    """One implementation of an operator.

    devices: the device types that it serves, None means all
    refuses: why it does not take these arguments, or ""
    """

    run: Callable[..., Any]
    devices: tuple[str, ...] | None = None
    refuses: Callable[..., str] = takes_all


_BACKENDS: dict[str, dict[str, Backend]] = {}
_PUBLIC: set[str] = set()


def define(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator of `torch.ops.fedspa` from its schema, body and fake implementation."""
    name = schema.partition("(")[0]
    _PUBLIC.add(name)
    _LIBRARY.define(schema, tags=TAGS)
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


def available(operator: str, device: torch.device | str) -> tuple[str, ...]:
    """Return the backends that can run an operator on a device now, the preferred first."""
    return tuple(_there(operator, _with_index(torch.device(device))))


def preferred(operator: str, device: torch.device | str) -> str:
    """Return the backend that a call takes without a choice of its own.

    raises: ValueError or RuntimeError where FEDSPA_BACKEND names one that is not known or not there
    """
    return _asked_for(operator, _with_index(torch.device(device)), None) or next(
        iter(available(operator, device))
    )


def why_not(operator: str, name: str, device: torch.device) -> str:
    """Why a backend cannot run on a device, as half a sentence, or ""."""
    backend = _BACKENDS[operator].get(name)
    if backend is None or not (backend.devices is None or device.type in backend.devices):
        return "none is written"
    if name == "native":
        return native.why_not_on(device)
    return _why_no_triton(device.type) if name == "triton" else ""


def run(operator: str, device: torch.device, backend: str | None, *arguments: Any) -> Any:
    """Run an operator on the backend that was asked for, or else on the preferred one."""
    implementation = _choose(operator, _with_index(device), backend, arguments)
    if not torch.is_autocast_enabled(device.type):
        return implementation(*arguments)
    # Inside an autocast region the float32 products would silently run in half precision.
    with torch.autocast(device.type, enabled=False):
        return implementation(*arguments)


def _choose(
    operator: str, device: torch.device, backend: str | None, arguments: tuple
) -> Callable[..., Any]:
    backends = _BACKENDS[operator]
    asked = _asked_for(operator, device, backend)
    if asked is None:
        there = (backends[name] for name in _there(operator, device))
        return next(backend.run for backend in there if not backend.refuses(*arguments))
    refusal = backends[asked].refuses(*arguments)
    if refusal:
        raise RuntimeError(
            f"{operator}: the {asked} backend{_from_environment(backend)} cannot run this call, "
            f"{refusal}; leave the backend to be chosen, or convert"
        )
    return backends[asked].run


def _there(operator: str, place: torch.device) -> Iterator[str]:
    """Yield the backends that can run on a device; a call asks only up to the one that it takes."""
    for name in ORDER.get(place.type, ("reference",)):
        if not why_not(operator, name, place):
            yield name


def _asked_for(operator: str, device: torch.device, backend: str | None) -> str | None:
    """Return the backend that the call or the environment asks for, which must be there."""
    asked = backend or os.environ.get(VARIABLE) or None
    if asked is None:
        return None
    if asked not in BACKENDS:
        raise ValueError(
            f"{operator}: backend {asked!r}{_from_environment(backend)} is not known; "
            f"choose from {', '.join(BACKENDS)}"
        )
    reason = why_not(operator, asked, device)
    if reason:
        raise RuntimeError(
            f"{operator}: no {asked} backend{_from_environment(backend)} for {device.type} "
            f"tensors, {reason}; leave the backend to be chosen"
        )
    return asked


def _from_environment(backend: str | None) -> str:
    return "" if backend else f" (from the variable {VARIABLE})"


def _with_index(device: torch.device) -> torch.device:
    """Name the GPU that "cuda" means at this moment; each may be of another kind."""
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _why_no_triton(device_type: str) -> str:
    # The variable is Triton's own; its kernels become interpreted ones when they are imported.
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on a GPU (on a CPU only with TRITON_INTERPRET=1, for tests)"
    return "" if _has_triton() else "triton is not installed (`pip install triton`)"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
