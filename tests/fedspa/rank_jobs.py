"""The processes of the ranks' tests: what each rank does, and a launcher of many jobs at once.

    python rank_jobs.py OUT JOB            one rank, of torchrun
    python rank_jobs.py OUT --fork PLAN    all ranks of several jobs, without torchrun

What rank N of a job says is in OUT/JOB/rank.N; how the jobs of a plan ended in OUT/ended.json.
"""

import ctypes
import importlib.util
import json
import os
import signal
import socket
import sys
import time
import types
from pathlib import Path

import torch

# The ranks need nothing of the rest of the package, whose imports take seconds in each process. A
# test that imports this file has the package already, and keeps it.
if "fedspa" not in sys.modules:
    _package = types.ModuleType("fedspa")
    _package.__path__ = list(importlib.util.find_spec("fedspa").submodule_search_locations)
    sys.modules["fedspa"] = _package

from fedspa.ranks import join, peers  # noqa: E402

SHARED = (torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.int64)
SUMMED = (torch.float32, torch.float64, torch.int32, torch.int64)
QUICK = {"period": 0.1, "patience": 3.0, "arrival": 30.0}


def numbers(rank, dtype):
    """What a rank holds: (6, 5), not contiguous."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(5, 6, generator=generator) * 100).to(dtype).T


def divide(ranks):
    """Every method once; the results as JSON."""
    summed = {str(dtype): numbers(ranks.rank, dtype) for dtype in SUMMED}
    ranks.sum_([*summed.values(), torch.empty(0)])
    again = [numbers(ranks.rank, torch.float32) for _ in range(2)]
    ranks.sum_(again)
    last = ranks.size - 1
    shared = {str(dtype): numbers(ranks.rank, dtype) for dtype in SHARED}
    total = torch.tensor(float(ranks.rank))
    ranks.share(last, [*shared.values(), total, torch.empty(0)])
    ranks.check_same("settings", {"seed": "0"})
    try:
        ranks.check_same("settings", {"seed": "0", "sparsity": "0.6" if ranks.rank else "0.5"})
    except ValueError as error:
        refusal = str(error)
    ranks.barrier()
    print(
        json.dumps(
            {
                "summed": {name: tensor.tolist() for name, tensor in summed.items()},
                "same_again": all(torch.equal(a, summed["torch.float32"]) for a in again),
                "shared": {name: tensor.tolist() for name, tensor in shared.items()},
                "total": total.item(),
                "gathered": ranks.gather({"rank": ranks.rank}),
                "refusal": refusal,
                "mine": ranks.mine(list(range(10))),
            }
        )
    )


def together(ranks, action, victim):
    """The victim does something to itself while the others wait for it in a collective."""
    ranks.barrier()
    if ranks.rank == victim:
        time.sleep(0.3)
        action()
    ranks.sum_([torch.ones(10)])


def meanwhile(ranks, action, victim):
    """The same while the others compute, far from any collective."""
    ranks.barrier()
    if ranks.rank == victim:
        action()
    time.sleep(50)


def end(number):
    """Something that a process does to itself."""
    return lambda: os.kill(os.getpid(), number)


def fail():
    raise ValueError("weight of layer 3 is NaN\nand more")


def hold_interpreter(seconds):
    """Compute in native code that lets no other thread run."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def slow(ranks):
    """Rank 1 takes several times the patience; no other thread of it runs for half of that."""
    if ranks.rank == 1:
        time.sleep(1.5)
        hold_interpreter(1.5)
    total = torch.ones(1)
    ranks.sum_([total])
    print(int(total))


def finish_early(ranks):
    """Rank 1 is done at once, rank 0 takes several times the patience."""
    if ranks.rank != 1:
        time.sleep(2)


def kill_agent(ranks):
    """End the torchrun that serves the store."""
    ranks.barrier()
    if ranks.rank == 0:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(50)


def divide_and_die(ranks):
    divide(ranks)
    sys.stdout.flush()
    together(ranks, end(signal.SIGKILL), 1)


