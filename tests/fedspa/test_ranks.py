"""Ranks without processes: how they divide work, what they refuse, and whom they miss."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from fedspa.ranks import Ranks, alone, join
from fedspa.ranks.peers import AWAY, DONE, Peers
from fedspa.ranks.processes import lives, mark


def several(rank, size):
    """A rank for what needs no other one."""
    return Ranks(rank, size, "samples", torch.device("cpu"))


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
