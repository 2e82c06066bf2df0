"""The tables of docs/performance.md: rows of text from results, as Markdown."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from bench.loaded import OURS, Machine, Result, stage_seconds, total_seconds
from bench.targets import OF_COPY, SECONDS, Case, Target, Verdict, counterpart, verdicts

# Contenders in this order, and then whatever else was measured.
CONTENDERS = ("reference", "pytorch", "stacked", "sorted", "argsort", "llm-compressor", "sparsegpt")
OPERATORS = (
    "obs_prune",
    "obs_prune_shared",
    "accumulate_hessian_",
    "wanda_prune",
    "l0_average",
    "l0_average_compressed",
    "expand_mask",
    "smallest_mask",
    "L0Accumulator",
    "wanda_scores",
    "compress",
    "decompress",
    "pack_mask",
    "unpack_mask",
)
NOTHING = "–"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Write a table whose first `words` columns are words, and the others numbers."""
    rules = ["---"] * words + ["---:"] * (len(headings) - words)
    return [f"| {' | '.join(cells)} |" for cells in (headings, rules, *rows)]


def number(value: float) -> str:
    """Write three significant digits: 0.123, 1.23, 12.3, 1,234; nothing finer than 0.001."""
    if value < 0.0005:
        return "0"
    if value >= 99.95:
        return f"{value:,.0f}"
    return (
        f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.995 else f"{value:.3f}"
    )


def duration(seconds: float) -> str:
    """Spell seconds with the unit that fits: 45.6 µs, 1.23 ms, 12.3 s, 4 min 32 s."""
    if seconds >= 119.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes / 60:.1f} h"
    scale, unit = _unit(seconds)
    return f"{number(seconds * scale)} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    return (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")


def spread(times: dict[str, float]) -> str:
    """Write the 20th and 80th percentile in the unit of the median."""
    scale, _ = _unit(times["median"])
    return f"{number(times['p20'] * scale)}–{number(times['p80'] * scale)}"


def percent(share: float | None) -> str:
    """Write a share of 0 to 1 as a percentage."""
    return NOTHING if share is None else f"{100 * share:.0f}"


def in_order(names: Sequence[str], first: Sequence[str]) -> list[str]:
    """Sort names: those of `first` in its order, and then the others as they come."""
    return sorted(dict.fromkeys(names), key=lambda n: first.index(n) if n in first else len(first))


def operators(measured: Sequence[Result]) -> list[str]:
    """Return the names of the operators that were measured, in the page's order."""
    return in_order([result["operator"] for result in measured], OPERATORS)


def operator_table(cases: Sequence[Result]) -> list[str]:
    """Make a row a case of one operator; what no case has is no column."""
    rivals = in_order([name for case in cases for name in case["ratios"]], CONTENDERS)
    columns: list[tuple[str, Callable[[Result], str]]] = [
        ("shape", lambda case: case["shape"]),
        ("case", lambda case: case["variant"] or NOTHING),
        ("dtype", lambda case: case["dtype"]),
        ("rows × cols", lambda case: f"{case['sizes']['rows']} × {case['sizes']['cols']}"),
        *((size, _size(size)) for size in ("clients", "tokens")),
        ("time", lambda case: duration(case["times"][OURS]["median"])),
        ("p20–p80", lambda case: spread(case["times"][OURS])),
        ("GB/s", lambda case: _rate(case["bytes_per_s"] / 1e9, not case["operations"])),
        ("% of copy", lambda case: percent(case["of_copy"])),
        (
            "TFLOP/s",
            lambda case: number(case["flop_per_s"] / 1e12) if case["operations"] else NOTHING,
        ),
        ("% of matmul", lambda case: percent(case["of_matmul"])),
        *((f"× {name}", _ratio(name)) for name in rivals if name != OURS),
        ("peak MB", _peak),
    ]
    rows = [[write(case) for _, write in columns] for case in sorted(cases, key=_order)]
    kept = [i for i in range(len(columns)) if any(row[i] != NOTHING for row in rows)]
    words = sum(columns[i][0] in ("shape", "case", "dtype") for i in kept)
    return markdown([columns[i][0] for i in kept], [[row[i] for i in kept] for row in rows], words)


def _order(case: Result) -> tuple:
    sizes = case["sizes"]
    size = sizes["rows"] * sizes["cols"]
    return case["dtype"], size, case["shape"], case["variant"], sizes.get("clients") or 0


def _size(name: str) -> Callable[[Result], str]:
    return lambda case: f"{case['sizes'][name]:,}" if case["sizes"].get(name) else NOTHING


def _ratio(name: str) -> Callable[[Result], str]:
    return lambda case: number(case["ratios"][name]) if name in case["ratios"] else NOTHING


def _rate(rate: float, bounds: bool) -> str:
    return number(rate) if bounds else NOTHING


def _peak(case: Result) -> str:
    peak = case["peak_bytes"].get(OURS)
    return NOTHING if peak is None else number(peak / 1e6)


