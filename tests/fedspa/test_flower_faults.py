"""What clients can do wrong, and what becomes of a run that is broken off."""

import re
import shutil

import pytest
from flwr.app import Error, Message
from hostile_clients import KINDS, SENT, first_to, values
from nearby_grid import NearbyGrid, make_federation, serve
from test_flower_run import in_process, same_files

from fedspa.flower import client_work
from fedspa.flower.letters import FINISH, HELLO, WORK, read_letter, write_letter
from fedspa.wire import encode

SECRET = "a patient's name"


def one_hostile(monkeypatch, change, blocks=None):
    """Let client c1 encode its messages otherwise: of every block, or of some."""

    def hostile(message, envelope):
        if message.sender != "c1" or blocks is not None and message.block not in blocks:
            return encode(message, envelope)
        return change(message, envelope)

    monkeypatch.setattr(client_work, "encode", hostile)
    SENT.clear()


def changed(reply, record=None, frames=None):
    """An answer with other fields in its record, or with other frames."""
    found, sent = read_letter(reply.content)
    content = write_letter(found | (record or {}), sent if frames is None else frames)
    other = Message.__new__(Message)
    other.__dict__.update(reply.__dict__ | {"_content": content})
    return other


def of_c1(change):
    """Let what client c1 answers to a task be something else."""
    return lambda name, kind, reply: change(reply) if (name, kind) == ("c1", WORK) else reply


def without_c1(folder, nodes, config):
    """The same federation of the other clients, in one process."""
    return in_process(
        folder, {n: node for n, node in nodes.items() if node["name"] != "c1"}, config
    )


