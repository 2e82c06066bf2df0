"""What clients send that they should not, and what becomes of it."""

import re
from dataclasses import replace

import pytest
import torch
from flwr.app import Error, Message
from hostile_clients import KINDS, changed, first_to, of_c1, one_hostile, values
from nearby_grid import NearbyGrid, make_federation, serve
from test_flower_run import in_process, same_files

from fedspa.flower import client_work, courier
from fedspa.flower.letters import WORK
from fedspa.messages import pack_layer
from fedspa.triangle import pack_triangle, unpack_triangle
from fedspa.wire import encode

SECRET = "a patient's name"


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
    "another number of windows": "samples",
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


def counted(message, tokens):
    changed = tuple(replace(s, tokens=s.tokens * tokens) for s in message.statistics)
    return replace(message, statistics=changed)


def off_diagonal(numbers):
    matrix = unpack_triangle(numbers, 32)
    matrix[3, 7] = matrix[7, 3] = 10 * matrix.diagonal().max()
    return pack_triangle(matrix)


def split(message):
    first, *rest = message.statistics
    assert len(first.layers) > 1
    each = [replace(first, layers=(name,)) for name in first.layers]
    return replace(message, statistics=(*each, *rest))


@pytest.mark.parametrize(
    ("change", "match"),
    {
        "NaN": (lambda m, e: encode(values(m, first_to(float("nan"))), e), "NaN"),
        "negative squares": (lambda m, e: encode(values(m, first_to(-1.0)), e), "square|allow"),
        "absurd": (lambda m, e: encode(values(m, lambda n: n * 1e4), e), "mean square"),
        "more tokens": (lambda m, e: encode(counted(m, 1000), e), "its windows have 48"),
        "unequal products": (lambda m, e: encode(values(m, off_diagonal), e), "allow|products"),
        "other groups": (lambda m, e: encode(split(m), e), "one statistic for layers"),
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


def test_an_impostor_does_not_take_a_clients_place(tmp_path, caplog, monkeypatch):
    nodes, config = make_federation(tmp_path, sparsity=0.5, schedule="synchronous", layers=4)
    grid = NearbyGrid(nodes, config)
    tasks = []

    def come(name, kind, reply):
        if kind == WORK:
            tasks.append(grid.last)
            # It knows c1's name and text, and not its word.
            grid.nodes[88] = nodes[12] | {"work": str(tmp_path / "elsewhere")}
        return reply

    grid.tamper = come
    monkeypatch.setattr(courier, "CENSUS", 0.0)
    serve(grid)
    assert 88 not in tasks and 12 in tasks
    assert "secret word" in caplog.text


def test_a_hessian_that_is_none_is_found_once_the_sum_fails(tmp_path, monkeypatch):
    nodes, config = make_federation(
        tmp_path, clients=4, sparsity=0.5, min_clients=3, layers=2, aggregation="statistics"
    )

    def indefinite(numbers):
        matrix = unpack_triangle(numbers, 32)
        scale = 5 * matrix.diagonal().clamp(min=1e-6)
        other = -0.99 * (scale[:, None] * scale[None, :]).sqrt()
        other.diagonal().copy_(scale)
        return pack_triangle(other)

    one_hostile(monkeypatch, lambda m, e: encode(values(m, indefinite), e))
    report = serve(NearbyGrid(nodes, config))
    for block in report.blocks:
        assert "positive definite" in block.left_out["c1"] and len(block.clients) == 3
    monkeypatch.undo()
    without_c1(tmp_path, nodes, config)
    same_files(tmp_path / "near", tmp_path / "out")


def test_an_answer_that_flower_cannot_build_leaves_its_client_out(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, min_clients=2, layers=1)
    grid = NearbyGrid(nodes, config)

    class Broken(NearbyGrid):
        def pull_messages(self, message_ids):
            found = super().pull_messages(message_ids)
            if found and self.owners.get(message_ids[0]) == ("c1", WORK):
                raise KeyError(SECRET)
            return found

    grid = Broken(nodes, config)
    report = serve(grid)
    assert list(report.blocks[0].left_out) == ["c1"] and SECRET not in report.to_json()


def test_a_weight_that_a_former_round_pruned_is_not_revived(tmp_path, monkeypatch):
    nodes, config = make_federation(
        tmp_path, sparsity=0.5, min_clients=2, layers=1, rounds=2, ramp="linear"
    )

    def revive(message, envelope):
        if message.round == 0:
            return encode(message, envelope)
        name, layer = next(iter(message.layers.items()))
        mask = layer.mask().roll(1, 1)
        other = pack_layer(torch.full_like(layer.weight(), 0.01), mask, None, False)
        return encode(replace(message, layers=message.layers | {name: other}), envelope)

    one_hostile(monkeypatch, revive)
    report = serve(NearbyGrid(nodes, config))
    first, second = report.blocks
    assert first.left_out == {} and "former round" in second.left_out["c1"]


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_weights_that_are_not_the_models_are_left_out(tmp_path, monkeypatch, pruner):
    # Within the norm of the layer, and yet far from anything that a client would send.
    nodes, config = make_federation(tmp_path, sparsity=0.5, min_clients=2, layers=1, pruner=pruner)

    def spike(numbers):
        numbers[0] = 4 * numbers.float().norm()
        return numbers

    one_hostile(monkeypatch, lambda m, e: encode(values(m, spike), e))
    report = serve(NearbyGrid(nodes, config))
    assert re.search("row 0|not the model's", report.blocks[0].left_out["c1"])
