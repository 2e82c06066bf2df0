"""One run over the network and the same in one process: time, CPU, memory and bytes of each."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from counting import CountingProxy
from deployment import Deployment
from test_flower_run import same_files

from bench import results
from bench.network import HARNESS
from bench.network.cases import SMOLLM2_DOMAINS, SMOLLM2_WINDOWS, Case
from bench.network.checkpoints import prepare, sizes
from bench.network.watch import PROGRAMS, Watch, Watched, busy_seconds, now
from fedspa.domains import domain_text
from fedspa.flower.beforehand import APP
from fedspa.report import Report

# Seconds after which a run has failed.
LONGEST = 900.0
# Windows of each domain that perplexity is measured on.
HELD_OUT = "16"
# Compiled modules are kept, as on a user's machine: else each process would compile them.
SURROUNDINGS = {"PYTHONDONTWRITEBYTECODE": ""}
NEAR = """
import json, sys
from pathlib import Path
from test_flower_run import in_process
folder, nodes, config = json.loads(sys.argv[1])
in_process(Path(folder), nodes, config)
"""


def measure(case: Case) -> dict[str, Any]:
    """Run a case on both sides; returns its result.

    raises: RuntimeError where a run fails, AssertionError where the two results differ
    """
    with tempfile.TemporaryDirectory(prefix="fedspa-bench-") as scratch:
        folder = Path(scratch)
        nodes, config = prepare(case, folder)
        far = _far(case, folder, nodes, config)
        near = _near(folder, nodes, config)
        same_files(folder / "near", folder / "out")
        result = {
            "group": case.group,
            "case": case.name,
            **sizes(case, config),
            "poll": case.poll,
            "check": "every file of weights and masks has the same bytes as that of one process",
            "far": far,
            "near": near,
            "commit": results.commit(),
        }
        if case.group == "smollm2":
            result["perplexity"] = _perplexities(folder, Path(config["model"]))
        return result


def _far(case: Case, folder: Path, nodes: Mapping[int, Any], config: dict) -> dict[str, Any]:
    environment = {**SURROUNDINGS, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(case.poll)}
    network = Deployment(folder / "network", database=case.database, environment=environment)
    with network as deployment:
        with CountingProxy(deployment.port) as proxy, Watch(deployment) as watch:
            for index, node in enumerate(nodes.values()):
                deployment.start_node(index, node, port=proxy.port if index == 0 else None)
            # The command finds its nodes connected, as in a federation that stands.
            for index in range(len(nodes)):
                deployment.wait_for_text(f"node-{index}", "SuperNode ID", 120)
            idle = {program: _cpu(watch.processes(program)) for program in PROGRAMS}
            begin, sent, received, busy = now(), proxy.sent, proxy.received, busy_seconds()
            run = deployment.run(APP, config, LONGEST)
            end, busy = now(), busy_seconds() - busy
            time.sleep(0.5)
            sent, received = proxy.sent - sent, proxy.received - received
        if run.status != "finished:completed":
            raise RuntimeError(f"the run of {case.name!r} {run.status}: {run.details}\n{run.log}")
    report = Report.from_json((Path(config["out"]) / "report.json").read_text(encoding="utf-8"))
    cpu = _all_cpu(watch, idle)
    return {
        "seconds": end - begin,
        "others": max(0.0, busy - sum(cpu.values())) / (end - begin) / (os.cpu_count() or 1),
        "phases": _phases(watch, len(nodes), begin, end),
        "stages": report.seconds,
        "messages": _messages(watch, len(nodes)),
        "cpu": cpu,
        "peak_bytes": _peaks(watch) | {"report": report.peak_memory},
        "bytes": _bytes(report, sent, received),
    }


def _bytes(report: Report, sent: int, received: int) -> dict[str, int]:
    """Of the client behind the proxy; what the wire counts holds heartbeats and the app too."""
    first = report.clients[0]
    told = {key: getattr(first, key) for key in ("bytes_up", "bytes_down", "wire_up", "wire_down")}
    return {**told, "sent": sent, "received": received}


def _messages(watch: Watch, nodes: int) -> list[dict[str, Any]]:
    """Of each message, joining and finish included: the processes that answered it."""
    rows = []
    for answered in zip(*_by_node(watch, nodes), strict=True):
        rows.append(
            {
                "seconds": max(p.seen for p in answered) - min(p.began for p in answered),
                "process": median(p.seen - p.began for p in answered),
                "cpu": median(p.cpu for p in answered),
                "peak": max(p.peak for p in answered),
            }
        )
    return rows


def _by_node(watch: Watch, nodes: int) -> list[list[Watched]]:
    found = [watch.processes("flwr-clientapp", f"node-{index}") for index in range(nodes)]
    if len({len(mine) for mine in found}) != 1:
        raise RuntimeError(f"the nodes answered {[len(mine) for mine in found]} messages")
    return found


def _phases(watch: Watch, nodes: int, begin: float, end: float) -> dict[str, float]:
    """Seconds from the command to its end, one phase after the other.

    start: until the first client is asked who it is; join: until all have answered; work: until
    the last client has sent its last block; finish: until the last one has written its result;
    end: until the command is over
    """
    found = list(zip(*_by_node(watch, nodes), strict=True))
    marks = [begin, min(p.began for p in found[0])]
    marks += [max(p.seen for p in found[index]) for index in (0, -2, -1)]
    marks += [end]
    names = ("start", "join", "work", "finish", "end")
    return {n: b - a for n, a, b in zip(names, marks, marks[1:], strict=False)}


def _all_cpu(watch: Watch, idle: Mapping[str, float]) -> dict[str, float]:
    """CPU seconds by program; of those that were there before, what the run added."""
    return {program: _cpu(watch.processes(program)) - idle[program] for program in PROGRAMS}


def _cpu(found: list[Watched]) -> float:
    return sum(one.cpu for one in found)


def _peaks(watch: Watch) -> dict[str, int]:
    programs = ("flwr-serverapp", "flwr-clientapp", "flower-superlink", "flower-supernode")
    return {p: max(one.peak for one in watch.processes(p)) for p in programs}


def _near(folder: Path, nodes: Mapping[int, Any], config: dict) -> dict[str, Any]:
    """The same in one process, whose start counts, as that of the network's processes does."""
    begin = now()
    _python("-c", NEAR, json.dumps([str(folder), nodes, config]))
    seconds = now() - begin
    text = (folder / "near" / "report.json").read_text(encoding="utf-8")
    report = Report.from_json(text)
    return {"seconds": seconds, "stages": report.seconds, "peak_bytes": report.peak_memory}


def _perplexities(folder: Path, dense: Path) -> dict[str, dict[str, float]]:
    """`fedspa eval` of both models on what the clients did not calibrate on, by domain."""
    texts = []
    for domain in SMOLLM2_DOMAINS:
        text = folder / f"{domain}.heldout.txt"
        text.write_text(domain_text(domain, "heldout"), encoding="utf-8")
        texts += ["--text", f"{domain}={text}"]
    length = str(SMOLLM2_WINDOWS["seqlen"])
    limits = ["--seqlen", length, "--max-windows", HELD_OUT, "--json"]
    found = {}
    for name, model in (("dense", dense), ("pruned", folder / "out")):
        said = _python("-m", "fedspa", "eval", str(model), *texts, *limits)
        found[name] = json.loads(said)["perplexity"]
    return found


def _python(*arguments: str) -> str:
    """Run Python with one thread, as the network's processes have; returns what it printed."""
    path = os.pathsep.join([*HARNESS, str(results.ROOT), str(results.ROOT / "kernels")])
    environment = {**os.environ, **SURROUNDINGS, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"python {arguments[0]} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout
