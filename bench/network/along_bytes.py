"""How the cost of a network grows with the bytes, as docs/deployment-cost.md tells it."""

from collections.abc import Callable, Sequence

from bench.growth.fit import TOLERANCE
from bench.loaded import Result
from bench.network.growth import LEAST_GROWTH, MIB, Step, steps
from bench.network.overhead import OTHERS, PHASES, of, together_of
from bench.tables import NOTHING, duration, markdown, number, percent


def along_bytes(found: Sequence[Result]) -> list[str]:
    """Lines on runs that differ in their bytes."""
    runs = of(found, "bytes")
    if not runs:
        return []
    lines = ["## Along the bytes", ""]
    lines += ["3 clients, 4 blocks of random weights, pruned by magnitude, float32.", ""]
    headings = ["MiB a client", "blocks a message", "start", "join", "work", "finish", "checks"]
    headings += ["aggregation", "saving", "in one process", "peak MiB: server's app"]
    headings += ["one process", "SuperLink", "SuperNode", "client's app", OTHERS]
    runs = sorted(runs, key=lambda r: (together_of(r), r["far"]["bytes"]["bytes_up"]))
    lines += [*markdown(headings, [_bytes_row(run) for run in runs]), ""]
    for together in sorted({together_of(run) for run in runs}):
        alike = [run for run in runs if together_of(run) == together]
        if len(alike) > 2:
            lines += _growth(steps(alike), together)
        if len(alike) > 1:
            lines += _memory(alike[0], alike[-1])
    return [*lines, *_wire(runs), *_database(runs, of(found, "database"))]


def _memory(small: Result, large: Result) -> list[str]:
    """How many bytes of memory a byte of messages takes; runs with as many blocks a message."""

    def more(tell: Callable[[Result], float]) -> float:
        return tell(large) - tell(small)

    share = together_of(large) / large["blocks"]
    message = more(lambda run: run["far"]["bytes"]["wire_up"]) * share
    near = more(lambda run: run["near"]["peak_bytes"])
    server = more(lambda run: run["far"]["peak_bytes"]["flwr-serverapp"]) - near
    link = more(lambda run: run["far"]["peak_bytes"]["flower-superlink"])
    node = more(lambda run: run["far"]["peak_bytes"]["flower-supernode"])
    return [
        f"Each byte of a message costs the server's app {number(server / message)} bytes of memory "
        f"beyond what one process needs for the same model, a SuperNode {number(node / message)}, "
        f"and the SuperLink {number(link / message)}, where the messages of "
        f"{large['clients']} clients lie together.",
        "",
    ]


def _database(runs: Sequence[Result], kept: Sequence[Result]) -> list[str]:
    """The SuperLink with its --database against the same run without."""
    lines = []
    for result in kept:
        for plain in (run for run in runs if run["case"] == result["case"]):
            peaks = [r["far"]["peak_bytes"]["flower-superlink"] / MIB for r in (plain, result)]
            work = [duration(r["far"]["phases"]["work"]) for r in (plain, result)]
            lines += [
                f"A SuperLink holds the messages of all clients that are under way, in memory "
                f"where it has no `--database`: {number(peaks[0])} MiB in the largest run, whose "
                f"work takes {work[0]}. With one it is {number(peaks[1])} MiB and {work[1]}.",
                "",
            ]
    return lines


def _bytes_row(result: Result) -> list[str]:
    far, near = result["far"], result["near"]
    peaks = far["peak_bytes"]
    return [
        number(far["bytes"]["bytes_up"] / MIB),
        str(together_of(result)),
        *(duration(far["phases"][phase]) for phase in PHASES[:-1]),
        *(duration(far["stages"][stage]) for stage in ("check", "aggregate", "save")),
        duration(near["seconds"]),
        number(peaks["flwr-serverapp"] / MIB),
        number(near["peak_bytes"] / MIB),
        number(peaks["flower-superlink"] / MIB),
        number(peaks["flower-supernode"] / MIB),
        number(peaks["flwr-clientapp"] / MIB),
        percent(far["others"]),
    ]


def _growth(found: Sequence[Step], together: int) -> list[str]:
    headings = [f"{together} block{'s' * (together > 1)} a message", "unit", "smallest", "largest"]
    headings += ["for each MiB of a client", "the last", "exponent above the fixed cost"]
    rows = []
    for step in found:
        growth = step.growth
        told = NOTHING if growth is None else str(growth)
        rows.append(
            [step.name, step.unit, number(step.costs[0]), number(step.costs[-1])]
            + [_signed(step.rate), _signed(step.last_rate), f"**{told}**" if step.faster else told]
        )
    fast = [f"{step.name} ({step.growth})" for step in found if step.faster]
    said = (
        f"Faster than the bytes grow: {'; '.join(fast)}."
        if fast
        else "No step grows faster than the bytes."
    )
    said += (
        f" The exponent is that of what a run takes beyond the smallest one, by the bytes beyond "
        f"its bytes, where that is more than {LEAST_GROWTH:.0%} of what the smallest takes; over "
        f"{1 + TOLERANCE:g} would count as faster. Where none stands, the growth is lost among the "
        f"starts of processes."
    )
    return [*markdown(headings, rows, 2), "", said, ""]


def _signed(value: float) -> str:
    return f"−{number(-value)}" if value < 0 else number(value)


def _wire(runs: Sequence[Result]) -> list[str]:
    large = max(runs, key=lambda run: run["far"]["bytes"]["bytes_up"])["far"]["bytes"]
    small = min(runs, key=lambda run: run["far"]["bytes"]["bytes_up"])["far"]["bytes"]
    frames = large["wire_up"] - large["bytes_up"]
    rest = [one["sent"] - one["wire_up"] for one in (small, large)]
    return [
        f"Of the client behind a proxy that counts: the largest update is {large['bytes_up']:,} "
        f"bytes of masks and values, {large['wire_up']:,} in frames ({frames:,} of headers) and "
        f"{large['sent']:,} on the wire. Beyond its frames a client sends {rest[0]:,} bytes with "
        f"the smallest update and {rest[1]:,} with the largest: polls, heartbeats, Flower's own "
        f"words.",
        "",
    ]
