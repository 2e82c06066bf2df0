"""Calibration data: tokens, the windows cut from them, and the clients that hold them.

Text comes from `fedspa.text.read_text` (files and datasets) or from the excerpts that the package
carries (`fedspa.domains.domain_text`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedspa.domains import DOMAINS, domain_text
from fedspa.settings import check_sparsity, is_number
from fedspa.text import read_text

__all__ = [
    "DOMAINS",
    "Client",
    "check_clients",
    "client_names",
    "domain_text",
    "pool",
    "read_text",
    "sample_windows",
    "tokenize",
    "windows",
]


# eq=False: two clients are compared by identity, since == on tensors has no single truth value.
@dataclass(frozen=True, eq=False)
class Client:
    """One client: its private calibration tokens, and how much of the model it prunes a round.

    tokens:   (samples, length) int64
    capacity: the share of decoder blocks that it prunes a round, in (0, 1]
    name:     for the report; unnamed clients are numbered
    sparsity: its own target in [0, 1), where it differs from the run's
    """

    tokens: Tensor
    capacity: float = 1.0
    name: str | None = None
    sparsity: float | None = None


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Tokenize a whole text in one run, its special tokens added once and not per window.

    returns: (n,) int64
    raises:  ValueError where the text gives no token
    """
    # verbose=False: no warning that the text exceeds the model's context; it is cut afterwards.
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if tokens.numel() == 0:
        raise ValueError(f"tokenize: {len(text)} characters gave no token; give some text")
    return tokens


def windows(tokens: Tensor, seqlen: int) -> Tensor:
    """Cut tokens into windows one after the other, without overlap; the rest is left out.

    tokens:  (n,)
    returns: (n // seqlen, seqlen)
    raises:  ValueError where there is less than one window
    """
    if tokens.ndim != 1:
        raise ValueError(
            f"windows: tokens have shape {tuple(tokens.shape)}; give one run of tokens, (n,)"
        )
    if seqlen < 1:
        raise ValueError(f"windows: seqlen is {seqlen}; a window has at least 1 token")
    available = len(tokens) // seqlen
    if available == 0:
        raise ValueError(
            f"windows: {len(tokens)} tokens are less than one window of {seqlen}; "
            f"give more text, or a seqlen of at most {len(tokens)}"
        )
    return tokens[: available * seqlen].reshape(available, seqlen)


def sample_windows(tokens: Tensor, samples: int, seqlen: int, seed: int) -> Tensor:
    """Draw non-overlapping windows without replacement; the same seed draws the same ones.

    tokens:  (n,)
    returns: (min(samples, n // seqlen), seqlen); fewer than asked where the text holds fewer
    raises:  ValueError where there is less than one window, or samples is below 1
    """
    if samples < 1:
        raise ValueError(f"sample_windows: samples is {samples}; draw at least 1")
    available = windows(tokens, seqlen)
    order = torch.randperm(len(available), generator=torch.Generator().manual_seed(seed))
    return available[order[:samples].to(tokens.device)]


def check_clients(clients: Sequence[Client], vocabulary: int, longest: int | None = None) -> None:
    """Refuse clients that a round cannot run with, naming the client and the value.

    vocabulary: the number of token ids that the model knows
    longest:    the positions that it was made for, None where that is not known
    raises:     ValueError
    """
    if not clients:
        raise ValueError("there are no clients; give at least one fedspa.Client")
    names = client_names(clients)
    for name, client in zip(names, clients, strict=True):
        who = f"client {name!r}"
        check_tokens(who, client.tokens, vocabulary, longest)
        if not (is_number(client.capacity) and 0 < client.capacity <= 1):
            raise ValueError(
                f"{who} has capacity {client.capacity!r}; "
                "it is the share of blocks that a client prunes, in (0, 1]"
            )
        if client.sparsity is not None:
            check_sparsity(who, client.sparsity)
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} clients are named {name!r}; give each a name of its own")


def client_names(clients: Sequence[Client]) -> list[str]:
    """Their names; a client without one is numbered by its place, from 1."""
    return [
        f"client {place}" if client.name is None else client.name
        for place, client in enumerate(clients, start=1)
    ]


def pool(clients: Sequence[Client], name: str = "centralised") -> Client:
    """Pool everybody's tokens in one client: the centralised baseline, which no federation forms.

    returns: a Client of full capacity, with tokens (sum of samples, length)
    raises:  ValueError where there is no client, or their windows differ in length
    """
    if not clients:
        raise ValueError("pool: there are no clients; give at least one")
    lengths = sorted({client.tokens.shape[-1] for client in clients})
    if len(lengths) > 1:
        raise ValueError(
            f"pool: the clients' windows have {' and '.join(map(str, lengths))} tokens; "
            "cut all of them with one seqlen to pool them"
        )
    return Client(tokens=torch.cat([client.tokens for client in clients]), name=name)


def check_tokens(who: str, tokens: Tensor, vocabulary: int, longest: int | None = None) -> None:
    """Raise ValueError unless tokens are (samples, length) int64 that the model can read."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype != torch.int64:
        got = (
            f"shape {tuple(tokens.shape)} and dtype {tokens.dtype}"
            if isinstance(tokens, Tensor)
            else f"type {type(tokens).__name__}"
        )
        raise ValueError(f"{who} has tokens of {got}; give a tensor (samples, length) of int64")
    if tokens.numel() == 0:
        raise ValueError(
            f"{who} has {tokens.shape[0]} samples of {tokens.shape[1]} tokens; give at least one"
        )
    if longest is not None and tokens.shape[1] > longest:
        raise ValueError(
            f"{who}: windows of {tokens.shape[1]} tokens are longer than the {longest} positions "
            f"of this model; cut them to at most {longest}"
        )
    outside = (tokens < 0) | (tokens >= vocabulary)
    if outside.any():
        sample, position = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{who} has token id {tokens[sample, position]} at position {position} of "
            f"sample {sample}, outside the model's vocabulary of {vocabulary}; "
            "tokenize with the model's own tokenizer"
        )
