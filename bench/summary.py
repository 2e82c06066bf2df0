"""The first table of docs/performance.md: one line an operator, at one size that many know."""

import math
from collections.abc import Sequence

from bench.loaded import OURS, Machine, Result, rivals, total_seconds
from bench.tables import NOTHING, OPERATORS, duration, markdown, number, operators
from bench.targets import counterpart

FAMILIAR = {"rows": 4096, "cols": 4096, "clients": 8}
# Operators of the first table; the others have their tables below.
FIRST = OPERATORS[:8]
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def lines(machines: Sequence[Machine]) -> list[str]:
    """Return the table, about ten rows, and what it needs to be understood."""
    newest = [machine for device in DTYPE for machine in _newest(machines, device)]
    headings = ["operator"]
    for machine in newest:
        headings += [
            f"{machine.name}",
            "time",
            "of the limit",
            "the next best takes",
            "in all cases",
        ]
    measured = [result for machine in newest for result in machine.operators]
    rows = [
        [f"`{name}`", *(cell for m in newest for cell in _cells(m, name))]
        for name in operators(measured)
        if name in FIRST
    ]
    rows += [
        [f"`{model}`", *(cell for m in newest for cell in _model_cells(m, model))]
        for model in dict.fromkeys(r["model"] for m in newest for r in m.models)
    ]
    sentences = [
        "The limit is the copy bandwidth or the matrix rate of the same run, whichever is nearer; "
        "the next best is the fastest other code that was measured, PyTorch's or a peer's: below "
        "1× it is faster.",
    ]
    if not any(machine.device == "cuda" for machine in machines):
        sentences.append("There is no GPU result file yet: all of it was measured on CPUs.")
    return [*markdown(headings, rows, 2), "", " ".join(sentences)]


def _newest(machines: Sequence[Machine], device: str) -> list[Machine]:
    of_device = [machine for machine in machines if machine.device == device]
    return sorted(of_device, key=lambda machine: machine.files[-1][1]["created"])[-1:]


def familiar(cases: Sequence[Result], device: str) -> Result:
    """Return the case of one operator that is nearest to 4096 × 4096 and 8 clients."""

    def distance(case: Result) -> tuple:
        sizes = [(case["sizes"].get(key) or want, want) for key, want in FAMILIAR.items()]
        away = math.fsum(abs(math.log(size / want)) for size, want in sizes)
        return case["dtype"] != DTYPE[device], away, "50" not in case["variant"], case["variant"]

    return min(cases, key=distance)


def _cells(machine: Machine, operator: str) -> list[str]:
    cases = [case for case in machine.operators if case["operator"] == operator]
    if not cases:
        return [NOTHING] * 5
    case = familiar(cases, machine.device)
    shares = {"copy": case["of_copy"], "matmul": case["of_matmul"]}
    known = {name: share for name, share in shares.items() if share is not None}
    limit = max(known, key=lambda name: known[name], default=None)
    sizes = case["sizes"]
    parts = [case["variant"], f"{sizes['rows']}×{sizes['cols']}"]
    parts += [f"{sizes['clients']} clients"] if sizes.get("clients") else []
    least = [min(rivals(case).values()) for case in cases if rivals(case)]
    return [
        ", ".join(filter(None, [*parts, case["dtype"]])),
        duration(case["times"][OURS]["median"]),
        f"{known[limit]:.0%} of {limit}" if limit else NOTHING,
        _next_best(case),
        f"{number(min(least))}× – {number(max(least))}×" if least else NOTHING,
    ]


def _next_best(case: Result) -> str:
    others = rivals(case)
    if not others:
        return NOTHING
    name = min(others, key=lambda name: others[name])
    return f"{number(others[name])}× ({name})"


def _model_cells(machine: Machine, model: str) -> list[str]:
    """Whole models: the run with the most blocks, against the peers' pipeline on the same work."""
    runs = [run for run in machine.models if run["model"] == model and run["pipeline"] == OURS]
    if not runs:
        return [NOTHING] * 5
    ratios = {
        index: total_seconds(peers) / total_seconds(run)
        for index, run in enumerate(runs)
        if (peers := counterpart(run, machine.models))
    }
    index = max(range(len(runs)), key=lambda index: (index in ratios, runs[index]["blocks"]))
    run = runs[index]
    blocks = f"{run['blocks']} of {run['of_blocks']} blocks"
    values = ratios.values()
    return [
        f"{run['pruner']}, {blocks}, {run['clients']} client{'s' * (run['clients'] != 1)}",
        duration(total_seconds(run)),
        NOTHING,
        f"{number(ratios[index])}× (peers)" if index in ratios else NOTHING,
        f"{number(min(values))}× – {number(max(values))}×" if ratios else NOTHING,
    ]
