"""Random inputs as they come in pruning, and the comparison of results."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from bench.protocol import WrongResult


def weight(rows: int, cols: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    """A weight matrix, normal."""
    return torch.randn(rows, cols, dtype=dtype, generator=generator, device=generator.device)


def weights(
    clients: int, rows: int, cols: int, dtype: torch.dtype, generator: Generator
) -> list[Tensor]:
    """One weight matrix a client."""
    return [weight(rows, cols, dtype, generator) for _ in range(clients)]


def mask(rows: int, cols: int, generator: Generator) -> Tensor:
    """A mask of which about half is kept, without any structure: the hardest to predict."""
    drawn = torch.randint(
        2, (rows, cols), dtype=torch.uint8, generator=generator, device=generator.device
    )
    return drawn.view(torch.bool)


def masks(clients: int, rows: int, cols: int, generator: Generator) -> list[Tensor]:
    """One mask a client."""
    return [mask(rows, cols, generator) for _ in range(clients)]


def votes(clients: int, rows: int, cols: int, generator: Generator) -> Tensor:
    """Votes, int32, each number equally frequent.

    So they are where the clients' scores have half of their variance in common: then the chance
    that a client keeps a weight is itself uniform.
    """
    return torch.randint(
        clients + 1, (rows, cols), dtype=torch.int32, generator=generator, device=generator.device
    )


def inputs(tokens: int, cols: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    """Calibration inputs (tokens, cols), features of very different size as in a transformer."""
    features = norms(cols, generator)
    return (weight(tokens, cols, torch.float32, generator) * features).to(dtype)


def norms(cols: int, generator: Generator) -> Tensor:
    """Norms of input features (cols,), log-normal."""
    return torch.randn(cols, generator=generator, device=generator.device).exp_()


def hessian(cols: int, generator: Generator) -> Tensor:
    """A Hessian (cols, cols) float32 of correlated inputs: 512 directions, and noise on all."""
    tokens = inputs(min(cols, 512), cols, torch.float32, generator)
    summed = tokens.T @ tokens
    noise = torch.rand(cols, generator=generator, device=generator.device)
    summed.diagonal().add_(summed.diagonal().mean() * noise)
    return summed


def equal(what: Sequence[str], found: Any, expected: Any) -> str:
    """Check tensors to the bit; return a sentence, or raise WrongResult."""
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    for name, (ours, truth) in zip(what, pairs, strict=True):
        if ours.dtype != truth.dtype or ours.shape != truth.shape:
            raise WrongResult(
                f"{name} is {tuple(ours.shape)} {ours.dtype}, and the reference's "
                f"{tuple(truth.shape)} {truth.dtype}"
            )
        if not torch.equal(ours, truth):
            wrong = int((ours != truth).sum())
            raise WrongResult(f"{name} differs from the reference's in {wrong:,} entries")
    count = sum(tensor.numel() for tensor in _tensors(expected))
    return f"{' and '.join(what)} equal to the reference's, {count:,} entries"


def close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> str:
    """Check a tensor to a tolerance of its norm; return a sentence, or raise WrongResult."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise WrongResult(
            f"{what} is {tuple(found.shape)} {found.dtype}, and the reference's "
            f"{tuple(expected.shape)} {expected.dtype}"
        )
    norm = expected.float().norm()
    error = float((found.float() - expected.float()).norm() / norm.clamp_min(1e-30))
    if not error <= tolerance:
        raise WrongResult(
            f"{what} differs from the reference's by {error:.1e} of its norm, allowed {tolerance:g}"
        )
    return f"{what} within {tolerance:g} of the reference's norm, {expected.numel():,} entries"


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for tensor in result if tensor is not None]
