"""Selection in Triton: exactly the k first of each group, whatever the size of the groups."""

import torch
from torch import Tensor

from fedspa_kernels.launch import Compilation, device_guard
from fedspa_kernels.selection.triton_describe import describe_selection
from fedspa_kernels.selection.triton_groups import LONGEST_ON_CHIP, launch_groups
from fedspa_kernels.selection.triton_keys import Entries
from fedspa_kernels.selection.triton_radix import launch_radix
from fedspa_kernels.selection.triton_rows import LONGEST_ROW, launch_rows


def smallest_mask(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mark exactly the k smallest of each row; ties to the lower index.

    scores:  (groups, n) float32, float16 or bfloat16, contiguous
    returns: (groups, n) bool, and `invalid` (1,) int32, not 0 where scores hold NaN
    """
    mask, invalid = select(Entries(values=scores), scores.shape[1], k, kept=False)
    return mask.view(scores.shape), invalid


def select(
    entries: Entries, of: int, count: int, *, kept: bool, pruned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the `count` first of each run of `of` entries, and every entry without a vote.

    kept:    what the mask marks: the entries that were chosen (False), or all the others (True)
    pruned:  written, if given: the values, with 0 in place of the chosen ones
    returns: mask (entries,) bool, and `invalid` (1,) int32, not 0 where an entry has no order
    """
    source = entries.values if entries.votes is None else entries.votes
    assert source is not None, "entries have values or votes"
    mask = torch.empty(source.numel(), dtype=torch.bool, device=source.device)
    invalid = torch.zeros(1, dtype=torch.int32, device=source.device)
    if mask.numel():
        if of <= LONGEST_ON_CHIP:
            launch = launch_groups
        elif of <= LONGEST_ROW:
            launch = launch_rows
        else:
            launch = launch_radix
        with device_guard(source):
            launch(entries, of, count, mask, pruned, invalid, kept)
    return mask, invalid


def compilations() -> list[Compilation]:
    """Describe the kernels of float32 scores; those of 16-bit scores differ in their loads."""
    return describe_selection("fp32", values="*fp32", kept=False)
