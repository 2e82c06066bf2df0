"""What the kernels of this family compute, and how the operators call them.

wanda_scores(weight, norms) -> (scores, invalid)
    weight:  (rows, cols) float32, float16 or bfloat16, contiguous, as in all that follows
    norms:   (cols,) float32
    scores:  (rows, cols) float32
    invalid: (1,) int32, not 0 where a norm is negative or not finite; the rest is then nothing

wanda_prune(weight, norms, norms_of_rows, of, count) -> (pruned, mask, invalid)
    norms:   (cols,), or (rows,) with norms_of_rows: each meets a whole row
    of:      a group is a run of so many entries of the row-major weight: cols for the rows,
             rows·cols for the layer, m for a pattern n:m; count of each go
    pruned:  (rows, cols), the weight's dtype
    mask:    (rows, cols) bool, True = kept
    invalid: also where a weight is not finite
"""

from functools import partial
from typing import Any

from torch import Tensor

from fedspa_kernels.checks import refuse
from fedspa_kernels.counts import at_most, of_group
from fedspa_kernels.wanda.values import check_norms, check_weight


def wanda_scores(kernels: Any, weight: Tensor, norms: Tensor) -> Tensor:
    """Score, and refuse what the kernel has found to be no norm."""
    scores, invalid = kernels.wanda_scores(weight.contiguous(), norms.float().contiguous())
    refuse(invalid, partial(check_norms, "wanda_scores", norms))
    return scores


def wanda_prune(
    kernels: Any,
    weight: Tensor,
    norms: Tensor,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Lay the groups out as runs of entries, prune, and refuse what the kernel found wrong.

    Columns become rows by three transposed copies: of the weight, and of both results.
    """
    of_columns = group == "column"
    entries = (weight.T if of_columns else weight).contiguous()
    entries_of_group = entries.numel() if group == "layer" else entries.shape[1]
    of, count = of_group(entries_of_group, sparsity, pattern, at_most)
    pruned, mask, invalid = kernels.wanda_prune(
        entries, norms.float().contiguous(), of_columns, of, count
    )
    refuse(invalid, partial(_explain, weight, norms))
    return (pruned.T.contiguous(), mask.T.contiguous()) if of_columns else (pruned, mask)


def _explain(weight: Tensor, norms: Tensor) -> None:
    check_norms("wanda_prune", norms)
    check_weight(weight)
