"""The processes of the tests of divided runs: a launcher, and what each rank does.

    python split_jobs.py FOLDER PLAN

FOLDER holds the checkpoints and texts, and takes what the jobs write. PLAN is JSON: stages of jobs
{"name", "size", "do", ...}; the jobs of a stage run at once, the stages one after the other. All
ranks are forked from one process, since importing the package takes seconds. What rank N of a job
said is in FOLDER/said/JOB.N, and how each ended in FOLDER/ended.json.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from small_models import make_clients, make_model

from fedspa import agreement, cli, federate
from fedspa.data import Client
from fedspa.ranks import alone, join
from fedspa.settings import Settings

L0 = {"sparsity": 0.5, "rounds": 2, "message_dtype": None}
# For every name the checkpoint and the settings of a run; "held" is a model that is in memory.
RUNS = {
    "sparsegpt": ("float32", {**L0, "pruner": "sparsegpt"}),
    "sparsegpt-synchronous": ("float32", {**L0, "pruner": "sparsegpt", "schedule": "synchronous"}),
    "wanda": ("float32", {**L0, "pruner": "wanda"}),
    "wanda-synchronous": ("float32", {**L0, "pruner": "wanda", "schedule": "synchronous"}),
    "pattern": ("float32", {"pruner": "sparsegpt", "pattern": "2:4", "weighting": "samples"}),
    "some-blocks": (
        "float32",
        {**L0, "pruner": "wanda", "layers_per_client": 1, "every_block": True},
    ),
    "bfloat16": ("bfloat16", {**L0, "pruner": "sparsegpt"}),
    "held": ("held", {**L0, "pruner": "sparsegpt"}),
    "magnitude": ("float32", {**L0, "pruner": "magnitude"}),
    "mask": ("float32", {**L0, "pruner": "sparsegpt", "aggregation": "mask"}),
    "statistics": ("float32", {**L0, "pruner": "sparsegpt", "aggregation": "statistics"}),
    "exchanges": (
        "float32",
        {
            "sparsity": 0.5,
            "pruner": "wanda",
            "aggregation": "statistics",
            "statistics_dtype": "int64",
            "schedule": "synchronous",
            "synchronize_every": 2,
        },
    ),
    "statistics-of-some": (
        "float32",
        {
            "sparsity": 0.5,
            "pruner": "wanda",
            "aggregation": "statistics",
            "schedule": "one-shot",
            "layers_per_client": 1,
        },
    ),
}
# Of those, what four ranks do; and what each way to divide work must not change by a bit.
FEW = ("sparsegpt", "wanda-synchronous", "magnitude", "mask", "statistics")
EXACT = {"samples": "magnitude", "clients": "mask"}
SECONDS = 100


def clients(more=()):
    """Four clients of eight windows, the last with more of them, and others."""
    return [*make_clients(3, samples=8), *make_clients(4, samples=11)[3:], *more]


def one_run(folder, out, name, ranks):
    """One of RUNS into a folder of that name."""
    checkpoint, settings = RUNS[name]
    model = make_model() if checkpoint == "held" else folder / checkpoint
    federate(model, clients(), Settings(**settings), out=out / name, progress=False, ranks=ranks)


def all_runs(folder, job):
    """Every run, on the same ranks."""
    with alone() if job["size"] == 1 else join(job["split"], "cpu") as ranks:
        for name in RUNS if job["size"] < 4 else FEW:
            one_run(folder, folder / job["name"], name, ranks)


def disagreements(folder, job):
    """What ranks may not differ in, and divisions that leave a rank idle: all of them refused."""
    out = folder / job["name"]
    with join(job["split"], "cpu") as ranks:
        other = ranks.rank == 1

        def refused(what, model="float32", data=None, sparsity=0.5):
            settings = Settings(pruner="wanda", sparsity=sparsity)
            model = make_model() if model is None else folder / model
            try:
                federate(
                    model, data or clients(), settings, out=out / what, progress=False, ranks=ranks
                )
            except ValueError as error:
                print(json.dumps({what: str(error)}))

        changed = clients()
        changed[2].tokens[0, 0] += 1
        capable = [Client(c.tokens, capacity=0.5, name=c.name) for c in clients()]
        refused("settings", sparsity=0.6 if other else 0.5)
        refused("text", data=changed if other else None)
        refused("held text", model=None, data=changed if other else None)
        refused("capacity", data=capable if other else None)
        refused("model", model="changed" if other else "float32")
        refused("few clients", data=clients()[:1])
        refused("few samples", data=[*clients()[:3], *make_clients(4, samples=1)[3:]])


def command(folder, job):
    """`fedspa prune` with the arguments of a job; a rank may have more of its own."""
    mine = job.get("rank_arguments", {}).get(os.environ.get("RANK"), [])
    if job.get("killed") is not None and str(job["killed"]) == os.environ.get("RANK"):
        die_in_second_round()
    cli.main([*job["arguments"], *mine], standalone_mode=True)


def die_in_second_round():
    """Let this process die in the middle of the second round, when others wait for it."""
    prune = agreement.local.prune

    def die(client, samples, block, statistics, task, pruner, ranks=None):
        if (task.round, task.block) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return prune(client, samples, block, statistics, task, pruner, ranks)

    agreement.local.prune = die


ACTIONS = {"all_runs": all_runs, "disagreements": disagreements, "command": command}


def free_port():
    """A port of this host that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def fork_rank(folder, job, rank, port):
    """Start a rank of a job; returns its process."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        said = os.open(folder / "said" / f"{job['name']}.{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        if job["size"] > 1:
            os.environ.update(
                RANK=str(rank),
                WORLD_SIZE=str(job["size"]),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        ACTIONS[job["do"]](folder, job)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_stage(folder, jobs):
    """How each rank of each job ended: its exit code, and the seconds since the first one did."""
    running, ended = {}, {}
    for job in jobs:
        port = free_port()
        for rank in range(job["size"]):
            running[fork_rank(folder, job, rank, port)] = (job["name"], rank)
    limit = time.monotonic() + SECONDS
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            name, rank = running.pop(child)
            ended.setdefault(name, {})[rank] = (os.waitstatus_to_exitcode(status), time.monotonic())
        elif time.monotonic() > limit:
            for child in running:
                os.kill(child, signal.SIGKILL)
            limit += SECONDS
        else:
            time.sleep(0.02)
    for ranks in ended.values():
        first = min(when for _, when in ranks.values())
        ranks.update({rank: (code, when - first) for rank, (code, when) in ranks.items()})
    return ended


def main(folder, plan):
    """Run a plan."""
    torch.set_num_threads(1)
    (folder / "said").mkdir()
    with tempfile.TemporaryDirectory() as place:
        # What a first run imports and prepares, every rank would prepare for itself.
        federate(
            folder / "float32",
            clients()[:1],
            Settings(sparsity=0.5),
            out=Path(place, "out"),
            progress=False,
        )
    ended = {}
    for stage in plan:
        ended |= run_stage(folder, stage)
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
