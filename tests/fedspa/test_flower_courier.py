"""Who is waited for, asked again or left alone while a run's messages are on their way."""

import os
import time

import pytest
import torch
from hostile_clients import KINDS, changed, of_c1, one_hostile
from nearby_grid import NearbyGrid, make_federation, serve
from test_flower_run import in_process, same_files

from fedspa.flower import courier, site, windows
from fedspa.flower.letters import FINISH, HELLO, WORK
from fedspa.wire import encode


@pytest.fixture(autouse=True)
def asked_again_at_once(monkeypatch):
    monkeypatch.setattr(courier, "AGAIN", 0.1)
    monkeypatch.setattr(courier, "CENSUS", 0.1)


def test_a_client_that_cannot_be_done_without_is_asked_again(tmp_path, monkeypatch):
    nodes, config = make_federation(tmp_path, sparsity=0.5)
    near = in_process(tmp_path, nodes, config)
    damaged = []

    def once(message, envelope):
        if not damaged:
            damaged.append(message.block)
            return KINDS["NaN"](message, envelope)
        return encode(message, envelope)

    one_hostile(monkeypatch, once)
    grid = NearbyGrid(nodes, config)
    report = serve(grid)
    assert grid.sent.count(("c1", WORK)) == 2 and report.blocks == near.blocks
    same_files(tmp_path / "near", tmp_path / "out")


def test_a_client_that_is_never_of_use_is_not_asked_for_ever(tmp_path, monkeypatch):
    # If it were, or if its deadline were waited for, this would take half an hour.
    nodes, config = make_federation(tmp_path, sparsity=0.5, deadline=1800.0)
    one_hostile(monkeypatch, KINDS["NaN"])
    grid = NearbyGrid(nodes, config)
    with pytest.raises(RuntimeError, match="2 of 3 clients answered.*NaN"):
        serve(grid)
    assert grid.sent.count(("c1", WORK)) == 1 + courier.MOST_USELESS


def test_a_refusal_that_is_final_is_not_waited_for(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, deadline=1800.0)
    refuse = of_c1(lambda reply: changed(reply, {"code": "refused"}))
    with pytest.raises(RuntimeError, match="2 of 3 clients answered.*do not fit"):
        serve(NearbyGrid(nodes, config, refuse))


class Late(NearbyGrid):
    """c1's first answer to a task arrives once c0 has its second task."""

    held = None

    def _push(self, message):
        message_id = super()._push(message)
        count = self.sent.count(self.owners[message_id])
        if self.owners[message_id] == ("c1", WORK) and count == 1:
            self.held = message_id, self._replies.pop(message_id)
        elif self.owners[message_id] == ("c1", WORK) and count == 2:
            early = self.sent.count(("c0", WORK)) < 2 or self.held[0] in self._replies
            assert not early, "it was sent what it could not begin yet"
        elif self.owners[message_id] == ("c0", WORK) and count == 2:
            self._replies[self.held[0]] = self.held[1]
        return message_id


def test_a_client_that_was_late_once_takes_part_again(tmp_path):
    nodes, config = make_federation(
        tmp_path, sparsity=0.5, schedule="synchronous", min_clients=2, deadline=0.5
    )
    grid = Late(nodes, config | {"patience": 60.0})
    report = serve(grid)
    assert "no answer within 0.5 s" in report.blocks[0].left_out["c1"]
    assert [sorted(block.clients) for block in report.blocks[1:]] == [["c0", "c1", "c2"]] * 2
    assert grid.sent.count(("c1", WORK)) == 3


def test_an_answer_that_comes_twice_is_taken_once(tmp_path):
    # At the end every client is sent the agreed blocks, in several letters. As it has the first of
    # them c1 is at another node too, and answers at both.
    nodes, config = make_federation(tmp_path, sparsity=0.5, layers=4, message_mib=0.005)
    config |= {"blocks-per-message": 4}
    near = in_process(tmp_path, nodes, config)

    class Twice(NearbyGrid):
        moved = False

        def _push(self, message):
            message_id = super()._push(message)
            count = self.sent.count(("c1", WORK))
            if self.owners[message_id] == ("c1", WORK) and count == 2:
                self.moved = True
                self.first = message_id, self._replies.pop(message_id)
                self.nodes[77] = self.nodes[12]
            elif self.owners[message_id] == ("c1", WORK) and count == 3:
                self._replies[self.first[0]], self.first = self.first[1], None
            return message_id

    grid = Twice(nodes, config)
    report = serve(grid)
    assert report.blocks == near.blocks and grid.moved and grid.first is None
    assert grid.sent.count(("c1", WORK)) > 4
    same_files(tmp_path / "near", tmp_path / "out1")


