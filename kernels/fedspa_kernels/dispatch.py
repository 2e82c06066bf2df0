"""Which backend runs a call, and how an operator becomes `torch.ops.fedspa.<name>`.

An operator family declares each of its backends with one line, next to its door:

    dispatch.add("pack_mask", "reference", reference.pack_mask)
    dispatch.add("pack_mask", "native", native_pack_mask, devices=("cpu",))
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fedspa_kernels import native

# The order of preference without a choice. Other device types run the reference.
ORDER = {"cuda": ("native", "triton", "reference"), "cpu": ("native", "reference")}
BACKENDS = ("native", "triton", "reference")

# The operators live as long as this object does.
_LIBRARY = torch.library.Library("fedspa", "FRAGMENT")


class Backend(NamedTuple):
    """One implementation of an operator; `devices` are device types, None means all."""

    run: Callable[..., Any]
    devices: tuple[str, ...] | None


_BACKENDS: dict[str, dict[str, Backend]] = {}


def define(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator of `torch.ops.fedspa` from its schema, body and fake implementation."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Nothing here is differentiable: without the fallthrough, PyTorch would mark the outputs of
    # parameters as requiring a gradient that only fails in backward.
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _LIBRARY.impl(name, torch.no_grad()(body), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fedspa::{name}", fake, lib=_LIBRARY)


def add(
    operator: str, backend: str, run: Callable[..., Any], devices: tuple[str, ...] | None = None
) -> None:
    """Declare a backend of an operator, for these device types (None: for all)."""
    _BACKENDS.setdefault(operator, {})[backend] = Backend(run, devices)


def operators() -> tuple[str, ...]:
    """Return the names of all operators that have a backend."""
    return tuple(sorted(_BACKENDS))


def available(operator: str, device_type: str) -> tuple[str, ...]:
    """Return the backends that can run an operator on a device type now, the preferred first."""
    order = ORDER.get(device_type, ("reference",))
    return tuple(name for name in order if _is_there(operator, name, device_type))


def run(operator: str, device: torch.device, backend: str | None, *arguments: Any) -> Any:
    """Run an operator on the backend that was asked for, or else on the preferred one."""
    implementation = _choose(operator, device.type, backend)
    # Inside an autocast region the float32 products would silently run in half precision.
    with torch.autocast(device.type, enabled=False):
        return implementation(*arguments)


def _choose(operator: str, device_type: str, backend: str | None) -> Callable[..., Any]:
    if backend is None:
        backend = os.environ.get("FEDSPA_BACKEND") or None
    there = available(operator, device_type)
    if backend is None:
        return _BACKENDS[operator][there[0]].run
    if backend not in BACKENDS:
        raise ValueError(
            f"{operator}: backend {backend!r} is not known; choose from {', '.join(BACKENDS)}"
        )
    if backend not in there:
        raise RuntimeError(
            f"{operator}: no {backend} backend for {device_type} tensors, "
            f"{_reason(operator, backend, device_type)}; available: {', '.join(there)}"
        )
    return _BACKENDS[operator][backend].run


def _is_there(operator: str, name: str, device_type: str) -> bool:
    return _is_written(operator, name, device_type) and (
        name != "native" or device_type in _native_devices()
    )


def _is_written(operator: str, name: str, device_type: str) -> bool:
    backend = _BACKENDS[operator].get(name)
    return backend is not None and (backend.devices is None or device_type in backend.devices)


@functools.cache
def _native_devices() -> tuple[str, ...]:
    native.load()
    return native.built()


def _reason(operator: str, name: str, device_type: str) -> str:
    if not _is_written(operator, name, device_type):
        return "none is written"
    return (
        f"the library is not built ({native.why_not()}), which "
        "`pip install --no-build-isolation .` in FedSpa's source tree does"
    )
