"""Groups that fit on chip: one pass, many small groups or one long one per program."""

import triton
import triton.language as tl
from torch import Tensor

from fedspa_kernels.selection.triton_keys import (
    NUM_STAGES,
    OUTSIDE,
    Entries,
    joined,
    num_warps,
    report,
    value_keys,
    vote_keys,
    wrap,
    write,
)
from fedspa_kernels.selection.triton_search import RANKED, first_of, kth_key

# (entries of a group, groups of a program, threads). A thread has 16 keys, because with them come
# as many addresses and masks; 16,384 keys spill registers on 1024 threads, and on 512.
CONFIGURATIONS = (
    (4, 256, 128),
    (8, 256, 128),
    (32, 16, 128),
    (64, 16, 128),
    (256, 4, 128),
    (1024, 2, 128),
    (2048, 1, 128),
    (4096, 1, 256),
    (8192, 1, 512),
)
LONGEST_ON_CHIP = CONFIGURATIONS[-1][0]


@triton.jit
def select_groups(
    values,
    norms,
    votes,
    mask,
    pruned,
    invalid,
    groups,
    n,
    k,
    width,
    clients,
    WRAP: tl.constexpr,
    NORMS_OF_ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mark the k first of every n entries; `mask` is True there, or with KEPT everywhere else."""
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    base = (group * n)[:, None]
    position = tl.arange(0, BLOCK)[None, :]
    inside = (group < groups)[:, None] & (position < n)

    if votes is not None:
        vote, wrong = vote_keys(votes, base, position, inside, clients)
        report(invalid, wrong)
        # Before the values are loaded, so that registers never hold the keys of both.
        if values is not None and BLOCK > RANKED:
            threshold, upto = kth_key(vote, k)
    if values is not None:
        value, wrong = value_keys(values, norms, base, position, inside, width, WRAP, NORMS_OF_ROWS)
        report(invalid, wrong)

    if votes is None:
        keys = value
    elif values is None:
        keys = vote
    elif BLOCK > RANKED:
        keys = _among_tied(vote, value, threshold, upto, k)
    else:
        keys = joined(vote, value)
    chosen = first_of(keys, k, BLOCK)
    if votes is not None and BLOCK <= RANKED:
        chosen |= vote == 0

    # Asked of the keys, because registers do not hold `inside` through the search as well.
    if BLOCK > RANKED:
        inside = keys != OUTSIDE
    write(values, mask, pruned, base + position, inside, chosen, KEPT)


@triton.jit
def _among_tied(vote, value, threshold, upto, k):
    """Leave to the values what the votes have not decided: some entries go first, others last."""
    threshold = threshold[:, None]
    decided = (upto == k)[:, None]
    goes = (vote < threshold) | (vote == 0) | (decided & (vote == threshold))
    stays = tl.where(vote == OUTSIDE, OUTSIDE, OUTSIDE - 1)
    return tl.where(goes, 0, tl.where(vote == threshold, value, stays))


def launch_groups(
    entries: Entries,
    of: int,
    count: int,
    mask: Tensor,
    pruned: Tensor | None,
    invalid: Tensor,
    kept: bool,
) -> None:
    """Fill mask, pruned and invalid for runs of `of` entries, LONGEST_ON_CHIP at most."""
    block, rows, threads = next(each for each in CONFIGURATIONS if each[0] >= of)
    values, norms, votes, width, norms_of_rows, clients = entries
    groups = mask.numel() // of
    sizes = (groups, of, count, width, clients)
    ways = (wrap(entries, of, block), norms_of_rows, kept, rows, block)
    options = {"num_warps": num_warps(threads), "num_stages": NUM_STAGES}
    grid = (triton.cdiv(groups, rows),)
    select_groups[grid](values, norms, votes, mask, pruned, invalid, *sizes, *ways, **options)