def test_what_a_client_said_when_it_joined_holds(tmp_path):
    # Killed behind the first block; then c1 wants a copy of the result.
    nodes, config = make_federation(tmp_path, sparsity=0.5, schedule="synchronous", layers=2)
    for node in nodes.values():
        del node["out"]
    near = in_process(tmp_path, nodes, config)

    class Killed(BaseException):
        pass

    def kill(name, kind, reply):
        if [kind for _, kind in grid.sent].count(WORK) > 3:
            raise Killed
        return reply

    grid = NearbyGrid(nodes, config, kill)
    with pytest.raises(Killed):
        serve(grid)
    nodes[12] = nodes[12] | {"out": str(tmp_path / "late")}
    report = serve(NearbyGrid(nodes, config))
    assert report.layers == near.layers and report.blocks == near.blocks
    same_files(tmp_path / "near", tmp_path / "out")
    assert not (tmp_path / "late").exists()


def test_a_node_that_comes_back_while_others_join_is_asked_again(tmp_path):
    # A clinic notices that it gave the wrong text, and starts its node again with another.
    nodes, config = make_federation(tmp_path, sparsity=0.5)
    right = nodes[11]
    wrong = right | {"text": nodes[12]["text"]}

    class Restarted(NearbyGrid):
        censuses = 0

        def get_node_ids(self):
            self.censuses += 1
            here = {12: nodes[12], 13: nodes[13], 11: right}
            if self.censuses < 4:
                here = {11: wrong}
            elif self.censuses < 8:
                here = {12: nodes[12]}
            self.nodes = here
            return list(here)

    grid = Restarted(nodes, config)
    serve(grid)
    assert grid.sent.count(("c0", HELLO)) == 2
    in_process(tmp_path, nodes, config)
    same_files(tmp_path / "near", tmp_path / "out")


def test_damaged_windows_are_drawn_again(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, schedule="synchronous")
    near = in_process(tmp_path, nodes, config)

    def damage(name, kind, reply):
        if (name, kind) == ("c1", HELLO) and grid.sent.count((name, kind)) == 1:
            (path,) = (tmp_path / "work1").glob(f"{windows.WINDOWS}-*")
            path.write_bytes(path.read_bytes()[:50])
        return reply

    grid = NearbyGrid(nodes, config, damage)
    report = serve(grid)
    assert grid.sent.count(("c1", HELLO)) == 2 and report.blocks == near.blocks
    same_files(tmp_path / "near", tmp_path / "out")


def test_windows_of_a_run_that_broke_off_are_removed_once_they_are_old(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    windows.write(work, torch.zeros(2, 4, dtype=torch.int64), "0" * 64, "model")
    windows.write(work, torch.ones(2, 4, dtype=torch.int64), "1" * 64, "model")
    (work / "run-0").mkdir()
    long_ago = time.time() - (site.OLD + 1) * 86_400
    for path in work.iterdir():
        os.utime(path, (long_ago, long_ago))
    tokens, model = windows.read(work, "1" * 64)
    assert tokens.tolist() == [[1] * 4] * 2 and model == "model"
    site.remove_old_runs(work)
    assert [path.name for path in work.iterdir()] == [f"{windows.WINDOWS}-{'1' * 16}.safetensors"]


def test_a_run_ends_though_a_client_never_hears_of_it(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, layers=1, deadline=0.5)
    for node in nodes.values():
        del node["out"]

    def lose(name, kind, reply):
        return None if (name, kind) == ("c1", FINISH) else reply

    report = serve(NearbyGrid(nodes, config, lose))
    assert sorted(report.blocks[0].clients) == ["c0", "c1", "c2"]
