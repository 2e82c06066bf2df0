"""Where the figures of docs/performance.md come from: files, machines, commits, ceilings."""

from collections.abc import Sequence

from bench.loaded import Machine
from bench.tables import markdown, number


def ceilings(machine: Machine) -> str:
    """Say what the machine reached in the runs of the operators: the copy and the products."""
    found = [doc["ceilings"] for _, doc in machine.files if doc["kind"] == "operators"]
    rates = [f"a copy {_range([one['copy'] for one in found])} GB/s"]
    for dtype in dict.fromkeys(dtype for one in found for dtype in one["matmul"]):
        reached = [one["matmul"][dtype] for one in found if dtype in one["matmul"]]
        rates.append(f"a product in {dtype} {_range(reached)} GFLOP/s")
    return f"The ceilings: {', '.join(rates)}."


def _range(rates: Sequence[float]) -> str:
    low, high = number(min(rates) / 1e9), number(max(rates) / 1e9)
    return low if low == high else f"{low} to {high}"


def file_table(machines: Sequence[Machine]) -> list[str]:
    """Make a row a result file: what it holds, where, when and how it was made."""
    headings = ("file", "kind", "machine", "threads", "created", "commit", "command", "versions")
    rows = []
    for machine in machines:
        for name, document in machine.files:
            versions = ", ".join(f"{k} {v}" for k, v in document["versions"].items())
            described = ", ".join(document["machine"].values())
            rows.append(
                [name, document["kind"], f"{document['device']}: {described}"]
                + [str(document["threads"]), document["created"], short_commit(document["commit"])]
                + [f"`{' '.join(_typed(document['command']))}`", versions]
            )
    return markdown(headings, rows, len(headings))


def short_commit(commit: str) -> str:
    """Shorten a commit to 12 digits; that its tree was changed stays."""
    digits, dash, rest = commit.partition("-")
    return digits[:12] + dash + rest


def _typed(command: Sequence[str]) -> list[str]:
    return ["python", "-m", *command] if command[:1] == ["bench"] else list(command)