# name: what every rank does, what it does otherwise than QUICK, and whether hosts are told apart.
JOBS = {
    "divide_2": (divide, {}, False),
    "divide_4": (divide, {}, False),
    "killed_in_collective": (lambda r: together(r, end(signal.SIGKILL), 2), {}, False),
    "killed_while_computing": (lambda r: meanwhile(r, end(signal.SIGKILL), 2), {}, False),
    "killed_first": (lambda r: meanwhile(r, end(signal.SIGKILL), 0), {}, False),
    "killed_first_in_collective": (lambda r: together(r, end(signal.SIGKILL), 0), {}, False),
    "raises_in_collective": (lambda r: together(r, fail, 1), {}, False),
    "raises_while_computing": (lambda r: meanwhile(r, fail, 1), {}, False),
    "first_raises": (lambda r: meanwhile(r, fail, 0), {}, False),
    "slow": (slow, {"patience": 0.5}, False),
    "finishes_early": (finish_early, {"patience": 0.5}, False),
    "host_silent": (lambda r: meanwhile(r, end(signal.SIGSTOP), 2), {}, True),
    "host_killed": (lambda r: together(r, end(signal.SIGKILL), 2), {}, True),
    "server_silent": (lambda r: meanwhile(r, end(signal.SIGSTOP), 0), {}, True),
    "never_came": (divide, {"arrival": 7.0}, False),
    "agent_killed": (kill_agent, {}, False),
    "divide_and_die": (divide_and_die, {}, False),
    "no_second_gpu": (divide, {"device": "cuda:1"}, False),
    "no_device": (divide, {"device": "meta"}, False),
}


def terminate(number, frame):
    raise SystemExit(128 + number)


def run_rank(out, job):
    """What `fedspa prune` does around a run."""
    signal.signal(signal.SIGTERM, terminate)
    rank = int(os.environ["RANK"])
    said = os.open(out / job / f"rank.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    action, times, apart = JOBS[job]
    if apart:
        peers.place = lambda rank: f"host of rank {rank}"
    torch.set_num_threads(1)
    try:
        with join("samples", **{"device": "cpu", **QUICK, **times}) as ranks:
            action(ranks)
    except (ValueError, RuntimeError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def fork_rank(out, job, rank, size, port):
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        code = run_rank(out, job)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_plan(out, plan):
    """Run a few jobs at a time. plan: for each job {"size": .., "absent": [ranks], "stops": rank}.

    How each rank ended: its exit code, and the seconds since the first one of its job did.
    """
    waiting, running, ended = list(plan), {}, {job: {} for job in plan}
    limit = time.monotonic() + 60
    while waiting or running:
        while waiting and len(running) < 10:
            job = waiting.pop(0)
            (out / job).mkdir()
            port, size = free_port(), plan[job]["size"]
            for rank in set(range(size)) - set(plan[job].get("absent", [])):
                running[fork_rank(out, job, rank, size, port)] = (job, rank)
        for child in hopeless(plan, running) if time.monotonic() < limit else running:
            os.kill(child, signal.SIGKILL)
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            job, rank = running.pop(child)
            ended[job][rank] = (os.waitstatus_to_exitcode(status), time.monotonic())
        else:
            time.sleep(0.02)
    for ranks in ended.values():
        first = min(when for _, when in ranks.values())
        for rank, (code, when) in ranks.items():
            ranks[rank] = (code, when - first)
    (out / "ended.json").write_text(json.dumps(ended))


def hopeless(plan, running):
    """Stopped processes, which stand for hosts that are gone, once the others have missed them."""
    left = {}
    for child, (job, rank) in running.items():
        left.setdefault(job, []).append((rank, child))
    return [
        ranks[0][1]
        for job, ranks in left.items()
        if [plan[job].get("stops")] == [r for r, _ in ranks]
    ]


if __name__ == "__main__":
    if sys.argv[2] == "--fork":
        run_plan(Path(sys.argv[1]), json.loads(sys.argv[3]))
    else:
        Path(sys.argv[1], sys.argv[2]).mkdir(exist_ok=True)
        sys.exit(run_rank(Path(sys.argv[1]), sys.argv[2]))