def notes(cases: Sequence[Result]) -> list[str]:
    """Say on which backend ours ran, what was checked, and which contenders are not here."""
    backends = " and ".join(sorted({case["ours"] for case in cases}))
    checks = _alike(case["check"] for case in cases)
    lines = [f"Backend: {backends}. Checked before the clock, such as: {'; '.join(checks)}."]
    skipped = Counter(
        (name, why) for case in cases for name, why in case.get("skipped", {}).items()
    )
    for (name, why), count in sorted(skipped.items()):
        lines.append(f"Without {name} in {count} of {len(cases)} cases: {why.rstrip('.')}.")
    return lines


def _alike(sentences: Iterable[str]) -> list[str]:
    """Keep one of those sentences that differ in their numbers alone."""
    return list({re.sub(r"[\d.,e+-]+", "#", text): text.rstrip(".") for text in sentences}.values())


def failed_table(failed: Sequence[Result]) -> list[str]:
    """Make a row for the cases of an operator that have no time for the same reason."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for name in operators(failed):
        for case in (case for case in failed if case["operator"] == name):
            groups.setdefault((name, case["failed"].rstrip(".")), []).append(case)
    rows = []
    for (name, why), cases in groups.items():
        sizes = dict.fromkeys(
            f"{case['sizes']['rows']} × {case['sizes']['cols']} {case['dtype']}" for case in cases
        )
        rows.append([f"`{name}`", ", ".join(sizes), why.replace("|", "/"), str(len(cases))])
    return markdown(("operator", "sizes", "why", "cases"), rows, 3)


def target_table(machine: Machine) -> list[str]:
    """Make a row a target of this kind of machine: what was measured, and whether it is reached."""
    rows = [
        [f"`{v.target.subject}`", v.target.says, *_measured(v), _verdict(v)]
        for v in verdicts(machine)
    ]
    return markdown(("operator", "target", "measured", "worst case", "reached"), rows, 5)


def _verdict(verdict: Verdict) -> str:
    if verdict.reached is None:
        return "not measured"
    reached = sum(case.reached for case in verdict.cases)
    if verdict.reached:
        return "yes"
    return f"**missed** in {len(verdict.cases) - reached} of {len(verdict.cases)}"


def _measured(verdict: Verdict) -> tuple[str, str]:
    if not verdict.cases:
        return NOTHING, NOTHING
    worst, best = verdict.cases[0], verdict.cases[-1]
    values = [bounded(verdict.target, worst)]
    if len(verdict.cases) > 1:
        values.append(bounded(verdict.target, best))
    return " to ".join(values), worst.name.removeprefix(f"{verdict.target.subject}, ")


def bounded(target: Target, case: Case) -> str:
    """Write a case's value in the measure of its target."""
    if target.measure == OF_COPY:
        return f"{100 * case.value:.0f} %"
    return duration(case.value) if target.measure == SECONDS else f"{number(case.value)}×"


def model_table(models: Sequence[Result]) -> list[str]:
    """Make a row a pipeline on one model: its stages, their sum, and that against our sum."""
    stages = list(dict.fromkeys(stage for model in models for stage in stage_seconds(model)))
    headings = ["model", "pruner", "pipeline", "pruned", "dtype", "clients"]
    headings += ["windows in all × tokens"]
    headings += [
        "blocks measured",
        *stages,
        "sum",
        "against fedspa",
        "peak GB",
        "all blocks, extrapolated",
    ]
    rows = []
    for model in sorted(models, key=_model_order):
        seconds = stage_seconds(model)
        target = model["pattern"] or f"{100 * model['sparsity']:g} %"
        rows.append(
            [model["model"], model["pruner"], model["pipeline"], target, model["dtype"]]
            + [str(model["clients"]), f"{model['samples']} × {model['seqlen']}"]
            + [f"{model['blocks']} of {model['of_blocks']}"]
            + [duration(seconds[s]) if s in seconds else NOTHING for s in stages]
            + [duration(total_seconds(model)), _against(model, models), _peaks(model)]
            + [duration(model["extrapolated"]["seconds"]) if model["extrapolated"] else NOTHING]
        )
    return markdown(headings, rows, 5)


def _model_order(model: Result) -> tuple:
    return model["model"], model["pruner"], model["clients"], model["blocks"], model["pipeline"]


def _against(model: Result, models: Sequence[Result]) -> str:
    ours = next((m for m in models if m["pipeline"] == OURS and counterpart(m, [model])), None)
    return f"{number(total_seconds(model) / total_seconds(ours))}×" if ours else NOTHING


def _peaks(model: Result) -> str:
    peaks = {where: count for where, count in model["peak_bytes"].items() if count}
    return ", ".join(f"{number(count / 1e9)} {where}" for where, count in peaks.items())


def model_notes(models: Sequence[Result]) -> list[str]:
    """Say what was checked, and how the last column of `model_table` came about."""
    checks = _alike(model["check"] for model in models)
    hows = _alike(m["extrapolated"]["how"] for m in models if m["extrapolated"])
    lines = ["The calibration windows are those of all clients, to whom they are dealt out evenly."]
    lines += ["The sum leaves out making the random weights. Only the last column is extrapolated."]
    lines += [f"Extrapolated {how}." for how in hows]
    return [*lines, f"Checked, such as: {'; '.join(checks)}."]
