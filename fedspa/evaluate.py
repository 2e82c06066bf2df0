"""Perplexity by the standard protocol: text concatenated, cut into windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedspa.data import check_tokens
from fedspa.model import longest_window, vocabulary_size

IGNORED = -100


def perplexity(
    model: nn.Module,
    windows: Tensor,
    *,
    batch_size: int = 1,
    advance: Callable[[], None] | None = None,
) -> float:
    """The exponential of the mean negative log-likelihood over all predicted tokens.

    windows: (windows, length) int64, length >= 2; every window predicts its length - 1 last
        tokens, with no context from the window before (Frantar and Alistarh 2023).
    advance: is called once a batch.
    returns: the perplexity; nan where the model's logits are not numbers any more.
    raises: ValueError where there is nothing to predict, or the model cannot read the windows.
    """
    found = domain_perplexity(model, {"the text": windows}, batch_size=batch_size, advance=advance)
    return found["the text"]


def domain_perplexity(
    model: nn.Module,
    domains: Mapping[str, Tensor],
    *,
    batch_size: int = 1,
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
    model: nn.Module, windows: Tensor, batch_size: int, advance: Callable[[], None] | None
) -> float:
    device = next(model.parameters()).device
    total = 0.0
    for batch in windows.split(batch_size):
        tokens = batch.to(device)
        logits = model(input_ids=tokens, use_cache=False).logits.float()
        # The last position predicts nothing. Ignoring it spares a copy of all other logits.
        following = nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
        total += float(
            nn.functional.cross_entropy(
                logits.flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        )
        if advance is not None:
            advance()
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.inf if mean > math.log(torch.finfo(torch.float64).max) else math.exp(mean)
