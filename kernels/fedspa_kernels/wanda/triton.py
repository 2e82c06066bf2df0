"""Wanda in Triton: the scores, and their selection without a copy of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedspa_kernels.floats import to_float32
from fedspa_kernels.launch import Compilation, describe, device_guard
from fedspa_kernels.selection.triton import select
from fedspa_kernels.selection.triton_describe import describe_selection
from fedspa_kernels.selection.triton_keys import NUM_STAGES, Entries, num_warps

BLOCK_COLS = 1024
THREADS = 128


@triton.jit
def score_kernel(weight, norms, scores, invalid, cols, blocks, BLOCK_COLS: tl.constexpr):
    """Multiply a piece of a row's |weight| with its norms."""
    row = tl.program_id(0).to(tl.int64) // blocks
    col = tl.program_id(0) % blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = col < cols
    norm = tl.load(norms + col, mask=inside, other=0.0)
    value = to_float32(tl.load(weight + row * cols + col, mask=inside, other=0.0))
    tl.store(scores + row * cols + col, tl.abs(value) * norm, mask=inside)
    sound = (norm >= 0) & (norm < float("inf"))
    tl.store(invalid, 1, mask=tl.min(sound.to(tl.int32)) == 0)


def wanda_scores(weight: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """|weight|·norm.

    weight:  (rows, cols) float32, float16 or bfloat16, contiguous
    norms:   (cols,) float32
    returns: (rows, cols) float32, and `invalid` (1,) int32, not 0 where a norm is negative or not
             finite
    """
    rows, cols = weight.shape
    scores = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    if not weight.numel():
        return scores, _unsound(norms)
    invalid = torch.zeros(1, dtype=torch.int32, device=weight.device)
    blocks = triton.cdiv(cols, BLOCK_COLS)
    with device_guard(weight):
        score_kernel[(rows * blocks,)](
            weight,
            norms,
            scores,
            invalid,
            cols,
            blocks,
            BLOCK_COLS,
            num_warps=num_warps(THREADS),
            num_stages=NUM_STAGES,
        )
    return scores, invalid


def wanda_prune(
    weight: Tensor, norms: Tensor, norms_of_rows: bool, of: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Set the `count` smallest of |weight|·norm of each run of `of` weights to 0.

    weight:  (rows, cols) float32, float16 or bfloat16, contiguous
    norms:   (cols,) float32, or with norms_of_rows (rows,)
    returns: pruned (rows, cols) of weight's dtype, mask (rows, cols) bool True = kept, and
             `invalid` (1,) int32, not 0 where a norm is negative or a number is not finite
    """
    pruned = torch.empty_like(weight)
    entries = Entries(weight, norms, width=weight.shape[1], norms_of_rows=norms_of_rows)
    mask, invalid = select(entries, of, count, kept=True, pruned=pruned)
    if not weight.numel():
        invalid = _unsound(norms)
    return pruned, mask.view(weight.shape), invalid


def _unsound(norms: Tensor) -> Tensor:
    """`invalid` of a weight without entries, which no kernel runs for."""
    sound = (norms >= 0) & (norms < float("inf"))
    return (~sound).any().to(torch.int32).view(1)


def compilations() -> list[Compilation]:
    """Describe the kernels of bfloat16 weights; those of the other floats differ in their loads."""
    pointers = {"weight": "*bf16", "norms": "*fp32", "scores": "*fp32", "invalid": "*i32"}
    types = pointers | {"cols": "i32", "blocks": "i32"}
    scoring = describe(
        score_kernel, "bf16", types, num_warps(THREADS), NUM_STAGES, BLOCK_COLS=BLOCK_COLS
    )
    pruning = describe_selection(
        "wanda bf16", values="*bf16", norms="*fp32", pruned="*bf16", kept=True
    )
    return [scoring, *pruning]
