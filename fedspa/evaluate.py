"""Perplexity by the standard protocol: text concatenated, cut into windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

IGNORED = -100


@torch.no_grad()
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
    raises: ValueError where there is nothing to predict, or the loss is NaN.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(
            f"perplexity: windows have shape {tuple(windows.shape)}; at least one window of "
            f"two tokens is needed"
        )
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
    if math.isnan(mean):
        raise ValueError("perplexity: the model's loss is NaN; its weights or dtype are broken")
    return math.exp(mean) if mean < math.log(torch.finfo(torch.float64).max) else math.inf


def domain_perplexity(
    model: nn.Module,
    domains: Mapping[str, Tensor],
    *,
    batch_size: int = 1,
    advance: Callable[[], None] | None = None,
) -> dict[str, float]:
    """The perplexity on every domain's windows, (windows, length) int64 each."""
    return {
        name: perplexity(model, windows, batch_size=batch_size, advance=advance)
        for name, windows in domains.items()
    }
