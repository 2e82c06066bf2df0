"""Several ranks: how they divide work and agree, and that none waits for ever for a dead one.

The processes themselves are in `rank_jobs.py`.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_jobs import SHARED, SUMMED, free_port, numbers

from fedspa.ranks import Ranks, alone, join
from fedspa.ranks.peers import AWAY, DONE, Peers
from fedspa.ranks.processes import lives, mark

JOBS = Path(__file__).parent / "rank_jobs.py"
GONE = "ended: the process is gone without a word (killed, or out of memory?)"
RAISED = "ended: ValueError: weight of layer 3 is NaN"
NOT_HEARD = "ended, or cannot be reached: nothing was heard from there for 3 s"
# Sums of a few float32 in another order than here.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}
# Seconds in which all must have ended; the watch of these jobs is 20 times as quick as the default,
# which has to notice a death within a minute, and the machine may be busy.
SOON = 8.0
PLAN = {
    "never_came": {"size": 4, "absent": [3]},
    "divide_2": {"size": 2},
    "divide_4": {"size": 4},
    "killed_in_collective": {"size": 4},
    "killed_while_computing": {"size": 4},
    "killed_first": {"size": 4},
    "killed_first_in_collective": {"size": 2},
    "raises_in_collective": {"size": 4},
    "raises_while_computing": {"size": 4},
    "first_raises": {"size": 2},
    "slow": {"size": 2},
    "finishes_early": {"size": 2},
    "host_silent": {"size": 4, "stops": 2},
    "host_killed": {"size": 4},
    "server_silent": {"size": 2, "stops": 0},
}


def several(rank, size):
    """A rank for what needs no other one."""
    return Ranks(rank, size, "samples", torch.device("cpu"))


def environment(**more):
    """Ours without what a torchrun would have set, with one thread."""
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    paths = [str(JOBS.parents[2]), str(JOBS.parents[2] / "kernels"), ours.get("PYTHONPATH", "")]
    return {**ours, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **more}


def said(folder, job, rank):
    """The lines of a rank; the C++ of torch also logs, with where it is, when a store is gone."""
    lines = (folder / job / f"rank.{rank}").read_text().splitlines()
    return [line for line in lines if line.startswith(("Error: ", "{")) or line.isdecimal()]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """All jobs without torchrun: the folder of what was said, and how each rank ended."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, JOBS, folder, "--fork", json.dumps(PLAN)]
    subprocess.run(command, env=environment(), check=True, timeout=100)
    return folder, json.loads((folder / "ended.json").read_text())


