"""What the operators return when it is more than one tensor."""

from typing import NamedTuple

from torch import Tensor


class Pruned(NamedTuple):
    """A pruned weight, the mask of what was kept (True), and what the pruning cost, if known."""

    weight: Tensor
    mask: Tensor
    loss: Tensor | None


class Average(NamedTuple):
    """An ℓ0 average, and how many clients kept each of its entries (int32)."""

    weight: Tensor
    votes: Tensor


class Compressed(NamedTuple):
    """A sparse tensor: eight mask bits a byte (uint8), and the kept values in row-major order."""

    bits: Tensor
    values: Tensor