REFUSALS = {
    "NaN": "not finite|NaN",
    "infinity": "not finite|infinite",
    "absurd weights": "norm",
    "wrong shape": "shape|rows",
    "not pruned": "pruned",
    "another sender": "sender",
    "another round": "round",
    "another run": "another run",
    "another model": "model",
    "replay": "task|block",
    "truncated": "cut",
    "damaged": "damaged",
    "noise": "begin with",
    "nothing": "0 bytes",
    "far too much": "at most",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_client_is_left_out_and_the_rest_goes_on(tmp_path, monkeypatch, kind):
    nodes, config = make_federation(tmp_path, sparsity=0.5, min_clients=2, layers=2)
    config |= {"blocks-per-message": 1}
    del nodes[12]["out"]
    one_hostile(monkeypatch, KINDS[kind])
    report = serve(NearbyGrid(nodes, config))
    # What it sends first is no replay yet.
    bad = [block for block in report.blocks if kind != "replay" or block.block > 0]
    for block in bad:
        assert set(block.clients) == {"c0", "c2"}
        assert list(block.left_out) == ["c1"]
        assert re.search(REFUSALS[kind], block.left_out["c1"]), block.left_out
    monkeypatch.undo()
    if kind == "replay":
        return
    near = without_c1(tmp_path, nodes, config)
    same_files(tmp_path / "near", tmp_path / "out")
    assert report.layers == near.layers


@pytest.mark.parametrize(
    ("change", "match"),
    {
        "NaN": (lambda m, e: encode(values(m, first_to(float("nan"))), e), "NaN"),
        "negative squares": (lambda m, e: encode(values(m, first_to(-1.0)), e), "square|allow"),
        "absurd": (lambda m, e: encode(values(m, lambda n: n * 1e4), e), "mean square"),
    }.values(),
)
def test_bad_statistics_are_left_out(tmp_path, monkeypatch, change, match):
    nodes, config = make_federation(
        tmp_path, clients=4, sparsity=0.5, min_clients=2, layers=1, aggregation="statistics"
    )
    one_hostile(monkeypatch, change)
    report = serve(NearbyGrid(nodes, config))
    assert report.blocks[0].clients and "c1" not in report.blocks[0].clients
    assert re.search(match, report.blocks[0].left_out["c1"]), report.blocks[0].left_out
    monkeypatch.undo()
    without_c1(tmp_path, nodes, config)
    same_files(tmp_path / "near", tmp_path / "out")


def test_only_the_block_that_is_bad_is_left_out(tmp_path, monkeypatch):
    nodes, config = make_federation(tmp_path, sparsity=0.5, min_clients=2)
    one_hostile(monkeypatch, KINDS["NaN"], blocks=(1,))
    report = serve(NearbyGrid(nodes, config))
    assert [sorted(block.left_out) for block in report.blocks] == [[], ["c1"], []]
    assert [len(block.clients) for block in report.blocks] == [3, 2, 3]


ANSWERS = {
    "another nonce": (lambda reply: changed(reply, {"nonce": "0"}), "another task"),
    "an unknown code": (lambda reply: changed(reply, {"code": SECRET}), "failed"),
    "lacks what it never had to have": (
        lambda reply: changed(reply, {"code": "lacks", "lacks": [5]}),
        "lacks blocks",
    ),
    "a list of something else": (lambda reply: changed(reply, {"lacks": "all"}), "list"),
    "frames of other blocks": (lambda reply: changed(reply, frames={"17": b"x"}), "asked for"),
    "no frames": (lambda reply: changed(reply, frames={}), "no frame"),
    "a crash": (lambda reply: Message(Error(2, SECRET), reply_to=reply), "crashed"),
    "nothing": (lambda reply: None, "no answer within"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_bad_answer_leaves_its_client_out(tmp_path, kind, caplog):
    change, match = ANSWERS[kind]
    nodes, config = make_federation(tmp_path, sparsity=0.5, min_clients=2, layers=2)
    config |= {"deadline": 3.0}
    grid = NearbyGrid(nodes, config, of_c1(change))
    report = serve(grid)
    for block in report.blocks:
        assert set(block.clients) == {"c0", "c2"}
        assert re.search(match, block.left_out["c1"]), block.left_out
    server_log = [r for r in caplog.records if r.module not in ("client_app", "client_work")]
    assert not any(SECRET in record.getMessage() for record in server_log)
    assert SECRET not in report.to_json()
    near = without_c1(tmp_path, nodes, config)
    same_files(tmp_path / "near", tmp_path / "out")
    assert near.sparsity == report.sparsity


def test_a_clients_own_exception_stays_with_it(tmp_path, monkeypatch, caplog):
    nodes, config = make_federation(tmp_path, sparsity=0.5, min_clients=2, layers=1)

    def fails(message, envelope):
        if message.sender == "c1":
            raise KeyError(SECRET)
        return encode(message, envelope)

    monkeypatch.setattr(client_work, "encode", fails)
    seen = []

    def look(name, kind, reply):
        seen.append(str(reply.content))
        return reply

    report = serve(NearbyGrid(nodes, config, look))
    assert "its own log" in report.blocks[0].left_out["c1"]
    assert SECRET not in report.to_json() and not any(SECRET in text for text in seen)
    assert any(SECRET in (r.exc_text or "") for r in caplog.records if r.module == "client_app")


def test_too_few_answers_stop_the_run_and_it_goes_on_later(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, schedule="synchronous")
    failing = {"left": 2}

    def crash(reply):
        failing["left"] -= 1
        return reply if failing["left"] >= 0 else Message(Error(8, SECRET), reply_to=reply)

    config |= {"deadline": 2.0}
    with pytest.raises(RuntimeError, match="2 of 3 .*min-clients is 3.*'c1'.*again"):
        serve(NearbyGrid(nodes, config, of_c1(crash)))
    assert not (tmp_path / "out").exists()
    report = serve(NearbyGrid(nodes, config))
    near = in_process(tmp_path, nodes, config)
    same_files(tmp_path / "near", tmp_path / "out")
    assert report.layers == near.layers and report.blocks == near.blocks


class Killed(BaseException):
    """The server's process ends."""


@pytest.mark.parametrize("lost", ["nothing", "one client's state", "all clients' state"])
@pytest.mark.parametrize(
    "case",
    [
        dict(schedule="synchronous"),
        dict(blocks_per_message=1),
        dict(schedule="synchronous", synchronize_every=2, rounds=2, layers_per_client=2),
        dict(aggregation="statistics"),
    ],
    ids=["synchronous", "one-shot", "rounds", "statistics"],
)
def test_a_killed_server_goes_on_with_the_same_result(tmp_path, case, lost):
    nodes, config = make_federation(tmp_path, sparsity=0.5, **case)
    near = in_process(tmp_path, nodes, config)
    for after in (5, 9):
        grid = NearbyGrid(nodes, config)
        count = [0]

        def kill(name, kind, reply, count=count, after=after):
            count[0] += 1
            if count[0] > after:
                raise Killed
            return reply

        grid.tamper = kill
        with pytest.raises(Killed):
            serve(grid)
    if lost != "nothing":
        for number in range(1 if lost == "one client's state" else 3):
            shutil.rmtree(tmp_path / f"work{number}")
    report = serve(NearbyGrid(nodes, config))
    same_files(tmp_path / "near", tmp_path / "out")
    if "layers_per_client" not in case:
        same_files(tmp_path / "out", tmp_path / "out0")
    assert report.layers == near.layers and report.blocks == near.blocks


def test_a_client_that_leaves_comes_back_at_another_node(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, schedule="synchronous", layers=4)
    config |= {"min-clients": 2, "deadline": 4.0}
    near = in_process(tmp_path, nodes, config)
    grid = NearbyGrid(nodes, config)
    tasks = [0]

    def leave(name, kind, reply):
        if kind != WORK:
            return reply
        tasks[0] += 1
        if name == "c1" and 12 in grid.nodes:
            del grid.nodes[12]
            return None
        if tasks[0] == 4:
            grid.nodes[99] = nodes[12]
        return reply

    grid.tamper = leave
    report = serve(grid)
    assert list(report.blocks[0].left_out) == ["c1"] and "left" in report.blocks[0].left_out["c1"]
    assert set(report.blocks[-1].clients) == {"c0", "c1", "c2"}
    assert (tmp_path / "out1" / "config.json").is_file()
    assert near.sparsity == report.sparsity


def test_a_client_that_lost_its_place_is_sent_what_it_lacks(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, schedule="synchronous", rounds=2)
    near = in_process(tmp_path, nodes, config)
    grid = NearbyGrid(nodes, config)

    def lose(name, kind, reply):
        if (name, kind) == ("c2", WORK):
            shutil.rmtree(tmp_path / "work2" / "run", ignore_errors=True)
        return reply

    grid.tamper = lose
    report = serve(grid)
    same_files(tmp_path / "near", tmp_path / "out")
    assert report.layers == near.layers
    by_name = {client.name: client.bytes_down for client in report.clients}
    assert by_name["c2"] > by_name["c0"]


def test_a_client_that_hangs_ends_itself(tmp_path):
    # In a process of its own: what ends is the process.
    import subprocess
    import sys

    code = (
        "import time; from fedspa.flower import client_app\n"
        "client_app.GRACE = 0.2\n"
        "with client_app._ended_after(0.3): time.sleep(30)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, text=True)
    assert done.returncode == 1 and "longer than its" in done.stderr + done.stdout


def test_nothing_is_left_at_a_client(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, layers=1)
    grid = NearbyGrid(nodes, config)
    serve(grid)
    assert [kind for _, kind in grid.sent] == [HELLO] * 3 + [WORK] * 3 + [FINISH] * 3
    for number in range(3):
        left = sorted(path.name for path in (tmp_path / f"work{number}").iterdir())
        assert left == ["finished", "lock", "windows.safetensors"]
