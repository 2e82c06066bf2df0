"""A streamed run that is killed, wherever, goes on to the same bytes; another run is refused.

python test_resume.py     a plan of runs in each line of the input, each run in a process of its own
                          that may kill itself; how they ended is a line of the output
"""

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import make_clients, make_model

from fedspa import Settings, federate
from fedspa.run import Surroundings
from fedspa.streaming import federation, generations, journal

ONE_SHOT = {"sparsity": 0.5}
ROUNDS = {
    "sparsity": 0.6,
    "schedule": "synchronous",
    "rounds": 2,
    "ramp": "linear",
    "layers_per_client": 2,
}
MASKS = {
    "sparsity": 0.5,
    "pruner": "wanda",
    "aggregation": "mask",
    "rounds": 3,
    "layers_per_client": 2,
}
SUMS = {
    "sparsity": 0.6,
    "aggregation": "statistics",
    "schedule": "synchronous",
    "synchronize_every": 2,
}
SETTINGS = {"one-shot": ONE_SHOT, "rounds": ROUNDS, "masks": MASKS, "sums": SUMS}
# Calls after which the disk holds something that it did not hold before.
CHANGES = ("pwrite", "posix_fallocate", "rename", "unlink", "fsync")


def prune(dense, out, settings, **given):
    surroundings = {k: given.pop(k) for k in ("activations", "restart", "dtype") if k in given}
    clients = given.pop("clients", None) or make_clients(2)
    return federate(
        dense,
        clients,
        Settings(**settings),
        out=out,
        progress=False,
        surroundings=Surroundings(**surroundings),
        **given,
    )


def result_of(out):
    """The bytes of every file of tensors, and what the report says of clients and layers."""
    report = json.loads((out / "report.json").read_text())
    files = {file.name: file.read_bytes() for file in sorted(out.glob("*.safetensors"))}
    return files, report["clients"], report["layers"]


def assert_same(found, wanted, where=""):
    """Short where they differ: the names of the files that do."""
    files, clients, layers = found
    assert files.keys() == wanted[0].keys(), where
    assert [name for name in files if files[name] != wanted[0][name]] == [], where
    assert (clients, layers) == wanted[1:], where


def names_beside(out):
    return sorted(path.name for path in out.parent.iterdir())


def counted(act, *, skip_sync=True):
    """Let every call that changes the disk go through `act(number)` first; returns an undo."""
    real = {name: getattr(os, name) for name in CHANGES}
    number = 0

    def through(name):
        def call(*arguments, **named):
            nonlocal number
            number += 1
            act(number)
            if name == "fsync" and skip_sync:
                return None
            return real[name](*arguments, **named)

        return call

    for name in CHANGES:
        setattr(os, name, through(name))
    return lambda: [setattr(os, name, function) for name, function in real.items()]


