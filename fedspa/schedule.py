"""What settings come to in a round: its target, how often blocks are exchanged, messages' dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedspa.settings import Settings


@dataclass(frozen=True)
class Target:
    """What a pruner must reach: a `sparsity`, or a `pattern` "n:m"; exactly one of them is set."""

    sparsity: float | None = None
    pattern: str | None = None


def round_target(settings: Settings, round_index: int, sparsity: float | None = None) -> Target:
    """The target of one round, counted from 0; `sparsity` replaces the settings' own for a client.

    "cubic" follows Zhu and Gupta 2017, eq. 1, from 0: s_t = s (1 - (1 - t/T)^3), t = 1 .. T.
    """
    if settings.pattern is not None:
        return Target(pattern=settings.pattern)
    final = settings.sparsity if sparsity is None else sparsity
    assert final is not None
    progress = (round_index + 1) / settings.rounds
    if settings.ramp == "constant" or progress == 1:
        return Target(sparsity=final)
    share = progress if settings.ramp == "linear" else 1 - (1 - progress) ** 3
    return Target(sparsity=final * share)


def exchanged_together(settings: Settings, blocks: int) -> int:
    """How many decoder blocks are exchanged at a time: 1 block by block, all of them once."""
    if settings.walking == "one-shot":
        return blocks
    return min(settings.synchronize_every or 1, blocks)


def goes_back(settings: Settings, blocks: int) -> bool:
    """Whether clients walk blocks once more when they have agreed on them."""
    return 1 < exchanged_together(settings, blocks) < blocks


def opened_again(settings: Settings, blocks: int) -> bool:
    """Whether a run opens a block again after the clients have agreed on it."""
    return settings.rounds > 1 or goes_back(settings, blocks)


def message_dtype(settings: Settings) -> torch.dtype | None:
    """The dtype of weights in messages; None keeps the model's own."""
    return None if settings.message_dtype is None else getattr(torch, settings.message_dtype)
