"""Perplexity by the standard protocol: text concatenated, cut into windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedspa.batches import choose_batch
from fedspa.data import check_tokens
from fedspa.model import device_of, longest_window, vocabulary_size

IGNORED = -100
# Logits of so many entries are taken at a time: on a CPU what its cache holds, so that no second
# tensor of all logits is written (7 ms instead of 32 for 512 x 49,152); on a GPU 512 MB.
ENTRIES = {"cpu": 2**20, "cuda": 2**27}


def perplexity(
    model: nn.Module,
    windows: Tensor,
    *,
    batch_size: int | None = None,
    advance: Callable[[], None] | None = None,
) -> float:
    """The exponential of the mean negative log-likelihood over all predicted tokens.

    windows: (windows, length) int64, length >= 2; every window predicts its length - 1 last
        tokens, with no context from the window before (Frantar and Alistarh 2023).
    batch_size: windows in one forward pass; None: by the device (`batches.py`).
    advance: is called once a window.
    returns: the perplexity; nan where the model's logits are not numbers any more.
    raises: ValueError where there is nothing to predict, or the model cannot read the windows.
    """
    found = domain_perplexity(model, {"the text": windows}, batch_size=batch_size, advance=advance)
    return found["the text"]


def domain_perplexity(
    model: nn.Module,
    domains: Mapping[str, Tensor],
    *,
    batch_size: int | None = None,
    advance: Callable[[], None] | None = None,
) -> dict[str, float]:
    """`perplexity` of every domain's windows; all of them are checked before any is measured."""
    check_windows(model, domains)
    return {
        name: _perplexity(model, windows, batch_size, advance) for name, windows in domains.items()
    }


def check_windows(model: nn.Module, domains: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the domain, where a model cannot be evaluated on its windows."""
    for name, windows in domains.items():
        if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
            raise ValueError(
                f"perplexity on {name}: windows have shape {tuple(windows.shape)}; at least one "
                f"window of two tokens is needed"
            )
        who = f"perplexity on {name}: the text"
        check_tokens(who, windows, vocabulary_size(model), longest_window(model))


@torch.no_grad()
def _perplexity(
    model: nn.Module, windows: Tensor, batch_size: int | None, advance: Callable[[], None] | None
) -> float:
    device = device_of(model)
    if batch_size is None:
        batch_size = choose_batch(model, windows.shape[1], logits=vocabulary_size(model))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in windows.split(batch_size):
        tokens = batch.to(device)
        add_losses_(total, model(input_ids=tokens, use_cache=False).logits, tokens)
        if advance is not None:
            for _ in batch:
                advance()
    return mean_perplexity(total, windows)


def mean_perplexity(total: Tensor, windows: Tensor) -> float:
    """The perplexity that a sum of `add_losses_` over all windows (windows, length) comes to."""
    mean = float(total) / (windows.shape[0] * (windows.shape[1] - 1))
    return math.inf if mean > math.log(torch.finfo(torch.float64).max) else math.exp(mean)


def add_losses_(total: Tensor, logits: Tensor, tokens: Tensor) -> None:
    """Add every token's negative log-likelihood to a float64 sum, where no host waits for it.

    logits: (windows, length, vocabulary), tokens: (windows, length) int64; a window's first token
        is not predicted.
    """
    # The last position predicts nothing. Ignoring it spares a copy of all other logits.
    following = nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORED).flatten()
    entries = ENTRIES.get(logits.device.type, ENTRIES["cpu"])
    rows = max(1, entries // logits.shape[2])
    for some, targets in zip(logits.flatten(0, 1).split(rows), following.split(rows), strict=True):
        total += nn.functional.cross_entropy(
            some.float(), targets, ignore_index=IGNORED, reduction="sum"
        )
