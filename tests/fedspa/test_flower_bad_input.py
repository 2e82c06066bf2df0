"""What cannot be is said in one sentence, on the side that can mend it, before any work."""

import re

import pytest
from flwr.app import Context, RecordDict
from hostile_clients import changed
from nearby_grid import NearbyGrid, make_federation, serve
from small_models import make_model

from fedspa.flower import server_app
from fedspa.flower.letters import HELLO


def logged(caplog, module):
    return [r.getMessage() for r in caplog.records if r.module == module and r.levelno >= 30]


@pytest.mark.parametrize(
    ("change", "mine", "theirs"),
    {
        "no text": ({"text": "gone.txt"}, "gone.txt", "log explains"),
        "short text": ({"seqlen": 64, "text": "short.txt"}, "less than one window", "log explains"),
        "no such model": ({"model": "./nowhere"}, "nowhere", "log explains"),
        "another model": ({"model": "other"}, "content hash .* and the server's", "model differs"),
        "an unknown key": ({"txt": "a"}, "unknown key 'txt'; did you mean 'text'", "log explains"),
        "a taken output": ({"out": "model"}, "folder of the model itself", "log explains"),
        "no capacity": ({"capacity": 0.0}, "capacity", "log explains"),
    }.values(),
)
def test_a_client_that_cannot_take_part_says_why_in_its_own_log(
    tmp_path, caplog, change, mine, theirs
):
    nodes, config = make_federation(tmp_path, sparsity=0.5, layers=1, join_timeout=0.6)
    other = make_model(layers=1)
    other.lm_head.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "short.txt").write_text("word1 word2")
    paths = {k: str(tmp_path / v) for k, v in change.items() if k in ("model", "out", "text")}
    nodes[12] |= change | paths
    with pytest.raises(RuntimeError, match="2 of 3 clients joined within 0.6 s") as failed:
        serve(NearbyGrid(nodes, config))
    (said,) = logged(caplog, "client_app")
    assert re.search(mine, said) and "\n" not in said
    assert theirs in str(failed.value) and "\n" not in str(failed.value)
    assert not list(tmp_path.glob(".out*")) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    {
        "partition": ({"partition-id": 0}, "both have partition-id 0; give each node another"),
        "name": ({"name": "c0"}, "both named 'c0'; give each another name"),
    }.values(),
)
def test_two_nodes_must_not_be_one_client(tmp_path, change, match):
    nodes, config = make_federation(tmp_path, sparsity=0.5, layers=1)
    nodes[12] |= change
    with pytest.raises(ValueError, match=match):
        serve(NearbyGrid(nodes, config))


@pytest.mark.parametrize(
    ("change", "match"),
    {
        "key": ({"sparsty": 0.5}, "unknown key 'sparsty'; did you mean 'sparsity'"),
        "target": ({"pattern": "2:4"}, "exactly one of sparsity and pattern"),
        "model": ({"model": "./nowhere"}, "nowhere"),
        "output": ({"out": "model"}, "model itself|not empty"),
        "clients": ({"min-clients": 9}, "min-clients 9 is more than the 3 clients"),
    }.values(),
)
def test_the_server_says_what_is_wrong_before_it_waits(tmp_path, change, match, caplog):
    nodes, config = make_federation(tmp_path, sparsity=0.5, layers=1)
    config |= change
    if change.get("out"):
        config["out"] = str(tmp_path / change["out"])
    grid = NearbyGrid(nodes, config)
    with pytest.raises((ValueError, RuntimeError), match=match):
        server_app.main(grid, Context(1, 1, {}, RecordDict(), config))
    (said,) = logged(caplog, "server_app")
    assert said.startswith("fedspa: ") and "\n" not in said and grid.sent == []


def test_nobody_is_there(tmp_path):
    nodes, config = make_federation(tmp_path, sparsity=0.5, layers=1, join_timeout=0.5)
    with pytest.raises(RuntimeError, match=r"0 of 3 clients joined within 0.5 s \(none\); start"):
        serve(NearbyGrid({}, config))


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "a\nb"},
        {"name": "a" * 101},
        {"samples": 0},
        {"samples": 13},
        {"capacity": 10**400},
        {"sparsity": 10**400},
        {"sparsity": 1},
        {"sparsity": False},
        {"digest": "z" * 64},
        {"word": "short"},
        {"model": "00" * 32},
        {"samples": 2.5},
        {"samples": True},
        {"seqlen": 2**60},
        {"capacity": 1.5},
        {"capacity": 1e308},
        {"sparsity": -1},
        {"digest": "short"},
        {"partition": -1},
        {"wants": 1},
        {"code": "x" * 100_000},
    ],
    ids=lambda change: str(change)[:30],
)
def test_an_introduction_is_not_believed(tmp_path, change):
    nodes, config = make_federation(tmp_path, sparsity=0.5, layers=1, join_timeout=0.6)

    def lie(name, kind, reply):
        return changed(reply, change) if name == "c1" else reply

    with pytest.raises(RuntimeError, match="2 of 3 clients joined") as failed:
        serve(NearbyGrid(nodes, config, lie))
    assert len(str(failed.value)) < 600


def test_a_clients_name_is_printed_as_it_is(tmp_path, capsys):
    nodes, config = make_federation(tmp_path, sparsity=0.5, layers=1, min_clients=2)

    def rename(name, kind, reply):
        return changed(reply, {"name": "[/x]"}) if (name, kind) == ("c1", HELLO) else reply

    # A name that closes what nobody opened is bad markup, which would end the run in an error.
    server_app.main(NearbyGrid(nodes, config, rename), Context(1, 1, {}, RecordDict(), config))
    printed = capsys.readouterr().out
    assert "without '[/x]'" in printed and f"the pruned model is in {config['out']}\n" in printed
