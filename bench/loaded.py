"""What the result files say, sorted by the machine that they were measured on.

A result of a page is the result of its file with the file's own ceilings and threads beside it, so
that a share of a ceiling never meets the ceiling of another run.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench import results

Result = dict[str, Any]
OURS = "fedspa"
FLOOR = "floor"


@dataclass
class Machine:
    """One machine, what was measured on it, and the files that hold it (name, document).

    failed: cases that the newest file with them has without a time, and in "failed" why
    """

    device: str
    name: str
    files: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    operators: list[Result] = field(default_factory=list)
    models: list[Result] = field(default_factory=list)
    growth: list[Result] = field(default_factory=list)
    failed: list[Result] = field(default_factory=list)

    @property
    def slug(self) -> str:
        """Its name as a part of a file name or an anchor."""
        kept = "".join(c if c.isalnum() else " " for c in self.name.lower())
        return "-".join(kept.split())


def read_folder(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read every JSON of the folder, oldest first; ValueError where there is none."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(
            f"{folder} holds no result file; `make bench`, `python -m bench gpu`, `model` and "
            f"`growth` write some"
        )
    files = [(path.name, results.read(path)) for path in paths]
    return sorted(files, key=lambda file: (file[1]["created"], file[0]))


def machines(files: Iterable[tuple[str, dict[str, Any]]]) -> list[Machine]:
    """Sort files by machine, GPUs first; where two files have the same case, the newer counts.

    files: the oldest first. A case that failed takes no time away that an older file has.
    """
    found: dict[tuple[str, str], Machine] = {}
    newest: dict[tuple[Any, ...], tuple[Machine, str, Result]] = {}
    failed: dict[tuple[Any, ...], tuple[Machine, Result]] = {}
    for name, document in files:
        device, title = document["device"], machine_name(document)
        machine = found.setdefault((device, title), Machine(device, title))
        machine.files.append((name, document))
        for result in document["results"]:
            measured = {
                **result,
                "ceilings": document["ceilings"],
                "threads": document["threads"],
                "file": name,
            }
            identity = (device, title, document["kind"], *identify(result))
            failed.pop(identity, None)
            if "failed" in result:
                failed[identity] = (machine, measured)
            else:
                newest[identity] = (machine, document["kind"], measured)
    for machine, kind, measured in newest.values():
        getattr(machine, {"model": "models"}.get(kind, kind)).append(measured)
    for machine, result in failed.values():
        machine.failed.append(result)
    return sorted(found.values(), key=lambda machine: (machine.device != "cuda", machine.name))


def machine_name(document: dict[str, Any]) -> str:
    """Name the GPU, or the processor with its cores and the threads that were used."""
    described = document["machine"]
    if document["device"] == "cuda":
        return described.get("gpu", "unnamed GPU")
    cores, threads = described.get("cores", "?"), document["threads"]
    name = f"{described.get('cpu', 'unnamed processor')}, {cores} core{'s' * (cores != '1')}"
    if str(threads) != str(cores):
        name += f", {threads} thread{'s' * (threads != 1)}"
    return name


def identify(result: Result) -> tuple[Any, ...]:
    """Tell one case from another within a kind: everything that was chosen, nothing measured."""
    chosen = (
        "axis operator variant shape dtype model pipeline pruner sparsity pattern clients samples"
    )
    chosen += " seqlen blocks"
    sizes = sorted(result.get("sizes", {}).items())
    return (*(str(result.get(key, "")) for key in chosen.split()), *(f"{k} {v}" for k, v in sizes))


def rivals(result: Result) -> dict[str, float]:
    """Return how many times as long as ours every other code took: no floor, no backend of ours."""
    return {
        name: ratio
        for name, ratio in result["ratios"].items()
        if name != FLOOR and not name.startswith(OURS)
    }


def middle(ceilings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each rate over the ceilings of several results."""
    rates: dict[str, list[float]] = {}
    for one in ceilings:
        for dtype, rate in one["matmul"].items():
            rates.setdefault(dtype, []).append(rate)
    return {
        "copy": median(one["copy"] for one in ceilings),
        "matmul": {dtype: median(found) for dtype, found in rates.items()},
    }


def total_seconds(result: Result) -> float:
    """Sum a model's stages, but not `build`, which only makes the random weights."""
    return math.fsum(stage_seconds(result).values())


def stage_seconds(result: Result) -> dict[str, float]:
    """Return the seconds of each stage of the pipeline, of several runs the median."""
    stages = {}
    for stage, seconds in result["stages"].items():
        if stage != "build":
            stages[stage] = median(seconds) if isinstance(seconds, list) else float(seconds)
    return stages
