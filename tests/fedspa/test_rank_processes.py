"""Ranks in processes of their own: they agree, and none waits for ever for a dead one.

What the processes do is in `rank_jobs.py`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_jobs import SHARED, SUMMED, free_port, numbers

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
    "no_second_gpu": {"size": 2},
    "no_device": {"size": 2},
}


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


@pytest.mark.parametrize(
    ("job", "message"),
    [("no_second_gpu", "one GPU, and there are 2 ranks"), ("no_device", "cpu or cuda")],
)
def test_a_device_that_ranks_cannot_have_is_refused(ended, job, message):
    folder, how = ended
    for rank in range(2):
        assert how[job][str(rank)][0] == 2
        (told,) = said(folder, job, rank)
        assert told.startswith("Error: ") and message in told


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
        assert result["mine"] == list(range(10))[10 * rank // size : 10 * (rank + 1) // size]
        others = {2: "rank 1", 4: "ranks 1, 2 and 3"}[size]
        assert result["refusal"] == (
            f'ranks disagree on settings: "sparsity" is 0.5 on rank 0, 0.6 on {others}; start '
            f"every rank with the same command and files"
        )


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_gets_the_same_sums_values_and_refusals(ended, size):
    folder, how = ended
    assert [how[f"divide_{size}"][str(rank)][0] for rank in range(size)] == [0] * size
    check_divided(folder, f"divide_{size}", size)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_rank_that_is_slow_or_holds_the_interpreter_is_waited_for(ended):
    folder, how = ended
    assert [how["slow"][str(rank)][0] for rank in range(2)] == [0, 0]
    assert [said(folder, "slow", rank) for rank in range(2)] == [["2"], ["2"]]


@pytest.mark.slow
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
