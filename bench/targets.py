"""The speed that was set as a target, and whether the results reach it.

A target is a bound on one number of every case that it names, such as a share of the copy
bandwidth. It is reached where all of those cases reach it.
"""

from dataclasses import dataclass
from typing import Any

from bench.loaded import FLOOR, OURS, Machine, Result, total_seconds

SQUARE = ((4096, 4096),)
# The H200's table: the matrices of 7B and 70B models.
MATRICES = ((4096, 4096), (8192, 8192), (28672, 8192), (8192, 28672))
LARGE = ((8192, 8192),)
# Its targets are about choosing a mask; with a given one it is in the operator's table alone.
VARIANTS = {"obs_prune": ("50 %", "2:4")}
# From about here on a matrix is a real layer's; what is smaller must not be slower than the
# reference, and that is all that is asked of it.
LAYER = 500
OF_COPY = "of the copy bandwidth"
OVER_FLOOR = "times the floor"
SECONDS = "seconds"


@dataclass(frozen=True)
class Target:
    """What a case must reach.

    measure: OF_COPY, a share; OVER_FLOOR, our time over the floor's; SECONDS, of a whole model; or
             the name of another code, how many times as long as ours that takes
    bound:   the least that the measure must be, or for OVER_FLOOR and SECONDS the most
    sizes:   (rows, cols) of the cases; empty: all. The same for `clients` and `variants`.
    columns: cases with fewer are not meant
    """

    device: str
    subject: str
    says: str
    measure: str
    bound: float
    dtype: str | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    clients: tuple[int, ...] = ()
    variants: tuple[str, ...] = ()
    columns: int = 0

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.measure in (OVER_FLOOR, SECONDS)


@dataclass(frozen=True)
class Case:
    """One measured case of a target; `value` is in the target's measure."""

    name: str
    value: float
    reached: bool


@dataclass(frozen=True)
class Verdict:
    """A target and its cases, the worst first."""

    target: Target
    cases: list[Case]

    @property
    def reached(self) -> bool | None:
        """None where nothing was measured."""
        return all(case.reached for case in self.cases) if self.cases else None


def _gpu(subject: str, says: str, measure: str, bound: float, **where: Any) -> Target:
    where = {"sizes": MATRICES, "variants": VARIANTS.get(subject, ())} | where
    return Target("cuda", subject, says, measure, bound, "bfloat16", **where)


def _cpu(subject: str, says: str, measure: str, bound: float, **where: Any) -> Target:
    where = {"variants": VARIANTS.get(subject, ())} | where
    return Target("cpu", subject, says, measure, bound, "float32", **where)


TARGETS = (
    _gpu("l0_average", "≥ 85 % of the copy bandwidth", OF_COPY, 0.85, clients=(8, 64)),
    _gpu("wanda_prune", "≥ 85 % of the copy bandwidth", OF_COPY, 0.85),
    _gpu("expand_mask", "≥ 50 % of the copy bandwidth", OF_COPY, 0.50, clients=(8, 64)),
    _gpu("accumulate_hessian_", "≥ 1.4× the bf16 matrix product of its size", FLOOR, 1.4),
    _gpu("accumulate_hessian_", "≥ 15× SparseGPT's float32 step", "sparsegpt", 15),
    _gpu("obs_prune", "≥ 50× SparseGPT's loop at 8192²", "sparsegpt", 50, sizes=LARGE),
    _gpu("obs_prune", "≥ 30× llm-compressor at 8192²", "llm-compressor", 30, sizes=LARGE),
    _gpu("obs_prune", "≤ 2× one Cholesky plus R·K² at the matrix rate", OVER_FLOOR, 2.0),
    _gpu("llama-2-7b", "whole model ≥ 15× SparseGPT's procedure", "peers", 15, sizes=()),
    _gpu("llama-2-70b", "whole model under 5 minutes", SECONDS, 300, sizes=(), clients=(1,)),
    _cpu(
        "obs_prune",
        f"≤ 1.3× one Cholesky + half the product R·K², from {LAYER} columns on",
        OVER_FLOOR,
        1.3,
        columns=LAYER,
    ),
    *(
        _cpu(
            "obs_prune", f"about {bound}× llm-compressor at {at}", "llm-compressor", bound, sizes=s
        )
        for bound, at, s in (
            (4, "4096² and 768×3072", (*SQUARE, (768, 3072))),
            (6, "2048²", ((2048, 2048),)),
            (3, "2048×8192", ((2048, 8192),)),
        )
    ),
    _cpu("l0_average", "≥ 50 % of the copy bandwidth", OF_COPY, 0.5, sizes=SQUARE, clients=(16,)),
    _cpu("l0_average", "≥ 25× the stacked form", "stacked", 25, sizes=SQUARE, clients=(16,)),
    _cpu("wanda_prune", "≥ 30× the sorted form", "sorted", 30, sizes=SQUARE),
    _cpu("expand_mask", "≥ 60× the argsort form", "argsort", 60, sizes=SQUARE),
    Target("cpu", "any", "64×64 and up: never slower than the reference", "reference", 1.0),
)


