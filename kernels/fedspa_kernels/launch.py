"""What every family's Triton launchers share: the device guard, options, how to describe a kernel.

A description is what `python -m bench.resources` compiles where there is no GPU.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Where this divides addresses, sizes and strides, Triton moves whole vectors.
VECTOR = 16


class Compilation(NamedTuple):
    """One shipped configuration of a kernel.

    signature: every argument's type in the kernel's own order, "*fp32", "*i1", "i32", … or
               "constexpr"
    constants: the values of the arguments that are "constexpr"
    maxnreg:   the registers that a thread may have, or None: what ptxas thinks good
    odd_sizes: whether it runs on sizes and strides that VECTOR does not divide
    """

    kernel: Any
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    odd_sizes: bool = False


def device_guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, because Triton launches on that; on a CPU nothing."""
    if tensor.device.type == "cpu":
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.get_device_module(tensor.device).device(
        tensor.device
    )
    return guard


def options(tensor: Tensor, config: Mapping[str, int]) -> dict[str, int]:
    """Return a launch's options for the tensor's device: only NVIDIA's know `maxnreg`."""
    on_nvidia = tensor.is_cuda and torch.version.hip is None
    return {name: config[name] for name in config if on_nvidia or name != "maxnreg"}


def describe(
    kernel: Any,
    variant: str,
    types: Mapping[str, str],
    num_warps: int,
    num_stages: int,
    *,
    maxnreg: int | None = None,
    odd_sizes: bool = False,
    **constants: Any,
) -> Compilation:
    """Describe a variant of a kernel; `types` may hold other kernels' arguments as well."""
    signature = {
        name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
    }
    parts = ", ".join(filter(None, (variant, "odd sizes" if odd_sizes else "")))
    name = f"{kernel.__name__} ({parts})" if parts else kernel.__name__
    return Compilation(
        kernel, name, signature, constants, num_warps, num_stages, maxnreg, odd_sizes
    )
