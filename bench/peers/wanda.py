"""Wanda by sorting, as its authors and llm-compressor do it (Sun et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def prune(
    weight: Tensor,
    norms: Tensor,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
) -> Tensor:
    """Set the int(cols·sparsity) smallest |w|·norm of every row to zero.

    weight:  (rows, cols), any float dtype; left as it is
    norms:   (cols,) float32, the L2 norm of each input feature
    pattern: (n, m) keeps the n largest of every m neighbours in a row; m divides cols. All groups
             are sorted at once, where the published code takes them one after the other.
    returns: (rows, cols) in the weight's dtype
    """
    scores = weight.abs().float() * norms
    if pattern is None:
        assert sparsity is not None
        width, count = weight.shape[1], int(weight.shape[1] * sparsity)
    else:
        width, count = pattern[1], pattern[1] - pattern[0]
    groups = scores.view(weight.shape[0], -1, width)
    smallest = groups.sort(dim=-1, stable=True).indices[..., :count]
    goes = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, smallest, True)
    return weight.masked_fill(goes.view(weight.shape), 0)


@torch.no_grad()
def add_batch(squares: Tensor, samples_so_far: int, inputs: Tensor) -> int:
    """Update the running mean 1/n · Σ x² in place with one more batch of a layer's inputs.

    squares: (cols,) float32, whose roots are norms in a scale that changes no mask
    inputs:  (windows, tokens, cols), or (tokens, cols) as one window; any dtype, cast to float32
    returns: the number of windows with these
    """
    windows = inputs.shape[0] if inputs.dim() == 3 else 1
    together = samples_so_far + windows
    squares *= samples_so_far / together
    squares += inputs.reshape(-1, inputs.shape[-1]).float().norm(dim=0) ** 2 / together
    return together
