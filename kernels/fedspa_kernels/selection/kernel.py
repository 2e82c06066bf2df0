"""What a kernel of this family computes, and how the operator calls it.

smallest_mask(scores, k) -> (mask, invalid)
    scores:  (groups, n) float32, float16 or bfloat16, contiguous
    mask:    (groups, n) bool, True at exactly the k smallest of each row
    invalid: (1,) int32, not 0 where a score is NaN; the mask is then nothing
"""

from functools import partial
from typing import Any

from torch import Tensor

from fedspa_kernels.checks import refuse
from fedspa_kernels.selection.values import check_scores


def smallest_mask(kernels: Any, scores: Tensor, k: int) -> Tensor:
    """Select, and refuse what the kernel has found to be NaN."""
    mask, invalid = kernels.smallest_mask(scores.contiguous(), k)
    refuse(invalid, partial(check_scores, scores))
    return mask