def verdicts(machine: Machine) -> list[Verdict]:
    """Judge every target of this kind of machine."""
    return [judge(target, machine) for target in TARGETS if target.device == machine.device]


def judge(target: Target, machine: Machine) -> Verdict:
    """Find the cases of a target, and hold each against its bound."""
    found = _models(target, machine) if target.subject.startswith("llama") else []
    for result in machine.operators:
        value = _measured(target, result) if _meant(target, result) else None
        if value is not None:
            found.append((case_name(result), value))
    sign = 1 if target.at_most else -1
    cases = [Case(name, value, sign * value <= sign * target.bound) for name, value in found]
    return Verdict(target, sorted(cases, key=lambda case: (-sign * case.value, case.name)))


def case_name(result: Result) -> str:
    """Name a case by everything in which it may differ from another of its operator."""
    sizes = result["sizes"]
    parts = [result["operator"], result["variant"], f"{sizes['rows']}×{sizes['cols']}"]
    parts += [f"{sizes[key]:,} {key}" for key in ("clients", "tokens") if sizes.get(key)]
    return ", ".join([part for part in parts if part] + [result["dtype"]])


def _meant(target: Target, result: Result) -> bool:
    sizes = result["sizes"]
    matrix = sizes["rows"], sizes["cols"]
    if target.subject == "any":
        return min(matrix) >= 64
    return (
        result["operator"] == target.subject
        and target.dtype in (None, result["dtype"])
        and (not target.sizes or matrix in target.sizes)
        and (not target.clients or sizes.get("clients") in target.clients)
        and (not target.variants or result["variant"] in target.variants)
        and matrix[1] >= target.columns
    )


def _measured(target: Target, result: Result) -> float | None:
    if target.measure == OF_COPY:
        return result["of_copy"]
    if target.measure == OVER_FLOOR:
        floor = result["ratios"].get(FLOOR)
        return 1 / floor if floor else None
    return result["ratios"].get(target.measure)


def _models(target: Target, machine: Machine) -> list[tuple[str, float]]:
    """Whole models: seconds of all blocks, or the peers' seconds over ours on the same blocks.

    The name of the case has the blocks that were measured: all seconds from fewer are extrapolated.
    """
    wanted: Result = {"model": target.subject, "pipeline": OURS, "pruner": "sparsegpt"}
    wanted |= {"samples": 128, "seqlen": 2048}
    found = []
    for ours in machine.models:
        if any(ours[key] != value for key, value in wanted.items()):
            continue
        clients = ours["clients"]
        if target.clients and clients not in target.clients:
            continue
        pruned = ours["pattern"] or f"{100 * ours['sparsity']:g} %"
        name = f"{ours['model']}, {ours['pruner']} {pruned}, {clients} client{'s' * (clients > 1)}"
        name += f", {ours['blocks']} of {ours['of_blocks']} blocks"
        if target.measure == SECONDS:
            if whole := ours["extrapolated"]:
                found.append((name, whole["seconds"]))
        elif peers := counterpart(ours, machine.models):
            found.append((name, total_seconds(peers) / total_seconds(ours)))
    return found


def counterpart(ours: Result, models: list[Result]) -> Result | None:
    """Return the peers' run of the same work, if there is one."""
    same = ("model", "pruner", "sparsity", "pattern", "clients", "samples", "seqlen", "dtype")
    for other in models:
        if other["pipeline"] == "peers" and all(
            other[key] == ours[key] for key in (*same, "blocks")
        ):
            return other
    return None
