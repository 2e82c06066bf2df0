"""What a run over a network costs beyond the same in one process, by what it is."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.loaded import Result
from bench.network.growth import steps
from bench.tables import duration, markdown

PHASES = ("start", "join", "work", "finish", "end")
# Of the machine's CPU, in per cent: what was not this run's.
OTHERS = "others' % of CPU"


def of(found: Sequence[Result], group: str) -> list[Result]:
    """The results of one group."""
    return [result for result in found if result["group"] == group]


def together_of(result: Result) -> int:
    """How many blocks a message held."""
    return int(result["config"]["blocks-per-message"])


def overhead(found: Sequence[Result]) -> list[str]:
    """What a run costs beyond the same in one process, by what it is."""
    small = [run for run in of(found, "fixed") if run["poll"] < 1]
    grown = steps([run for run in of(found, "bytes") if together_of(run) == 1])
    if not small or len(grown[0].costs) < 2:
        return []
    far, near = small[-1]["far"], small[-1]["near"]
    rates = {step.name: step.rate / small[-1]["clients"] for step in grown}
    client, link = rates["CPU of `flwr-clientapp`"], rates["CPU of `flower-superlink`"]
    cpu = median(message["cpu"] for message in far["messages"])
    rows = [
        ["the server's app begins", duration(far["phases"]["start"]), "once"],
        ["joining", duration(far["phases"]["join"]), "once"],
        ["a message, whatever is in it", f"{duration(cpu)} of CPU at the client", "each"],
        ["its bytes, client", f"{duration(client)} of CPU", "MiB sent, making it included"],
        ["its bytes, SuperLink", f"{duration(link)} of CPU", "MiB sent"],
        ["checks", duration(rates["checks"]), "MiB sent"],
        ["finish, and Flower's end", duration(_finish(far)), "once"],
    ]
    lines = ["## The overhead, by what it is", ""]
    lines += [*markdown(["", "with 3 clients on these cores", "for"], rows, 3), ""]
    whole = far["seconds"] - near["seconds"]
    return [
        *lines,
        f"The smallest run takes {duration(far['seconds'])}, and {duration(near['seconds'])} in "
        f"one process: {duration(whole)} for the network, all of it the start of processes.",
        "",
    ]


def _finish(far: dict[str, Any]) -> float:
    return float(far["phases"]["finish"] + far["phases"]["end"])
