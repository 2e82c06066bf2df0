"""obs_prune: one Cholesky factorisation and half of a product, around a loop over columns."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.operators import draw
from bench.operators.case import Baseline, Case, Inputs, Sizes
from bench.peers import llmcompressor, sparsegpt
from bench.protocol import WrongResult
from fedspa_kernels import Pruned, obs_prune

BLOCK = 128
# Scores that differ by rounding change places, and what a weight passes on differs from there on.
# So much of the mask agrees, and by so much of their norm the weights are apart.
AGREE, APART = 0.999, 0.05
# Of the loss, float32 sums behind a Cholesky; and of the weights where the mask is given, with the
# rounding to bfloat16.
LOSS, WEIGHTS = 1e-2, 1e-2


def draw_inputs(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """A weight, a Hessian, and a mask."""
    return {
        "weight": draw.weight(sizes.rows, sizes.cols, dtype, generator),
        "hessian": draw.hessian(sizes.cols, generator),
        "mask": draw.mask(sizes.rows, sizes.cols, generator),
    }


def _run(inputs: Inputs, backend: str | None, **how: Any) -> Any:
    return obs_prune(inputs["weight"], inputs["hessian"], **how, backend=backend)


def _run_mask(inputs: Inputs, backend: str | None) -> Any:
    return _run(inputs, backend, mask=inputs["mask"])


def check_half(inputs: Inputs, found: Pruned, expected: Pruned) -> str:
    """Exactly the reference's counts in every block of columns, and nearly its choice."""
    draw.equal(["kept weights a block"], _per_block(found.mask), _per_block(expected.mask))
    return _check_choice(found, expected)


def _check_pattern(inputs: Inputs, found: Pruned, expected: Pruned) -> str:
    groups = found.mask.view(found.mask.shape[0], -1, 4).sum(-1, dtype=torch.uint8)
    draw.equal(["kept of 4"], groups, torch.full_like(groups, 2))
    return _check_choice(found, expected)


def _check_mask(inputs: Inputs, found: Pruned, expected: Pruned) -> str:
    draw.equal(["mask"], found.mask, expected.mask)
    return draw.close("weight", found.weight, expected.weight, WEIGHTS)


def _check_choice(found: Pruned, expected: Pruned) -> str:
    not_zero = (found.weight != 0) & ~found.mask
    draw.equal(["pruned weights that are not 0"], not_zero, torch.zeros_like(not_zero))
    agree = 1 - float((found.mask != expected.mask).float().mean())
    if agree < AGREE:
        raise WrongResult(f"mask agrees with the reference's in {agree:.2%}, needed {AGREE:.1%}")
    draw.close("weight", found.weight, expected.weight, APART)
    assert found.loss is not None and expected.loss is not None
    losses = float(found.loss.double().sum()), float(expected.loss.double().sum())
    if not math.isclose(*losses, rel_tol=LOSS):
        raise WrongResult(f"loss is {losses[0]:g}, and the reference's {losses[1]:g}")
    return (
        f"counts exact, mask as the reference's in {agree:.4%} of {found.mask.numel():,} entries, "
        f"loss within {LOSS:g}"
    )


def _per_block(mask: torch.Tensor) -> torch.Tensor:
    return torch.stack([block.sum() for block in mask.split(BLOCK, dim=1)])


def least_bytes(sizes: Sizes, itemsize: int) -> float:
    """The weight in and out, the Hessian once, the mask and the loss."""
    rows, cols = sizes.rows, sizes.cols
    return (2 * itemsize + 1) * rows * cols + 4 * cols**2 + 4 * rows


def operations(sizes: Sizes) -> float:
    """Cholesky's cols³/3; half of rows·cols² multiply-adds, since the factor is triangular."""
    return sizes.cols**3 / 3 + sizes.rows * sizes.cols**2


def floor(inputs: Inputs) -> Any:
    """One Cholesky and the product that the target names, both PyTorch's."""
    return product(inputs["weight"], cholesky(inputs["hessian"]))


def cholesky(hessian: torch.Tensor) -> torch.Tensor:
    """The lower factor of the damped Hessian."""
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * hessian.diagonal().mean())
    return torch.linalg.cholesky(damped)


def product(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply in float32: on a GPU all rows, on a CPU half, which is all that has to be done.

    The targets are set so: rows·cols² multiply-adds for a GPU, half of them for a CPU.
    """
    rows = weight if weight.is_cuda else weight[: -(-len(weight) // 2)]
    return rows.float() @ factor


def column_loop(sizes: Sizes, device: str) -> float:
    """About the seconds of SparseGPT's loop: on a GPU 200 µs a column and four Choleskys."""
    rows, cols = sizes.rows, sizes.cols
    if device == "cuda":
        return 200e-6 * cols + (4 / 3 * cols**3 + rows * cols**2) / 30e12
    # A column reads and writes what is left of its block.
    return 50e-6 * cols + (4 / 3 * cols**3 + rows * cols**2) / 50e9 + rows * cols * BLOCK / 1e9


def _peers(**how: Any) -> dict[str, Baseline]:
    def prune(code: Callable[..., Any]) -> Callable[[Inputs], Any]:
        return lambda inputs: code(inputs["weight"], inputs["hessian"], **how)

    return {
        "sparsegpt": Baseline(prune(sparsegpt.prune), seconds=column_loop),
        "llm-compressor": Baseline(
            prune(llmcompressor.sparsegpt), llmcompressor.why_not, seconds=column_loop
        ),
    }


_CASE = partial(Case, "obs_prune", inputs=draw_inputs, rate=torch.float32)
CASES = (
    _CASE(
        "50 %",
        run=partial(_run, sparsity=0.5),
        check=check_half,
        least_bytes=least_bytes,
        operations=operations,
        baselines={"floor": Baseline(floor), **_peers(sparsity=0.5)},
    ),
    _CASE(
        "2:4",
        multiple=4,
        run=partial(_run, pattern="2:4"),
        check=_check_pattern,
        least_bytes=least_bytes,
        operations=operations,
        baselines={"floor": Baseline(floor), **_peers(pattern=(2, 4))},
    ),
    # No peer has this one: the support is given, and only the compensation runs.
    _CASE(
        "given mask",
        run=_run_mask,
        check=_check_mask,
        least_bytes=lambda sizes, itemsize: least_bytes(sizes, itemsize) + sizes.rows * sizes.cols,
        operations=operations,
        baselines={"floor": Baseline(floor)},
    ),
)
