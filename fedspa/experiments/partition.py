"""Who holds which calibration windows: from windows by domain to clients, every window dealt once.

The windows are the same for every partition and number of clients, so that the pool of all clients,
and with it the centralised result, is the same too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedspa.data import Client

MOST_CLIENTS = 64
# Outside of these a gamma variate leaves the range of float64, or nothing differs any more.
LEAST_ALPHA, MOST_ALPHA = 1e-3, 1e6
PARTITIONS = ("iid", "domain", "dirichlet:ALPHA", "sizes:ALPHA")
# A window by the place of its domain, and its own place within that domain.
Window = tuple[int, int]


def check_partition(partition: object, clients: int, sizes: Sequence[int]) -> None:
    """Raise ValueError unless domains of these sizes can be dealt to clients in that way."""
    kind, _ = parse_partition(partition)
    if not 2 <= clients <= MOST_CLIENTS:
        raise ValueError(
            f"partition: {clients} clients; deal to 2 to {MOST_CLIENTS}, since one client alone "
            f'is the method of kind "centralised"'
        )
    if sum(sizes) < clients:
        raise ValueError(
            f"partition: {sum(sizes)} windows of all domains are fewer than {clients} clients, "
            f"and each needs one; draw more windows of each domain, or take fewer clients"
        )
    if kind == "domain":
        _by_domain(sizes, clients)


def parse_partition(partition: object) -> tuple[str, float | None]:
    """A partition's kind, and its alpha where it has one; ValueError where it is neither."""
    kind, colon, written = str(partition).partition(":")
    if kind not in ("iid", "domain", "dirichlet", "sizes"):
        raise ValueError(f"partition {partition!r} is unknown; choose one of {list(PARTITIONS)}")
    if kind in ("iid", "domain"):
        if colon:
            raise ValueError(f'partition {partition!r}: {kind} takes no number; write "{kind}"')
        return kind, None
    try:
        alpha = float(written)
    except ValueError:
        alpha = math.nan
    if not LEAST_ALPHA <= alpha <= MOST_ALPHA:
        raise ValueError(
            f"partition {partition!r} needs an alpha of {LEAST_ALPHA:g} to {MOST_ALPHA:g}, such as "
            f'"{kind}:0.5"'
        )
    return kind, alpha


def deal(
    domains: Mapping[str, Tensor],
    clients: int,
    partition: str,
    seed: int,
    capacities: Sequence[float] | None = None,
) -> list[Client]:
    """Deal every window to exactly one client; the same seed deals the same ones.

    domains:    by name (windows, length) int64, one length for all
    partition:  "iid": shuffled, sizes differ by at most one;
                "domain": one domain each, a domain's windows dealt evenly to its clients; of fewer
                clients than domains some hold two or more;
                "dirichlet:ALPHA": mixtures of domains, the smaller alpha the purer (Hsu et al.
                2019), drawn as a domain's shares among the clients (Yurochkin et al. 2019), which
                deals every window; then windows are moved from the largest to those without any;
                "sizes:ALPHA": shuffled, but of unequal sizes, shares drawn from Dir(alpha)
    capacities: dealt to the clients in turn; None: 1.0 for all
    returns:    named clients; each holds its windows in the order of the domains and their windows
    raises:     ValueError with the numbers where that cannot be
    """
    names = list(domains)
    sizes = [len(windows) for windows in domains.values()]
    check_partition(partition, clients, sizes)
    kind, alpha = parse_partition(partition)
    draw = np.random.default_rng(seed)
    if kind == "domain":
        held = _by_domain(sizes, clients)
    elif kind == "dirichlet":
        assert alpha is not None
        held = _mixtures(sizes, clients, alpha, draw)
    else:
        held = _shuffled(sizes, clients, alpha, draw)
    called = _domain_names(names, clients) if kind == "domain" else _numbered(clients)
    dealt = []
    for place, (name, mine) in enumerate(zip(called, held, strict=True)):
        tokens = torch.stack([domains[names[domain]][index] for domain, index in sorted(mine)])
        capacity = capacities[place % len(capacities)] if capacities else 1.0
        dealt.append(Client(tokens, capacity, name))
    return dealt


def _by_domain(sizes: Sequence[int], clients: int) -> list[list[Window]]:
    """Client i holds domain i mod domains; of fewer clients domain j goes to client j mod clients.

    Raises ValueError where a domain has fewer windows than clients.
    """
    held: list[list[Window]] = [[] for _ in range(clients)]
    for domain, size in enumerate(sizes):
        owners = _owners(domain, len(sizes), clients)
        if size < len(owners):
            raise ValueError(
                f"partition: {size} windows of a domain cannot be dealt to the {len(owners)} of "
                f"{clients} clients that hold it; draw at least {len(owners)} windows of each "
                f'domain, or take another partition such as "iid"'
            )
        for owner, part in zip(owners, _evenly(size, len(owners)), strict=True):
            held[owner] += [(domain, index) for index in part]
    return held


def _owners(domain: int, domains: int, clients: int) -> list[int]:
    if clients < domains:
        return [domain % clients]
    return list(range(domain, clients, domains))


def _mixtures(
    sizes: Sequence[int], clients: int, alpha: float, draw: np.random.Generator
) -> list[list[Window]]:
    """Every domain's windows, cut at the cumulated shares of Dir(alpha)."""
    held: list[list[Window]] = [[] for _ in range(clients)]
    for domain, size in enumerate(sizes):
        order = draw.permutation(size)
        for mine, part in zip(held, _cut(order, clients, alpha, draw), strict=True):
            mine += [(domain, int(index)) for index in part]
    for mine in held:
        if not mine:
            # The last that the largest was dealt, the first of the largest where several are.
            mine.append(max(held, key=len).pop())
    return held


def _shuffled(
    sizes: Sequence[int], clients: int, alpha: float | None, draw: np.random.Generator
) -> list[list[Window]]:
    """All windows in a random order, cut evenly; or one each and the rest by Dir(alpha)."""
    everything = [(domain, index) for domain, size in enumerate(sizes) for index in range(size)]
    order = draw.permutation(len(everything))
    if alpha is None:
        parts = [order[part.start : part.stop] for part in _evenly(len(order), clients)]
    else:
        more = _cut(order[clients:], clients, alpha, draw)
        parts = [np.append(part, order[place]) for place, part in enumerate(more)]
    return [[everything[int(index)] for index in part] for part in parts]


def _cut(
    order: np.ndarray, clients: int, alpha: float, draw: np.random.Generator
) -> list[np.ndarray]:
    """An order cut into a part for every client, of sizes as shares drawn from Dir(alpha)."""
    shares = draw.dirichlet(np.full(clients, alpha))
    ends = np.floor(np.cumsum(shares)[:-1] * len(order) + 0.5).astype(int)
    return np.split(order, ends)


def _evenly(size: int, parts: int) -> list[range]:
    """0 .. size in that many ranges, whose sizes differ by at most one."""
    return [range(size * p // parts, size * (p + 1) // parts) for p in range(parts)]


def _domain_names(names: Sequence[str], clients: int) -> list[str]:
    """What clients hold, numbered where several hold the same."""
    if clients < len(names):
        return [" + ".join(names[client::clients]) for client in range(clients)]
    several = clients > len(names)
    return [
        f"{names[client % len(names)]} {client // len(names) + 1}"
        if several
        else names[client % len(names)]
        for client in range(clients)
    ]


def _numbered(clients: int) -> list[str]:
    return [f"client {client + 1}" for client in range(clients)]
