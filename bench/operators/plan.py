"""Which cases are measured at which sizes: what is asked for, or a choice that fits the time."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from bench.operators import CASES, Case, Sizes, find_operator
from bench.shapes import SHAPES, Shape, find_shape

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
# Those of real layers, and some in between to which nothing was tuned.
CPU_SHAPES = (
    "64x64",
    "576x1536",
    "opt-125m.down",
    "1000x1500",
    "opt-1.3b.q",
    "2000x3000",
    "llama-2-7b.q",
    "opt-1.3b.down",
)
CPU_HALF = ("opt-125m.down", "1000x1500", "llama-2-7b.q")
# What would take minutes of the usual choice and tell little: memory is as busy as at 4096², and
# in bfloat16 these compute in float32 all the same.
CPU_ONLY = {"opt-1.3b.down": ("accumulate_hessian_", "obs_prune")}
CPU_NOT_HALF = {"llama-2-7b.q": ("obs_prune", "obs_prune_shared")}
GPU_SHAPES = (
    "llama-2-7b.q",
    "llama-2-70b.q",
    "llama-2-70b.up",
    "llama-2-70b.down",
    "1000x1500",
    "3000x5000",
    "64x64",
)
# The order of measuring: what the targets are about comes first.
CPU_DTYPES, GPU_DTYPES = ("float32", "bfloat16"), ("bfloat16", "float32")
CPU_CLIENTS, GPU_CLIENTS = (16,), (8, 64)
# Where one also sees what a client more costs.
MANY_CLIENTS: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"opt-125m.down": (1, 8, 16, 64)},
    "cuda": {"llama-2-7b.q": (1, 8, 64)},
}
TOKENS = {"cpu": 2048, "cuda": 8192}


class Job(NamedTuple):
    """A case at one size."""

    case: Case
    shape: str
    sizes: Sizes
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Such as "l0_average masks, llama-2-7b.q, float32, 16 clients"."""
        dtype = str(self.dtype).removeprefix("torch.")
        counted = [f"{self.sizes.clients} clients"] * ("clients" in self.case.uses)
        return ", ".join([self.case.name, self.shape, dtype, *counted])


def jobs(
    device: str,
    *,
    operators: Sequence[str] = (),
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    clients: Sequence[int] = (),
) -> list[Job]:
    """Return what to measure; what is not asked for (empty) is chosen, see above.

    operators: names; shapes: names, sizes or "all"; dtypes: names; clients: numbers
    raises:    ValueError where one is not known
    """
    cases = [case for name in dict.fromkeys(operators) for case in find_operator(name)]
    cases = cases or list(CASES)
    named = _shapes(shapes or (GPU_SHAPES if device == "cuda" else CPU_SHAPES))
    found: list[Job] = []
    usual = GPU_DTYPES if device == "cuda" else CPU_DTYPES
    for wanted in [find_dtype(name) for name in dtypes or usual]:
        for shape in named:
            if dtypes or wanted in _dtypes(device, shape, bool(shapes)):
                found += _at(shape, wanted, cases, device, clients)
    if device != "cuda":
        found = [job for job in found if shapes or operators or _usual(job)]
        # Shape by shape: what a case needs first, large memory above all, is needed once.
        order = [shape.name for shape in named]
        found.sort(key=lambda job: order.index(job.shape))
    return found


def find_dtype(name: str) -> torch.dtype:
    """Return a dtype by its name.

    raises: ValueError where it is not one that is measured
    """
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not known; choose from {', '.join(DTYPES)}")
    return DTYPES[name]


def _at(
    shape: Shape, dtype: torch.dtype, cases: Iterable[Case], device: str, clients: Sequence[int]
) -> list[Job]:
    found = []
    for case in cases:
        if shape.cols % case.multiple or not (case.half or dtype == torch.float32):
            continue
        usual = GPU_CLIENTS if device == "cuda" else CPU_CLIENTS
        counts = tuple(clients) or MANY_CLIENTS[device].get(shape.name, usual)
        for count in counts if "clients" in case.uses else counts[:1]:
            sizes = Sizes(shape.rows, shape.cols, count, TOKENS[device])
            found.append(Job(case, shape.name, sizes, dtype))
    return found


def _usual(job: Job) -> bool:
    operator = job.case.operator
    if job.dtype != torch.float32 and operator in CPU_NOT_HALF.get(job.shape, ()):
        return False
    return operator in CPU_ONLY.get(job.shape, (operator,))


def _dtypes(device: str, shape: Shape, asked: bool) -> tuple[torch.dtype, ...]:
    if asked or device == "cuda" or shape.name in CPU_HALF:
        return torch.float32, torch.bfloat16
    return (torch.float32,)


def _shapes(names: Sequence[str]) -> list[Shape]:
    """Return the shapes of these names; of "all" each size once, under its first name."""
    listed = [find_shape(name) for name in names if name != "all"]
    if "all" in names:
        sizes = {(shape.rows, shape.cols): shape for shape in reversed(SHAPES.values())}
        listed += reversed(sizes.values())
    return list(dict.fromkeys(listed))
