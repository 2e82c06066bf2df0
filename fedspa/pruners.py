"""Local pruners: what each gathers from a layer's inputs, and how it prunes a weight with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedspa.schedule import Target
from fedspa.settings import Settings
from fedspa_kernels import (
    Pruned,
    accumulate_hessian_,
    obs_prune_shared,
    smallest_mask,
    wanda_prune,
    wanda_scores,
)
from fedspa_kernels.counts import at_most

# Kinds of additive statistics: a symmetric matrix with a diagonal of squares, of which a triangle
# travels; sums of squares; any other sums.
SUMS = ("hessian", "squares", "sums")
# Inputs of so many tokens are squared at a time.
TOKENS = 512


class Pruner(Protocol):
    """What a client asks of a pruner, its own or a user's (docs/pruners.md).

    needs_inputs: False where weights alone decide, so that no calibration pass is run.
    additive: optional; says that statistics are sums over tokens, which can be added over clients
        (aggregation "statistics"), and of which kind, one of `SUMS`.

    One with `prune_shared` is a `SharingPruner`; the others are asked layer by layer.
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


@runtime_checkable
class SharingPruner(Pruner, Protocol):
    """A pruner that takes all layers of one statistic, as q, k and v, in one call."""

    def prune_shared(
        self,
        weights: Sequence[Tensor],
        statistic: Tensor | None,
        target: Target,
        supports: Sequence[Tensor] | None,
    ) -> list[Pruned]:
        """`prune` of each weight (rows, cols) with its support, all by one statistic."""
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
    additive: str = "squares"

    def gather(self, statistic: Tensor | None, inputs: Tensor) -> Tensor:
        """The sum of squares of every input feature, (cols,) float32."""
        squares = _sum_of_squares(inputs)
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
    additive: str = "hessian"

    def gather(self, statistic: Tensor | None, inputs: Tensor) -> Tensor:
        """The sum of x x^T over the tokens, (cols, cols) float32."""
        if statistic is None:
            cols = inputs.shape[-1]
            statistic = torch.zeros(cols, cols, dtype=torch.float32, device=inputs.device)
        return accumulate_hessian_(statistic, inputs)

    def prune(
        self, weight: Tensor, statistic: Tensor | None, target: Target, support: Tensor | None
    ) -> Pruned:
        """`prune_shared` of one layer."""
        supports = None if support is None else [support]
        return self.prune_shared([weight], statistic, target, supports)[0]

    def prune_shared(
        self,
        weights: Sequence[Tensor],
        statistic: Tensor | None,
        target: Target,
        supports: Sequence[Tensor] | None,
    ) -> list[Pruned]:
        """Prune layers (rows, cols) that share their inputs: one hessian, factored once.

        In later rounds Wanda's scores narrow each support, and then OBS compensates.
        """
        assert statistic is not None
        how: dict[str, Any] = {"block_size": self.block_size, "damping": self.damping}
        if supports is not None:
            norms = statistic.diagonal().sqrt()
            masks = [
                _narrow(weight, wanda_scores(weight, norms), target, support).mask
                for weight, support in zip(weights, supports, strict=True)
            ]
            return obs_prune_shared(weights, statistic, masks=masks, **how)
        if target.pattern is not None:
            return obs_prune_shared(weights, statistic, pattern=target.pattern, **how)
        return obs_prune_shared(weights, statistic, sparsity=target.sparsity, **how)


def _sum_of_squares(inputs: Tensor) -> Tensor:
    """Column sums of inputs² in float32, without a copy of all inputs: (tokens, cols) -> (cols,).

    A GPU's norm reads halves as they are. On a CPU it converts all of them first and adds one by
    one; a few tokens at a time stay in the cache: 16,384 x 4096 floats took 14 ms instead of 220.
    """
    if inputs.is_cuda:
        return torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32).square_()
    total = torch.zeros(inputs.shape[1], dtype=torch.float32, device=inputs.device)
    for tokens in inputs.split(TOKENS):
        total += tokens.float().square().sum(dim=0)
    return total


def _narrow(weight: Tensor, scores: Tensor, target: Target, support: Tensor) -> Pruned:
    """Prune further within a support, the smallest scores of the whole layer first.

    Later rounds select over the layer and not within blocks or rows: the agreed support fills
    those unevenly, and only the layer's count can then be exact. A pattern is already met.
    """
    mask = support
    if target.sparsity is not None:
        # What is pruned already comes first, so it counts, and a support beyond the target stays.
        first = scores.masked_fill(~support, -1.0)
        goes = smallest_mask(first.reshape(1, -1), at_most(weight.numel(), target.sparsity))
        mask = support & ~goes.reshape(weight.shape)
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


def additive_kind(pruner: Pruner) -> str:
    """The kind of a pruner's additive statistic, one of `SUMS`.

    Raises ValueError where it says of none that it can be added over clients.
    """
    if not pruner.needs_inputs:
        raise ValueError(
            f"settings: aggregation 'statistics' has nothing to add up for {pruner!r}, which needs "
            f"no data and so no exchange; prune the model once, with any other aggregation"
        )
    kind = getattr(pruner, "additive", None)
    if kind not in SUMS:
        raise ValueError(
            f"settings: aggregation 'statistics' adds up what the pruner gathers, and {pruner!r} "
            f"does not say that this is a sum over tokens; give it an attribute `additive`, one of "
            f"{list(SUMS)} (docs/pruners.md), or choose another aggregation"
        )
    return kind
