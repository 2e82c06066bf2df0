"""llm-compressor's own functions (0.14.0.1), called as its modifiers call them.

Its functions take a module and look its Hessian up, so that every call wraps the weight in a
linear layer without copying it.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor, nn

# The versions are in constraints.txt. Its own requirements would take an older transformers.
INSTALL = "pip install --no-deps -c constraints.txt llmcompressor compressed-tensors loguru"


@functools.cache
def why_not() -> str:
    """Why llm-compressor cannot be measured here, or nothing."""
    try:
        _functions("sparsegpt.sgpt_sparsify"), _functions("wanda.wanda_sparsify")
    except ImportError as error:
        if error.name in ("llmcompressor", "compressed_tensors", "loguru"):
            return f"{error.name} is not installed ({INSTALL})"
        return f"llm-compressor cannot be imported: {error}"
    return ""


def _functions(name: str) -> ModuleType:
    from loguru import logger

    # It warns on import that there is no accelerator. What it says while it prunes is still heard.
    logger.disable("compressed_tensors")
    return importlib.import_module(f"llmcompressor.modifiers.pruning.{name}")


def _layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@torch.no_grad()
def accumulate_hessian(hessian: Tensor, samples_so_far: int, inputs: Tensor) -> int:
    """Update its running mean 2/n · Σ x·xᵀ in place with one more batch of a layer's inputs.

    hessian: (cols, cols) float32; inputs: (windows, tokens, cols), or (tokens, cols) as one window
    returns: the number of windows with these
    """
    step = _functions("sparsegpt.sgpt_sparsify").accumulate_hessian
    layer = nn.Linear(inputs.shape[-1], 1, bias=False, device="meta")
    return step(inputs, layer, hessian, samples_so_far)[1]


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
) -> Tensor:
    """Its SparseGPT; the arguments are those of `bench.peers.sparsegpt.prune`.

    It overwrites the Hessian, so that it is given a copy.
    """
    layer = _layer(weight)
    prune_n, prune_m = _pruned_of(pattern)
    _, pruned = _functions("sparsegpt.sgpt_sparsify").sparsify_weight(
        module=layer,
        hessians_dict={layer: hessian.clone()},
        sparsity=sparsity,
        prune_n=prune_n,
        prune_m=prune_m,
        block_size=block_size,
        dampening_frac=damping,
        preserve_sparsity_mask=False,
    )
    return pruned


@torch.no_grad()
def wanda(
    weight: Tensor,
    norms: Tensor,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
) -> Tensor:
    """Its Wanda; the arguments are those of `bench.peers.wanda.prune`."""
    layer = _layer(weight)
    prune_n, prune_m = _pruned_of(pattern)
    return _functions("wanda.wanda_sparsify").sparsify_weight(
        module=layer,
        row_scalars_dict={layer: norms.square()},
        sparsity=sparsity,
        prune_n=prune_n,
        prune_m=prune_m,
    )


def _pruned_of(pattern: tuple[int, int] | None) -> tuple[int, int]:
    """Its n:m, where n are pruned and 0:0 means no pattern; ours keeps n."""
    return (0, 0) if pattern is None else (pattern[1] - pattern[0], pattern[1])