def torchrun(folder, job, size):
    """Start a job under torchrun; its exit code, and what it said itself."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}", JOBS, folder, job]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    return done.returncode, done.stderr


# What ranks divide.


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [0, 1, 7, 12])
def test_parts_are_contiguous_and_differ_by_at_most_one(size, length):
    parts = [several(rank, size).mine(range(length)) for rank in range(size)]
    assert [item for part in parts for item in part] == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    windows = torch.arange(length * 3).view(length, 3)
    assert torch.equal(torch.cat([several(r, size).mine(windows) for r in range(size)]), windows)


def test_largest_work_goes_first_to_whom_has_the_least():
    loads = [1, 5, 3, 3, 2, 5]
    for rank in range(2):
        assert several(rank, 2).owner(loads) == [1, 0, 0, 1, 0, 1]
    assert several(0, 4).owner([1, 1]) == [0, 1]
    assert several(0, 4).owner([]) == []
    assert alone().owner([3, 1, 2]) == [0, 0, 0]


def test_too_many_ranks_are_refused_with_the_number_that_can_work():
    several(0, 4).check_enough(4, "clients")
    with pytest.raises(ValueError, match="4 ranks cannot divide 3 clients; start at most 3"):
        several(0, 4).check_enough(3, "clients")


def test_one_rank_has_everything_and_waits_for_nobody():
    with alone() as ranks:
        assert (ranks.rank, ranks.size, ranks.split, ranks.first) == (0, 1, None, True)
        tensor = torch.ones(3)
        ranks.sum_([tensor])
        ranks.share(0, [tensor])
        ranks.check_same("settings", {"seed": "0"})
        ranks.barrier()
        assert tensor.tolist() == [1, 1, 1]
        assert ranks.gather("a") == ["a"]
    ranks.close()


def test_a_sum_in_half_precision_is_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        alone().sum_([torch.ones(3, dtype=torch.bfloat16)])


# How they join.


@pytest.mark.parametrize(
    ("given", "split", "device", "message"),
    [
        ({}, "samples", "cpu", "there are none .*torchrun"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            None,
            "cpu",
            "2 ranks would all do the same work: say what they divide",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "layers", "cpu", "samples, clients, not 'layers'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "samples", "cpu", "MASTER_ADDR is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "samples", "cpu", "RANK is '2'.* from 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "samples", "cpu", "WORLD_SIZE is 'two'"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "0"},
            "samples",
            "cpu",
            "MASTER_PORT is '0'; it must be a whole number from 1 to 65535",
        ),
    ],
)
def test_an_environment_that_makes_no_ranks_is_refused(monkeypatch, given, split, device, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        join(split, device)


def test_without_torchrun_or_with_one_process_a_rank_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert join(None, "cpu").size == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks = join("clients", "cpu")
    assert (ranks.size, ranks.split, ranks.device) == (1, "clients", torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:1", "one GPU, and there are 2 ranks"), ("meta", "cpu or cuda")]
)
def test_a_device_that_ranks_cannot_have_is_refused(tmp_path, device, message):
    code = (
        "import sys, rank_jobs as jobs\n"
        "try: jobs.join('samples', sys.argv[1], period=0.1)\n"
        "except ValueError as error: print(error)"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, device],
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", **place),
            stdout=subprocess.PIPE,
            cwd=JOBS.parent,
        )
        for place in [{"MASTER_PORT": str(free_port())}]
        for rank in range(2)
    ]
    for rank in ranks:
        assert message in rank.communicate(timeout=60)[0].decode()


# What they do together.


def check_divided(folder, job, size):
    """The results of the job "divide" against what one process computes."""
    results = [json.loads(said(folder, job, rank)[0]) for rank in range(size)]
    for dtype in SUMMED:
        # The bits: JSON writes floats so that they are read back as they were.
        assert all(r["summed"][str(dtype)] == results[0]["summed"][str(dtype)] for r in results)
        expected = sum(numbers(rank, dtype) for rank in range(size))
        result = torch.tensor(results[0]["summed"][str(dtype)], dtype=dtype)
        torch.testing.assert_close(result, expected, **TOLERANCE)
    for rank, result in enumerate(results):
        assert result["same_again"]
        for dtype in SHARED:
            expected = numbers(size - 1, dtype).tolist()
            assert result["shared"][str(dtype)] == expected, dtype
        assert result["total"] == size - 1
        assert result["gathered"] == [{"rank": other} for other in range(size)]
        assert result["mine"] == several(rank, size).mine(list(range(10)))
        others = {2: "rank 1", 4: "ranks 1, 2 and 3"}[size]
        assert result["refusal"] == (
            f'ranks disagree on settings: "sparsity" is 0.5 on rank 0, 0.6 on {others}; start '
            f"every rank with the same command and files"
        )


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_gets_the_same_sums_values_and_refusals(ended, size):
    folder, how = ended
    assert [how[f"divide_{size}"][str(rank)][0] for rank in range(size)] == [0] * size
    check_divided(folder, f"divide_{size}", size)


@pytest.mark.parametrize(
    ("job", "dead", "sentence"),
    [
        ("killed_in_collective", 2, GONE),
        ("killed_while_computing", 2, GONE),
        ("killed_first", 0, GONE),
        ("killed_first_in_collective", 0, GONE),
        ("raises_in_collective", 1, RAISED),
        ("raises_while_computing", 1, RAISED),
        ("first_raises", 0, RAISED),
        ("host_silent", 2, NOT_HEARD),
        ("host_killed", 2, NOT_HEARD),
        ("server_silent", 0, "ended, or cannot be reached: the store that it serves does not"),
        ("never_came", 3, "did not come within 7 s; start as many processes as WORLD_SIZE says"),
    ],
)
def test_a_dead_rank_ends_all_others_with_its_name(ended, job, dead, sentence):
    folder, how = ended
    size = PLAN[job]["size"]
    for rank in set(range(size)) - {dead}:
        code, seconds = how[job][str(rank)]
        assert code == 1
        assert seconds < SOON
        told = said(folder, job, rank)
        assert len(told) == 1 and told[0].startswith(f"Error: rank {dead} of {size} {sentence}")
    if sentence is RAISED:
        assert how[job][str(dead)][0] == 2
        assert said(folder, job, dead) == ["Error: weight of layer 3 is NaN"]


def test_a_rank_that_is_slow_or_holds_the_interpreter_is_waited_for(ended):
    folder, how = ended
    assert [how["slow"][str(rank)][0] for rank in range(2)] == [0, 0]
    assert [said(folder, "slow", rank) for rank in range(2)] == [["2"], ["2"]]


def test_a_rank_that_has_finished_is_not_dead(ended):
    folder, how = ended
    assert [how["finishes_early"][str(rank)][0] for rank in range(2)] == [0, 0]
    assert [said(folder, "finishes_early", rank) for rank in range(2)] == [[], []]


def test_under_torchrun_ranks_divide_and_a_killed_one_is_named(tmp_path):
    before = time.monotonic()
    code, log = torchrun(tmp_path, "divide_and_die", 2)
    assert code == 1
    assert time.monotonic() - before < 60
    check_divided(tmp_path, "divide_and_die", 2)
    assert said(tmp_path, "divide_and_die", 0)[1:] == [f"Error: rank 1 of 2 {GONE}"]
    assert "rank      : 1 (local_rank: 1)" in log


def test_ranks_end_when_the_torchrun_that_serves_their_store_is_killed(tmp_path):
    code, _ = torchrun(tmp_path, "agent_killed", 2)
    assert code == -9
    until = time.monotonic() + SOON
    for rank in range(2):
        while not said(tmp_path, "agent_killed", rank) and time.monotonic() < until:
            time.sleep(0.05)
        assert said(tmp_path, "agent_killed", rank) == [
            "Error: torchrun on the host of rank 0 of 2 ended, or cannot be reached: the store "
            "that it serves does not answer"
        ]


# Who is missed.


class Places(torch.distributed.HashStore):
    """A store in which the test plays the other ranks."""

    def play(self, rank, place, beat, marked=""):
        self.set(f"place/{rank}", f"{place}\n{marked}")
        self.set(f"beat/{rank}", beat)


def peers_of_rank_0(store, size):
    """What rank 0 knows, on a host of its own."""
    peers = Peers(store, 0, size)
    peers.greet(0.0)
    peers.listen()
    return peers


def test_a_host_is_silent_only_where_no_rank_of_it_is_heard():
    store = Places()
    for rank in (1, 2):
        store.play(rank, "left", "1")
    store.play(3, "right", "1")
    peers = peers_of_rank_0(store, 4)
    peers.listen(20.0)
    store.play(2, "left", "2")
    peers.listen(20.0)
    # Rank 1 is as silent as rank 3, but rank 2 looks after it.
    assert peers.silent(30.0) == [3]
    store.play(3, "right", DONE.decode())
    peers.listen(20.0)
    peers.listen(20.0)
    peers.listen(20.0)
    assert peers.silent(30.0) == [1, 2]
    assert not peers.done()


def test_a_rank_that_has_not_come_is_missing_and_not_silent():
    store = Places()
    peers = peers_of_rank_0(store, 2)
    peers.greet(50.0)
    assert (peers.missing(60.0), peers.silent(1.0)) == ([], [])
    peers.greet(20.0)
    assert peers.missing(60.0) == [1]
    store.play(1, "left", "1")
    peers.greet(0.0)
    assert peers.missing(60.0) == []


def test_a_process_that_has_ended_is_gone_even_if_nobody_waited_for_it():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    marked = mark(child.pid)
    assert lives(marked) and lives(mark(os.getpid()))
    assert not lives(f"{child.pid} 1"), "a later process with the same id is another one"
    store = Places()
    peers = Peers(store, 0, 2)
    store.play(1, store.get("place/0").decode().partition("\n")[0], "1", marked)
    peers.greet(0.0)
    assert peers.gone() == []
    child.kill()
    until = time.monotonic() + 10
    while lives(marked) and time.monotonic() < until:
        time.sleep(0.01)
    assert peers.gone() == [1]
    store.set("beat/1", DONE.decode())
    assert peers.gone() == [], "it had finished before it was gone"
    assert child.wait() == -9
    assert not lives(marked)


def test_nothing_follows_on_a_last_word():
    store = Places()
    peers = Peers(store, 0, 2)
    peers.beat(DONE)
    peers.beat()
    assert store.get("beat/0") == DONE
    peers.beat(AWAY)
    assert store.get("beat/0") == AWAY


def test_a_store_holds_no_name_of_a_host():
    store = Places()
    Peers(store, 0, 2)
    assert socket.gethostname() not in store.get("place/0").decode()
