"""Selection in Triton: exactly the k first of each group, whatever the size of the groups."""

from typing import Any

import torch
from torch import Tensor

from fedspa_kernels.launch import Compilation, device_guard
from fedspa_kernels.selection.triton_groups import LONGEST_ON_CHIP, describe_groups, launch_groups
from fedspa_kernels.selection.triton_keys import Entries
from fedspa_kernels.selection.triton_radix import describe_radix, launch_radix
from fedspa_kernels.selection.triton_rows import LONGEST_ROW, describe_rows, launch_rows


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


def describe_selection(
    variant: str,
    *,
    kept: bool,
    values: str | None = None,
    norms: str | None = None,
    votes: str | None = None,
    pruned: str | None = None,
) -> list[Compilation]:
    """Describe every kernel that `select` can launch on entries of these types."""
    pointers = {"values": values, "norms": norms, "votes": votes, "pruned": pruned}
    types = {name: pointer for name, pointer in pointers.items() if pointer}
    types |= {"mask": "*i1", "invalid": "*i32"}
    types |= dict.fromkeys(("counts", "state", "ties", "ties_before"), "*i64")
    types |= dict.fromkeys(("groups", "chunks", "n", "k", "width", "clients"), "i32")
    types |= dict.fromkeys(("level", "bits_before", "shift", "bits"), "i32")
    constants: dict[str, Any] = {"NORMS_OF_ROWS": False, "KEPT": kept}
    constants |= {name: None for name, pointer in pointers.items() if pointer is None}
    return [
        *describe_groups(variant, types, **constants),
        *describe_rows(variant, types, **constants),
        *describe_radix(variant, types, **constants),
    ]


def compilations() -> list[Compilation]:
    """Describe the kernels of float32 scores; those of 16-bit scores differ in their loads."""
    return describe_selection("fp32", values="*fp32", kept=False)