def child(job):
    """Carry out one run of a plan, which ends itself at its call `kill`; writes nothing else."""
    signal.alarm(100)  # one that hangs is ended, and fails its test

    def act(number):
        if number == job["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        job["calls"] = number

    counted(act)
    prune(job["dense"], Path(job["out"]), job["settings"], activations=job["activations"])
    Path(job["out"]).with_suffix(".calls").write_text(str(job["calls"]))


def main():
    """Fork a process for every run of the plans: imports take longer than the runs."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # What a first run imports and prepares, every process would prepare for itself.
        make_model().save_pretrained(Path(folder, "dense"))
        prune(Path(folder, "dense"), Path(folder, "out"), ONE_SHOT)
    for plan in sys.stdin:
        print(json.dumps(carry_out(json.loads(plan))), flush=True)


def carry_out(plan):
    """Carry out the runs of a plan one after the other; their exit codes."""
    ended = []
    for job in plan:
        process = os.fork()
        if process == 0:
            code = 1
            try:
                child(job)
                code = 0
            finally:
                os._exit(code)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    return ended


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "dense"
    make_model(layers=3).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def expected(dense, tmp_path_factory):
    """What runs that nobody disturbs give, by the name of their settings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("expected")
    results = {}
    for name, settings in SETTINGS.items():
        prune(dense, place / name, settings)
        results[name] = result_of(place / name)
    torch.set_num_threads(threads)
    return results


@pytest.fixture(scope="module")
def in_processes():
    """Carry out a plan in processes of their own; returns how they ended."""
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as launcher:

        def run(jobs):
            print(json.dumps(jobs), file=launcher.stdin, flush=True)
            return json.loads(launcher.stdout.readline())

        yield run
        launcher.stdin.close()
        assert launcher.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("name", "activations", "points"),
    [("one-shot", "disk", 6), ("rounds", "auto", 8), ("sums", "disk", 6)],
)
def test_a_kill_at_any_change_of_the_disk_costs_no_bit(
    dense, expected, in_processes, tmp_path, name, activations, points
):
    job = {"dense": str(dense), "settings": SETTINGS[name], "activations": activations}
    first = tmp_path / "undisturbed"
    assert in_processes([{**job, "out": str(first), "kill": 0}]) == [0]
    assert_same(result_of(first), expected[name])
    calls = int(first.with_suffix(".calls").read_text())
    # One at a random place of every stretch, the last stretch short: there shards get their names.
    draw = random.Random(5)
    edges = [1 + calls * step // points for step in range(points + 1)]
    kills = [draw.randrange(*pair) for pair in zip(edges, edges[1:], strict=False)]
    kills += [calls, calls - 1]
    jobs = []
    for kill in kills:
        out = str(tmp_path / f"killed-{kill}")
        jobs += [{**job, "out": out, "kill": kill}, {**job, "out": out, "kill": 0}]
    ended = in_processes(jobs)
    for kill, stopped, resumed in zip(kills, ended[::2], ended[1::2], strict=True):
        out = tmp_path / f"killed-{kill}"
        assert stopped == -signal.SIGKILL
        if resumed:  # it was killed when the output had its name already
            assert kill >= calls - 10
        assert_same(result_of(out), expected[name], f"killed at call {kill} of {calls}")


@pytest.mark.parametrize("name", ["one-shot", "rounds"])
def test_kills_one_after_the_other_cost_no_bit(dense, expected, in_processes, tmp_path, name):
    """The same run again and again, each time killed a little later than it needs for a block."""
    job = {"dense": str(dense), "settings": SETTINGS[name], "activations": "auto"}
    draw = random.Random(11)
    jobs = [{**job, "out": str(tmp_path / "out"), "kill": draw.randint(25, 60)} for _ in range(5)]
    jobs.append({**job, "out": str(tmp_path / "out"), "kill": 0})
    ended = in_processes(jobs)
    assert ended == [-signal.SIGKILL] * 5 + [0]
    assert_same(result_of(tmp_path / "out"), expected[name])
    assert not [name for name in names_beside(tmp_path / "out") if name.startswith(".")]


def test_kills_from_outside_at_random_times_cost_no_bit(dense, expected, tmp_path):
    out = tmp_path / "out"
    plan = tmp_path / "plan.json"
    jobs = [
        {"dense": str(dense), "settings": ROUNDS, "activations": "auto", "kill": 0, "out": str(out)}
    ]
    plan.write_text(json.dumps(jobs))
    state = tmp_path / ".out.state" / "state.json"
    draw = random.Random(3)
    for _ in range(2):
        former = state.read_bytes() if state.exists() else None
        with plan.open() as given:
            process = subprocess.Popen(
                [sys.executable, __file__],
                start_new_session=True,
                stdin=given,
                stdout=subprocess.PIPE,
            )
        # Until it has come a block further, and then a moment.
        end = time.monotonic() + 60
        while (
            process.poll() is None
            and time.monotonic() < end
            and not (state.exists() and state.read_bytes() != former)
        ):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if out.exists():
            break
        assert state.is_file()
        assert names_beside(out) == [".out.partial", ".out.state", "plan.json"]
    if not out.exists():
        prune(dense, out, ROUNDS)
    assert_same(result_of(out), expected["rounds"])


class Interrupted(Exception):
    """Raised by an observer in place of a kill."""


def stop_at(number):
    """An observer that ends a run at a message."""
    seen = []

    def observe(message):
        seen.append((message.round, message.block))
        if len(seen) == number:
            raise Interrupted

    observe.seen = seen
    return observe


@pytest.mark.parametrize(
    ("name", "place"), [("one-shot", "host"), ("rounds", "disk"), ("sums", "disk")]
)
def test_an_interruption_at_every_message_costs_no_bit(
    dense, expected, tmp_path, monkeypatch, name, place
):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    whole = stop_at(0)
    prune(dense, tmp_path / "whole", SETTINGS[name], observe=whole)
    for number in range(1, len(whole.seen) + 1):
        out = tmp_path / f"stopped-{number}"
        with pytest.raises(Interrupted):
            prune(dense, out, SETTINGS[name], activations=place, observe=stop_at(number))
        assert not out.exists()
        again = stop_at(0)
        prune(dense, out, SETTINGS[name], activations="host", observe=again)
        begun = whole.seen[number - 1]
        # Of two blocks that are exchanged together both are done again.
        block = (begun[0], begun[1] // 2 * 2) if name == "sums" else begun
        assert again.seen == whole.seen[whole.seen.index(block) :], "a finished block was redone"
        assert_same(result_of(out), expected[name])
    assert not [name for name in names_beside(out) if name.startswith(".")]


def test_an_interruption_within_the_last_blocks_that_are_exchanged_together_costs_no_bit(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    dense = tmp_path / "dense"
    make_model(layers=5).save_pretrained(dense, max_shard_size="20KB")
    settings = {"sparsity": 0.5, "schedule": "synchronous", "synchronize_every": 3}
    whole = stop_at(0)
    prune(dense, tmp_path / "whole", settings, observe=whole)
    wanted = result_of(tmp_path / "whole")
    for number in range(6, len(whole.seen) + 1):
        out = tmp_path / f"stopped-{number}"
        with pytest.raises(Interrupted):
            prune(dense, out, settings, activations="disk", observe=stop_at(number))
        prune(dense, out, settings, activations="host")
        assert_same(result_of(out), wanted)


def test_hidden_states_take_three_files_at_most_where_clients_go_back(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    model = tmp_path / "model"
    make_model(layers=6).save_pretrained(model, max_shard_size="20KB")
    settings = {"sparsity": 0.5, "schedule": "synchronous", "synchronize_every": 5}
    most = []

    def count(message):
        files = [p.name for p in (tmp_path / ".out.state").glob("hidden-000-*")]
        most.append(len(files))

    prune(model, tmp_path / "out", settings, activations="disk", observe=count)
    assert 1 < max(most) <= 3


def test_an_interruption_in_every_call_ends_in_the_same_bytes(
    dense, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    out, stops = tmp_path / "out", 0
    draw = random.Random(2)
    while not out.exists():
        observe = stop_at(draw.randint(1, 5))
        try:
            prune(dense, out, MASKS, observe=observe)
        except Interrupted:
            stops += 1
        assert stops < 20
    assert stops >= 3
    assert_same(result_of(out), expected["masks"])


def full(*arguments, **named):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_at_the_start_leaves_nothing(dense, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(RuntimeError, match=r"no space left .* nothing was written to .*out"):
            prune(dense, tmp_path / "out", ONE_SHOT)
    assert names_beside(tmp_path / "out") == []
    prune(dense, tmp_path / "out", ONE_SHOT)
    assert_same(result_of(tmp_path / "out"), expected["one-shot"])


def test_too_little_space_is_told_before_any_work(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("fedspa.output.shutil.disk_usage", lambda path: type("", (), {"free": 9}))
    with pytest.raises(RuntimeError, match=r"needs .* MB .* free some space"):
        prune(dense, tmp_path / "out", ONE_SHOT, activations="host")
    assert names_beside(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["one-shot", "rounds"])
@pytest.mark.parametrize("part", ["block", "journal", "hidden", "commit", "finish", "masks"])
def test_a_disk_that_fills_up_is_told_and_the_run_goes_on_later(
    dense, expected, tmp_path, monkeypatch, part, name
):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    owner, attribute, late = {
        "block": (federation.OutputShards, "_write", 3),
        "journal": (journal, "save_file", 2),
        "hidden": (generations, "write_range", 6),
        "commit": (federation, "commit", 2),
        "finish": (federation, "copy_rest", 1),
        "masks": (federation, "merge", 1),
    }[part]
    real, calls = getattr(owner, attribute), []

    def fills_up(*arguments, **named):
        calls.append(arguments)
        return (full if len(calls) >= late else real)(*arguments, **named)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(owner, attribute, fills_up)
        with pytest.raises(RuntimeError, match="no space left on the disk of") as raised:
            prune(dense, out, SETTINGS[name])
    assert not out.exists()
    committed = (tmp_path / ".out.state" / "state.json").is_file()
    assert ("it goes on after the last finished block" in str(raised.value)) is committed
    assert committed or names_beside(out) == []
    prune(dense, out, SETTINGS[name])
    assert_same(result_of(out), expected[name])
    assert names_beside(out) == ["out"]


@pytest.fixture
def interrupted(dense, tmp_path):
    """An output of which the first block is finished."""
    with pytest.raises(Interrupted):
        prune(dense, tmp_path / "out", ONE_SHOT, observe=stop_at(3))
    assert names_beside(tmp_path / "out") == [".out.partial", ".out.state"]
    return tmp_path / "out"


def another_weight(dense, tmp_path):
    """The same checkpoint but for one value."""
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in dense.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    file = sorted(changed.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[-1] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    return changed


def other_tokens():
    clients = make_clients(2)
    clients[1].tokens[0, 0] = (clients[1].tokens[0, 0] + 1) % 90
    return clients


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("weight", "model content"),
        ("dtype", "model dtype was 'torch.float32' and is 'torch.bfloat16'"),
        ("settings", "settings sparsity was 0.5 and is 0.6"),
        ("tokens", "client 'c1' tokens"),
        ("client", "client 'c2' is there and was not"),
        ("batch", "client 'c0' batch"),
    ],
)
def test_another_run_is_refused_and_the_first_can_go_on(
    dense, expected, interrupted, tmp_path, change, named
):
    model, settings, given = dense, ONE_SHOT, {}
    if change == "weight":
        model = another_weight(dense, tmp_path)
    elif change == "dtype":
        given["dtype"] = "bfloat16"
    elif change == "settings":
        settings = {"sparsity": 0.6}
    elif change == "batch":
        settings = {**ONE_SHOT, "batch_size": 1}
    else:
        given["clients"] = other_tokens() if change == "tokens" else make_clients(3)
    with pytest.raises(ValueError, match=named):
        prune(model, interrupted, settings, **given)
    assert not interrupted.exists()
    prune(dense, interrupted, ONE_SHOT)
    assert_same(result_of(interrupted), expected["one-shot"])


def test_restart_forgets_the_interrupted_run(dense, interrupted, tmp_path):
    settings = {"sparsity": 0.6}
    observe = stop_at(0)
    prune(dense, interrupted, settings, restart=True, observe=observe)
    assert observe.seen[0] == (0, 0)
    prune(dense, tmp_path / "fresh", settings)
    assert_same(result_of(interrupted), result_of(tmp_path / "fresh"))
    assert names_beside(interrupted) == ["fresh", "out"]


def test_a_state_whose_output_is_gone_is_forgotten(dense, expected, interrupted):
    partial = interrupted.with_name(".out.partial")
    for file in partial.iterdir():
        file.unlink()
    partial.rmdir()
    prune(dense, interrupted, ONE_SHOT)
    assert_same(result_of(interrupted), expected["one-shot"])


@pytest.mark.parametrize("content", ["{", '{"format_version": 0}', '{"format_version": 1}'])
def test_a_damaged_state_says_how_to_start_over(dense, expected, interrupted, content):
    state = interrupted.with_name(".out.state") / "state.json"
    state.write_text(content)
    with pytest.raises(ValueError, match="--restart"):
        prune(dense, interrupted, ONE_SHOT)
    prune(dense, interrupted, ONE_SHOT, restart=True)
    assert_same(result_of(interrupted), expected["one-shot"])


def test_damaged_hidden_states_are_refused(dense, interrupted):
    state = interrupted.with_name(".out.state")
    hidden = next(path for path in state.iterdir() if path.name.startswith("hidden-"))
    content = bytearray(hidden.read_bytes())
    content[5] ^= 1
    hidden.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"damaged .* --restart"):
        prune(dense, interrupted, ONE_SHOT)
    assert not interrupted.exists()


def test_one_process_at_a_time_builds_an_output(dense, expected, interrupted):
    with (interrupted.with_name(".out.state") / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is building"):
            prune(dense, interrupted, ONE_SHOT)
        with pytest.raises(RuntimeError, match="another process is building"):
            prune(dense, interrupted, ONE_SHOT, restart=True)
    prune(dense, interrupted, ONE_SHOT)
    assert_same(result_of(interrupted), expected["one-shot"])


def test_the_models_own_folder_is_no_output(dense):
    before = {path.name: path.read_bytes() for path in dense.iterdir()}
    with pytest.raises(ValueError, match="the folder of the model itself"):
        prune(dense, dense, ONE_SHOT)
    assert {path.name: path.read_bytes() for path in dense.iterdir()} == before
    assert names_beside(dense) == ["dense"]


def test_an_empty_output_folder_is_as_good_as_none(dense, expected, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(Interrupted):
        prune(dense, tmp_path / "out", ONE_SHOT, observe=stop_at(3))
    assert not list((tmp_path / "out").iterdir())
    observe = stop_at(0)
    prune(dense, tmp_path / "out", ONE_SHOT, observe=observe)
    assert observe.seen[0] == (0, 1), "the finished block was not lost"
    assert_same(result_of(tmp_path / "out"), expected["one-shot"])
    assert names_beside(tmp_path / "out") == ["out"]


def test_no_shard_stays_open_behind_an_interruption(dense, tmp_path):
    def opened():
        return sorted(
            target
            for entry in Path("/proc/self/fd").iterdir()
            if entry.exists() and str(tmp_path / ".out.partial") in (target := os.readlink(entry))
        )

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("there is no /proc here")
    with pytest.raises(Interrupted):
        prune(dense, tmp_path / "out", ONE_SHOT, observe=stop_at(3))
    assert opened() == []


if __name__ == "__main__":
    main()
