"""Local pruners: what each gathers from a layer's inputs, and how it prunes a weight with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fedspa.settings import Settings, Target
from fedspa_kernels import (
    Pruned,
    accumulate_hessian_,
    obs_prune,
    smallest_mask,
    wanda_prune,
    wanda_scores,
)
from fedspa_kernels.counts import at_most


class Pruner(Protocol):
    """What a client asks of a pruner, its own or a user's (docs/pruners.md).

    needs_inputs: False where weights alone decide, so that no calibration pass is run.
    """

    @property
    def needs_inputs(self) -> bool:
        """Whether a calibration pass is needed."""
        ...

    def gather(self, statistic: Tensor | None, inputs: Tensor) -> Tensor:
        """Add a layer's inputs (tokens, cols) to its statistic; None before the first batch."""
        ...

    def prune(
        self, weight: Tensor, statistic: Tensor | None, target: Target, support: Tensor | None
    ) -> Pruned:
        """Prune a weight (rows, cols) to the target.

        support: (rows, cols) bool, or None in a block's first round; where it is False, a
        former round has pruned the weight and it stays pruned.
        """
        ...


@dataclass(frozen=True)
class Magnitude:
    """The smallest |w| of every weight matrix go; needs no data."""

    needs_inputs: bool = False

    def gather(self, statistic: Tensor | None, inputs: Tensor) -> Tensor:
        """Nothing is gathered."""
        raise NotImplementedError("magnitude pruning gathers nothing from a layer's inputs")

    def prune(
        self, weight: Tensor, statistic: Tensor | None, target: Target, support: Tensor | None
    ) -> Pruned:
        """Wanda's operator with norms of ones, over the whole layer."""
        norms = torch.ones(weight.shape[1], device=weight.device)
        if support is not None:
            return _narrow(weight, wanda_scores(weight, norms), target, support)
        if target.pattern is not None:
            return wanda_prune(weight, norms, pattern=target.pattern)
        return wanda_prune(weight, norms, sparsity=target.sparsity, group="layer")


@dataclass(frozen=True)
class Wanda:
    """The smallest |w| * norm of the input feature go, in groups (Sun et al. 2024)."""

    group: str = "row"
    needs_inputs: bool = True

    def gather(self, statistic: Tensor | None, inputs: Tensor) -> Tensor:
        """The sum of squares of every input feature, (cols,) float32."""
        squares = inputs.float().square().sum(dim=0)
        return squares if statistic is None else statistic + squares

    def prune(
        self, weight: Tensor, statistic: Tensor | None, target: Target, support: Tensor | None
    ) -> Pruned:
        """`wanda_prune` with the square roots of the sums."""
        assert statistic is not None
        norms = statistic.sqrt()
        if support is not None:
            return _narrow(weight, wanda_scores(weight, norms), target, support)
        if target.pattern is not None:
            return wanda_prune(weight, norms, pattern=target.pattern)
        return wanda_prune(weight, norms, sparsity=target.sparsity, group=self.group)


@dataclass(frozen=True)
class SparseGPT:
    """The optimal brain surgeon, block by block of columns (Frantar and Alistarh 2023)."""

    block_size: int = 128
    damping: float = 0.01
    needs_inputs: bool = True

    def gather(self, statistic: Tensor | None, inputs: Tensor) -> Tensor:
        """The sum of x x^T over the tokens, (cols, cols) float32."""
        if statistic is None:
            cols = inputs.shape[-1]
            statistic = torch.zeros(cols, cols, dtype=torch.float32, device=inputs.device)
        return accumulate_hessian_(statistic, inputs)

    def prune(
        self, weight: Tensor, statistic: Tensor | None, target: Target, support: Tensor | None
    ) -> Pruned:
        """`obs_prune`; in later rounds Wanda's scores narrow the support, then OBS compensates."""
        assert statistic is not None
        how: dict[str, Any] = {"block_size": self.block_size, "damping": self.damping}
        if support is not None:
            scores = wanda_scores(weight, statistic.diagonal().sqrt())
            mask = _narrow(weight, scores, target, support).mask
            return obs_prune(weight, statistic, mask=mask, **how)
        if target.pattern is not None:
            return obs_prune(weight, statistic, pattern=target.pattern, **how)
        return obs_prune(weight, statistic, sparsity=target.sparsity, **how)


def _narrow(weight: Tensor, scores: Tensor, target: Target, support: Tensor) -> Pruned:
    """Prune further within a support, the smallest scores of the whole layer first.

    Later rounds select over the layer and not within blocks or rows: the agreed support fills
    those unevenly, and only the layer's count can then be exact. A pattern is already met.
    """
    mask = support
    if target.sparsity is not None:
        count = max(at_most(weight.numel(), target.sparsity), int((~support).sum()))
        first = torch.where(support, scores, torch.full_like(scores, -1.0))
        mask = ~smallest_mask(first.reshape(1, -1), count).reshape(weight.shape)
    return Pruned(torch.where(mask, weight, torch.zeros_like(weight)), mask, None)


def make_pruner(settings: Settings) -> Pruner:
    """The pruner that the settings name, or the user's own object as it is."""
    if settings.pruner == "magnitude":
        return Magnitude()
    if settings.pruner == "wanda":
        return Wanda()
    if settings.pruner == "sparsegpt":
        return SparseGPT(settings.block_size, settings.damping)
    for name in ("needs_inputs", "gather", "prune"):
        if not hasattr(settings.pruner, name):
            raise ValueError(
                f"settings: the pruner {settings.pruner!r} has no attribute {name!r}; "
                f"docs/pruners.md shows the three that a pruner needs"
            )
    return settings.pruner
