"""What a client over Flower is told by its node-config, and by the run where that is silent."""

import re
from pathlib import Path

import pytest

from fedspa.flower.node_config import Node, read_node_config
from fedspa.flower.run_config import read_run_config

NODE = {
    "partition-id": 2,
    "num-partitions": 3,
    "name": "Klinik Süd",
    "text": "notes.txt",
    "model": "copy",
    "device": "cuda:1",
    "capacity": 0.5,
    "sparsity": 0.7,
    "samples": 8,
    "seqlen": 32,
    "work": "state",
    "out": "mine",
}


def network(**changed):
    given = {"model": "llama", "out": "pruned", "clients": 3, "sparsity": 0.6}
    return read_run_config(given | changed)[1]


def test_a_node_says_who_it_is_and_what_it_can():
    assert read_node_config(NODE, network()) == Node(
        partition=2,
        partitions=3,
        name="Klinik Süd",
        text="notes.txt",
        model="copy",
        device="cuda:1",
        capacity=0.5,
        sparsity=0.7,
        samples=8,
        seqlen=32,
        work=Path("state"),
        out=Path("mine"),
    )


def test_where_a_node_is_silent_the_run_speaks(monkeypatch, tmp_path):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    run = network(device="cuda", samples=4, seqlen=16)
    assert read_node_config({"partition-id": 1, "text": "c4"}, run) == Node(
        partition=1,
        partitions=None,
        name="client 2",
        text="c4",
        model="llama",
        device="cuda",
        capacity=1.0,
        sparsity=None,
        samples=4,
        seqlen=16,
        work=tmp_path / "fedspa" / "client 2",
        out=None,
    )


def test_without_a_home_of_its_own_flower_keeps_its_files_in_that_of_the_user(monkeypatch):
    monkeypatch.delenv("FLWR_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    work = read_node_config(NODE | {"work": ""}, network()).work
    assert work == Path("/home/ada/.flwr/fedspa/Klinik Süd")


def test_a_simulated_node_has_the_text_of_its_partition():
    run = network(texts="a;b;c")
    texts = [
        read_node_config({"partition-id": place, "num-partitions": 3}, run).text
        for place in range(3)
    ]
    assert texts == ["a", "b", "c"]
    assert read_node_config({"partition-id": 0, "text": "own"}, run).text == "own"
    with pytest.raises(ValueError, match="node-config has no text"):
        read_node_config({"partition-id": 3, "num-partitions": 4}, run)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"partition-id": ""}, "node-config has no partition-id; give it as in --node-config"),
        ({"text": ""}, "node-config has no text; give it as in --node-config 'partition-id=0"),
        ({"partition-id": 3}, "there is no partition-id 3 of num-partitions 3"),
        ({"partition-id": -1}, "there is no partition-id -1 of num-partitions 3"),
        ({"num-partitions": "", "partition-id": -1}, "there is no partition-id -1; partitions"),
        ({"partition-id": "0"}, "node-config: partition-id is '0'; give a whole number"),
        ({"partition-id": True}, "node-config: partition-id is True; give a whole number"),
        ({"partition": 0}, "unknown key 'partition'; did you mean 'partition-id'?"),
        ({"txt": "a.txt"}, "node-config has the unknown key 'txt'; did you mean 'text'?"),
        ({"capacity": 0}, "node-config: capacity 0.0 is outside (0, 1]"),
        ({"capacity": 1.5}, "node-config: capacity 1.5 is outside (0, 1]"),
        ({"capacity": float("nan")}, "node-config: capacity nan is outside (0, 1]"),
        ({"capacity": "half"}, "node-config: capacity is 'half'; give a number"),
        ({"sparsity": 1}, "node-config: sparsity 1.0 is outside [0, 1)"),
        ({"samples": 0}, "node-config: samples must be at least 1, not 0"),
        ({"seqlen": 0}, "node-config: seqlen must be at least 1, not 0"),
        ({"samples": 2.5}, "node-config: samples is 2.5; give a whole number"),
        ({"name": "a/b"}, "name 'a/b' must also do for a folder"),
        ({"name": ".."}, "name '..' must also do for a folder"),
        ({"name": "a\nb"}, r"name 'a\nb' must also do for a folder"),
        ({"name": "x" * 101}, "at most 100 printable characters"),
    ],
)
def test_a_node_config_that_cannot_be(changed, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_node_config(NODE | changed, network())


def test_a_home_folder_may_be_written_as_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    tildes = {"text": "~/t", "model": "~/m", "work": "~/w", "out": "~/o"}
    node = read_node_config(NODE | tildes, network())
    assert (node.text, node.model) == ("/home/ada/t", "/home/ada/m")
    assert (node.work, node.out) == (Path("/home/ada/w"), Path("/home/ada/o"))
