"""What a run over a network costs beyond the same in one process, by what it is."""

from collections.abc import Sequence
from statistics import median

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
    """Lines on that, from the runs of one block a message."""
    runs = [run for run in of(found, "bytes") if together_of(run) == 1]
    if len(runs) < 2:
        return []
    small = min(runs, key=lambda run: run["far"]["bytes"]["bytes_up"])
    far, near, clients = small["far"], small["near"], small["clients"]
    rates = {step.name: step.rate / clients for step in steps(runs)}
    messages = len(far["messages"]) - 2
    cpu = median(message["cpu"] for message in far["messages"])
    phases = far["phases"]
    rows = [
        ["the server's app begins", duration(phases["start"]), "once"],
        ["joining", duration(phases["join"]), "once"],
        ["a message of work, however small", duration(phases["work"] / messages), "message"],
        ["of it CPU at each client", duration(cpu), "message"],
        ["bytes: CPU at the client", duration(rates["CPU of `flwr-clientapp`"]), "MiB sent"],
        ["at its SuperNode", duration(rates["CPU of `flower-supernode`"]), "MiB sent"],
        ["at the SuperLink", duration(rates["CPU of `flower-superlink`"]), "MiB sent"],
        ["at the server's app", duration(rates["CPU of `flwr-serverapp`"]), "MiB sent"],
        ["of that checks", duration(rates["checks"]), "MiB sent"],
        ["finish", duration(phases["finish"]), "once"],
        ["Flower's end", duration(phases["end"]), "once"],
    ]
    lines = ["## The overhead, by what it is", ""]
    lines += [*markdown(["", f"{clients} clients on these cores", "for each"], rows), ""]
    whole = far["seconds"] - near["seconds"]
    return [
        *lines,
        f"The smallest of these runs, {messages} messages of work, takes "
        f"{duration(far['seconds'])}, and {duration(near['seconds'])} in one process: "
        f"{duration(whole)} for the network, nearly all of it the start of processes. The client's "
        f"and the server's CPU for a MiB hold the pruning and adding that one process does too.",
        "",
    ]
