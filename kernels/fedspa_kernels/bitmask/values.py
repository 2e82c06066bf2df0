"""The bits and values that unpacking refuses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedspa_kernels.checks import refuse


def check_padding(operator: str, bits: Sequence[Tensor], n: int) -> None:
    """Raise ValueError where a bit beyond the width n is set in one of these packed masks."""
    if not n % 8:
        return
    beyond = torch.stack([(packed[..., -1] >> n % 8).any() for packed in bits]).any()

    def explain() -> None:
        raise ValueError(
            f"{operator}: a bit beyond the width {n} is set; the bits are damaged, "
            "or were packed from a wider mask or in big bit order"
        )

    refuse(beyond, explain)


def check_count(operator: str, kept: int, values: Tensor, whose: str = "") -> None:
    """Raise ValueError where there are more or fewer values than bits."""
    if kept != len(values):
        raise ValueError(
            f"{operator}: the bits{whose} keep {kept} weights and there are {len(values)} values; "
            "pass the bits and values of one compress call"
        )


def check_kept(counted: int, kept: int | None) -> None:
    """Raise ValueError where a caller's number of kept weights is not the mask's."""
    if kept is not None and counted != kept:
        raise ValueError(
            f"compress: kept is {kept} and the mask keeps {counted}; pass the number of True in "
            "the mask, or leave it out"
        )
