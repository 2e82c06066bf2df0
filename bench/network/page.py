"""docs/deployment-cost.md: what the network costs, from the results that are stored."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.growth.fit import fit
from bench.loaded import Machine, Result, machine_name
from bench.network.along_bytes import along_bytes
from bench.network.growth import MIB
from bench.network.overhead import OTHERS, PHASES, of, overhead
from bench.network.real_model import smollm2
from bench.provenance import file_table
from bench.tables import duration, markdown, number, percent

HEAD = """\
# What the network costs

Written by `python -m bench report` from the files in `bench/results`: measure again or change the
report, not this page. [deployment.md](deployment.md) says how a federation over a network is run.
"""
METHOD = """\
SuperLink, SuperNodes, the `flwr` command and every app are processes of their own on one machine,
speak over loopback without TLS, and have one thread each. Every result was compared with that of
the same clients in one process (`fedspa.federate`), file by file and byte by byte, before its times
were stored. So what is told here is the cost of the processes and of the protocol; a real wire adds
the bytes over its bandwidth, and machines of their own take the clients' processes off each other's
cores. The last column tells how much of the cores other programs took meanwhile, which makes
seconds longer, and CPU seconds hardly.
"""
CENTRAL = (
    ("CPU of the SuperLink", "flower-superlink"),
    ("CPU of the server's app", "flwr-serverapp"),
)
PHASES_MEANING = """\
*Start*: `flwr run` begins the server's app, and it opens the model. *Join*: each client opens its
model, hashes it, draws its windows. *Work*: the blocks' messages. *Finish*: each client is told
that it is over, and writes its copy of the result if it keeps one. *End*: the server writes the
report and Flower takes note.
"""
REPRODUCE = """\
## To reproduce

```sh
python -m bench network   # all; or --group fixed,clients,bytes,smollm2
python -m bench report    # this page, from bench/results/*.json
```
"""


def compose(files: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The page's text; files: names and documents of the kind "network", the oldest first."""
    lines = [HEAD, METHOD]
    for _, document in files:
        found = document["results"]
        lines += [f"All figures are of {machine_name(document)}. {_commits(found)}", ""]
        for section in (overhead, _fixed, _clients, along_bytes, smollm2):
            lines += section(found)
    machines = [Machine(doc["device"], machine_name(doc), [(name, doc)]) for name, doc in files]
    lines += [REPRODUCE, "## Files", "", *file_table(machines)]
    return "\n".join(lines).rstrip() + "\n"


def _commits(found: Sequence[Result]) -> str:
    """At which commit each group was measured, which may be an earlier one than the file's."""
    groups: dict[str, set[str]] = {}
    for one in found:
        groups.setdefault(one["group"], set()).add(one["commit"][:7])
    told = [f"{group} {' and '.join(sorted(commits))}" for group, commits in groups.items()]
    return f"Measured at the commits: {', '.join(told)}."


def _fixed(found: Sequence[Result]) -> list[str]:
    runs = of(found, "fixed")
    if not runs:
        return []
    headings = ["3 clients, 3 small blocks", *PHASES, "all", "in one process", OTHERS]
    rows = [
        [
            result["case"],
            *(duration(result["far"]["phases"][phase]) for phase in PHASES),
            duration(result["far"]["seconds"]),
            duration(result["near"]["seconds"]),
            percent(result["far"]["others"]),
        ]
        for result in runs
    ]
    message = median(m["cpu"] for result in runs for m in result["far"]["messages"])
    process = median(m["peak"] for result in runs for m in result["far"]["messages"]) / MIB
    return [
        *("## The fixed part", ""),
        *(*markdown(headings, rows), "", PHASES_MEANING),
        f"Flower starts a process at the client for every message. It takes {number(message)} CPU "
        f"seconds, nearly all of them to import PyTorch, transformers and Flower, and "
        f"{number(process)} MiB. That, and Flower's polls, is the fixed cost of a message; joining "
        f"and finishing are one message each, one-shot work as many as `message-mib` asks for, "
        f"synchronous work one for each exchange. `FLWR_SUPEREXEC_TASK_POLL_INTERVAL` sets the "
        f"polls, for every process of Flower; from here on it is 0.1 s.",
        "",
    ]


def _clients(found: Sequence[Result]) -> list[str]:
    runs = sorted(of(found, "clients"), key=lambda result: result["clients"])
    if not runs:
        return []
    headings = ["clients", "start", "join", "work", "finish", "end", "all", "in one process"]
    headings += ["CPU s a message and client", "CPU s of the SuperLink", "of the server's app"]
    headings += ["of SuperNodes and SuperExecs"]
    headings += ["peak MiB of the server's app", "of the SuperLink", OTHERS]
    rows = []
    for result in runs:
        far = result["far"]
        rows.append(
            [
                str(result["clients"]),
                *(duration(far["phases"][phase]) for phase in PHASES),
                duration(far["seconds"]),
                duration(result["near"]["seconds"]),
                number(median(m["cpu"] for m in far["messages"])),
                number(far["cpu"]["flower-superlink"]),
                number(far["cpu"]["flwr-serverapp"]),
                number(_waiting(result)),
                number(far["peak_bytes"]["flwr-serverapp"] / MIB),
                number(far["peak_bytes"]["flower-superlink"] / MIB),
                percent(far["others"]),
            ]
        )
    if len(runs) < 2:
        return ["## Along the clients", "", *markdown(headings, rows), ""]
    few, many = runs[0], runs[-1]
    idle = [_waiting(run) / run["clients"] / run["far"]["seconds"] for run in (few, many)]
    cpu = [median(m["cpu"] for m in run["far"]["messages"]) for run in (few, many)]
    grown = {phase: [run["far"]["phases"][phase] for run in runs] for phase in PHASES[1:4]}
    grown |= {name: [run["far"]["cpu"][program] for run in runs] for name, program in CENTRAL}
    counts = [run["clients"] for run in runs]
    exponents = [f"{name} {fit(counts, values)}" for name, values in grown.items()]
    return [
        *("## Along the clients", ""),
        *("One message of 3 small blocks each, SparseGPT, ℓ0 mean.", ""),
        *(*markdown(headings, rows), ""),
        f"Exponents along the clients: {'; '.join(exponents)}. All clients' processes start at "
        f"once on the same cores, which do the work of up to {many['clients']} machines here: a "
        f"message's CPU goes from {number(cpu[0])} to {number(cpu[1])} s a client, as caches and "
        f"memory are shared, and each SuperNode with its SuperExec takes {idle[0]:.1%} to "
        f"{idle[1]:.1%} of a core for its polls as long as a run lasts, which with as many nodes "
        f"on one machine grows as clients times seconds. On a machine of its own a client needs "
        f"what the CPU column says, whatever the number of clients.",
        "",
    ]


def _waiting(result: Result) -> float:
    """CPU seconds of what stands at the clients, and polls."""
    cpu = result["far"]["cpu"]
    return float(cpu["flower-supernode"] + cpu["flower-superexec"])
