from collections import Counter

import pytest
import torch

from fedspa.data import pool
from fedspa.experiments.partition import deal

SIZES = {"a": 8, "b": 8, "c": 6, "d": 8, "e": 8}
KINDS = ["iid", "domain", "dirichlet:0.1", "dirichlet:1.0", "sizes:0.5", "sizes:0.001"]


def domains(sizes=SIZES):
    """Windows of 3 tokens that say where they are from: domain, place, 0."""
    return {
        name: torch.tensor([[place, index, 0] for index in range(size)])
        for place, (name, size) in enumerate(sizes.items())
    }


def held(client):
    return [tuple(window) for window in client.tokens[:, :2].tolist()]


@pytest.mark.parametrize("count", [2, 3, 5, 16, 30])
@pytest.mark.parametrize("partition", KINDS)
def test_every_window_is_dealt_to_exactly_one_client(partition, count):
    clients = deal(domains(), count, partition, seed=3)
    dealt = Counter(window for client in clients for window in held(client))
    everything = [(d, i) for d, size in enumerate(SIZES.values()) for i in range(size)]
    assert dealt == Counter(everything)
    assert len(clients) == count and all(len(client.tokens) for client in clients)
    assert len({client.name for client in clients}) == count
    assert sorted(map(tuple, pool(clients).tokens[:, :2].tolist())) == everything


@pytest.mark.parametrize("partition", KINDS)
def test_the_same_seed_deals_the_same_and_another_does_not(partition):
    first, again, other = (deal(domains(), 6, partition, seed) for seed in (1, 1, 2))
    assert [held(client) for client in first] == [held(client) for client in again]
    differs = [held(client) for client in first] != [held(client) for client in other]
    # One domain each leaves nothing to draw.
    assert differs == (partition != "domain")


def test_iid_sizes_differ_by_at_most_one_and_domains_mix():
    clients = deal(domains(), 7, "iid", seed=0)
    sizes = [len(client.tokens) for client in clients]
    assert max(sizes) - min(sizes) <= 1
    assert all(len({domain for domain, _ in held(client)}) > 1 for client in clients)


def test_one_domain_each_where_there_are_enough_clients():
    clients = deal(domains(), 12, "domain", seed=0)
    for client in clients:
        assert len({domain for domain, _ in held(client)}) == 1
    assert [client.name for client in clients[:6]] == ["a 1", "b 1", "c 1", "d 1", "e 1", "a 2"]
    # Two domains have three clients, the others two.
    assert [len(client.tokens) for client in clients] == [2, 2, 3, 4, 4, 3, 3, 3, 4, 4, 3, 3]


def test_fewer_clients_than_domains_hold_several():
    clients = deal(domains(), 3, "domain", seed=0)
    assert [client.name for client in clients] == ["a + d", "b + e", "c"]
    assert [{domain for domain, _ in held(client)} for client in clients] == [{0, 3}, {1, 4}, {2}]


def purity(partition):
    """The mean share of a client's windows that its largest domain has."""
    shares = []
    for seed in range(10):
        for client in deal(domains({name: 40 for name in "abcde"}), 5, partition, seed):
            counts = Counter(domain for domain, _ in held(client))
            shares.append(max(counts.values()) / counts.total())
    return sum(shares) / len(shares)


def test_a_smaller_alpha_gives_purer_mixtures():
    assert purity("dirichlet:0.1") > purity("dirichlet:1.0") + 0.1
    assert purity("dirichlet:1.0") > purity("dirichlet:100") + 0.1
    assert purity("dirichlet:1000000") == pytest.approx(0.2, abs=0.02)


def spread(partition):
    sizes = [
        len(client.tokens) for seed in range(10) for client in deal(domains(), 5, partition, seed)
    ]
    return torch.tensor(sizes, dtype=torch.float64).std().item()


def test_a_smaller_alpha_gives_more_unequal_sizes():
    assert spread("sizes:0.1") > spread("sizes:1.0") > spread("sizes:100") > 0


def test_capacities_are_dealt_in_turn():
    clients = deal(domains(), 5, "iid", 0, [1.0, 0.5])
    assert [client.capacity for client in clients] == [1.0, 0.5, 1.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("count", "partition", "message"),
    [
        (39, "iid", "38 windows of all domains are fewer than 39 clients"),
        (1, "iid", "deal to 2 to 64"),
        (65, "iid", "deal to 2 to 64"),
        (36, "domain", r"6 windows of a domain cannot be dealt to the 7 of 36 clients"),
        (4, "iids", "unknown; choose one of"),
        (4, "domain:1", 'domain takes no number; write "domain"'),
        (4, "dirichlet", "needs an alpha"),
        (4, "dirichlet:0", "needs an alpha"),
        (4, "sizes:nan", "needs an alpha"),
        (4, "sizes:inf", "needs an alpha"),
        (4, 3, "unknown"),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_the_numbers(count, partition, message):
    with pytest.raises(ValueError, match=message):
        deal(domains(), count, partition, 0)
