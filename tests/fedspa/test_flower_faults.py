"""What is lost, late or broken off, and how a run goes on."""

import shutil

import pytest
from flwr.app import Error, Message
from hostile_clients import changed, of_c1
from nearby_grid import NearbyGrid, make_federation, serve
from test_flower_run import in_process, same_files

from fedspa.flower import agreed_blocks, courier
from fedspa.flower.letters import FINISH, HELLO, WORK


def test_too_few_answers_stop_the_run_and_it_goes_on_later(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, schedule="synchronous")
    failing = {"left": 2}

    def crash(reply):
        failing["left"] -= 1
        return reply if failing["left"] >= 0 else Message(Error(8, ""), reply_to=reply)

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


@pytest.mark.parametrize(
    ("case", "lost"),
    [
        (dict(schedule="synchronous"), "nothing"),
        (dict(schedule="synchronous"), "one client's state"),
        (dict(blocks_per_message=1), "nothing"),
        (dict(blocks_per_message=1), "all clients' state"),
        (
            dict(schedule="synchronous", synchronize_every=2, rounds=2, layers_per_client=2),
            "one client's state",
        ),
        (dict(aggregation="statistics"), "all clients' state"),
    ],
    ids=["synchronous", "synchronous, lost", "one-shot", "one-shot, lost", "rounds", "statistics"],
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
            for folder in (tmp_path / "work2").glob("run-*"):
                shutil.rmtree(folder)
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
        assert left == ["finished", "word"]


def test_no_message_is_on_its_way_when_a_run_ends(tmp_path):
    class Slow(NearbyGrid):
        """An answer about the end arrives at the third look for it."""

        looks = 0

        def pull_messages(self, message_ids):
            if any(self.owners[m][1] == FINISH for m in message_ids):
                self.looks += 1
                if self.looks < 3 * len(self.nodes):
                    return []
            return super().pull_messages(message_ids)

    nodes, config = make_federation(tmp_path, sparsity=0.5, layers=1)
    for node in nodes.values():
        del node["out"]
    grid = Slow(nodes, config)
    serve(grid)
    assert [kind for _, kind in grid.sent].count(FINISH) == 3 and not grid._replies


def test_a_client_that_lost_everything_joins_again(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, schedule="synchronous", rounds=2)
    near = in_process(tmp_path, nodes, config)
    grid = NearbyGrid(nodes, config)
    lost = []

    def lose(name, kind, reply):
        if (name, kind) == ("c2", WORK) and not lost:
            lost.append(name)
            shutil.rmtree(tmp_path / "work2")
        return reply

    grid.tamper = lose
    report = serve(grid)
    same_files(tmp_path / "near", tmp_path / "out")
    assert report.layers == near.layers
    assert grid.sent.count(("c2", HELLO)) == 2


def test_files_that_are_damaged_are_had_again(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, schedule="synchronous", layers=4)
    near = in_process(tmp_path, nodes, config)
    grid = NearbyGrid(nodes, config)
    damaged = []

    def damage(name, kind, reply):
        found = [*(tmp_path / "work2").glob("run-*/block-*.weights.safetensors")]
        found += (tmp_path / "work2").glob("run-*/hidden.*")
        if (name, kind) == ("c2", WORK) and len(found) > 1 and not damaged:
            for path in found:
                damaged.append(path)
                path.write_bytes(path.read_bytes()[:-9])
        return reply

    grid.tamper = damage
    report = serve(grid)
    assert damaged
    same_files(tmp_path / "near", tmp_path / "out")
    assert report.layers == near.layers and not any(b.left_out for b in report.blocks)


def test_windows_of_another_run_are_not_taken(tmp_path):
    # A second node with the same work folder and another text, as a careless copy of the first.
    nodes, config = make_federation(tmp_path, sparsity=0.5, schedule="synchronous")
    in_process(tmp_path, nodes, config)
    grid = NearbyGrid(nodes, config)

    def another(name, kind, reply):
        if kind == WORK:
            grid.nodes[77] = nodes[12] | {"text": nodes[13]["text"]}
        return reply

    grid.tamper = another
    serve(grid)
    assert grid.sent.count(("c1", HELLO)) == 2
    same_files(tmp_path / "near", tmp_path / "out")


def test_a_run_goes_on_without_a_client_that_is_gone(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, schedule="synchronous")
    config |= {"min-clients": 2, "join-timeout": 1.0, "deadline": 3.0}
    grid = NearbyGrid(nodes, config)

    def kill(name, kind, reply):
        if len(grid.sent) > 7:
            raise Killed
        return reply

    grid.tamper = kill
    with pytest.raises(Killed):
        serve(grid)
    del nodes[12]
    report = serve(NearbyGrid(nodes, config))
    assert len(report.blocks[0].clients) == 3
    assert set(report.blocks[-1].clients) == {"c0", "c2"}
    assert "not connected" in report.blocks[-1].left_out["c1"]
    with pytest.raises(ValueError, match="not empty"):
        serve(NearbyGrid(nodes, config))


def test_another_number_of_clients_does_not_go_on(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, schedule="synchronous")
    with pytest.raises(RuntimeError):
        refuse_all = of_c1(lambda reply: Message(Error(8, ""), reply_to=reply))
        done = []

        def later(name, kind, reply):
            done.append(name)
            return reply if len(done) < 8 else refuse_all(name, kind, reply)

        serve(NearbyGrid(nodes, config | {"deadline": 1.0}, later))
    with pytest.raises(ValueError, match="the interrupted run has 3 clients, and clients is 2"):
        serve(NearbyGrid(nodes, config | {"clients": 2}))


def test_a_block_waits_for_its_own_clients(tmp_path, monkeypatch):
    # By layer sampling a block may have one client: others' answers do not make up for it.
    monkeypatch.setattr(courier, "AGAIN", 0.1)
    monkeypatch.setattr(courier, "CENSUS", 0.2)
    nodes, config = make_federation(tmp_path, sparsity=0.5, layers_per_client=1, every_block=True)
    config |= {"min-clients": 1, "patience": 20.0}
    near = in_process(tmp_path, nodes, config)
    crashed = []

    def once(reply):
        crashed.append(1)
        return reply if len(crashed) > 1 else Message(Error(8, ""), reply_to=reply)

    report = serve(NearbyGrid(nodes, config, of_c1(once)))
    assert len(crashed) == 2 and report.blocks == near.blocks
    same_files(tmp_path / "near", tmp_path / "out")


def test_a_frame_that_was_not_committed_is_replaced(tmp_path):
    agreed_blocks.write(tmp_path, 3, 0, b"\x8ffedspa\n" + bytes(40))
    agreed_blocks.write(tmp_path, 3, 1, b"\x8ffedspa\n" + bytes(41))
    agreed_blocks.write(tmp_path, 3, 1, b"\x8ffedspa\n" + bytes(42))
    agreed_blocks.write(tmp_path, 3, 4, b"\x8ffedspa\n" + bytes(43))
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == {
        "agreed-00003.round-1.frame": 50,
        "agreed-00003.round-4.frame": 51,
    }


def test_a_client_does_no_more_than_its_capacity(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, min_clients=2, layers=3)
    nodes[12] |= {"capacity": 0.4}

    def boast(name, kind, reply):
        return changed(reply, {"capacity": 1.0}) if (name, kind) == ("c1", HELLO) else reply

    report = serve(NearbyGrid(nodes, config, boast))
    assert all(list(block.left_out) == ["c1"] for block in report.blocks)
