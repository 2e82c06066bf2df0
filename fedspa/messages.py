"""What travels between clients and server: one block at a time, as bit masks and kept values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedspa_kernels import Compressed, compress, decompress, pack_mask, unpack_mask
from fedspa_kernels.checks import refuse


@dataclass(frozen=True)
class LayerMessage:
    """One pruned weight matrix of shape (rows, cols).

    bits: (rows, ceil(cols / 8)) uint8, the mask, eight positions a byte, True = kept.
    values: (kept,) the kept weights in row-major order, or None where the mask alone travels.
    kept: how many weights are kept, where the maker of a mask alone knew it; it does not travel.
    """

    shape: tuple[int, int]
    bits: Tensor
    values: Tensor | None
    kept: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the payload on the wire."""
        return self.bits.nbytes + (0 if self.values is None else self.values.nbytes)

    @property
    def pruned(self) -> int:
        """How many of its weights are pruned."""
        kept = self.kept if self.values is None else self.values.numel()
        if kept is None:
            kept = int(self.mask().sum())
        return self.shape[0] * self.shape[1] - kept

    def mask(self) -> Tensor:
        """The mask, (rows, cols) bool."""
        return unpack_mask(self.bits, self.shape[1])

    def weight(self) -> Tensor:
        """The weight, (rows, cols) in the dtype it travelled in, zero where it was pruned."""
        if self.values is None:
            raise ValueError("this message holds a mask alone (aggregation 'mask'), no weights")
        return decompress(Compressed(self.bits, self.values), self.shape)

    def received(self, dense: Tensor | None) -> Tensor:
        """What its receiver has then; of a mask alone it needs the dense weight (rows, cols)."""
        if self.values is None:
            assert dense is not None
            return dense.masked_fill(~self.mask().to(dense.device), 0)
        return self.weight()


@dataclass(frozen=True)
class BlockMessage:
    """A decoder block's pruned layers, from a client to the server or back.

    sender: the client's name, or "server". samples: calibration windows behind it (0 from the
    server). layers: by their names within the block. loss: the sum of the layers' pruning losses,
    0 from the server or where the pruner has none.
    """

    sender: str
    round: int
    block: int
    samples: int
    layers: dict[str, LayerMessage]
    loss: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' payloads."""
        return sum(layer.nbytes for layer in self.layers.values())


@dataclass(frozen=True)
class StatisticMessage:
    """What a client gathered from one input, for all layers that share it.

    layers: their names within the block. shape: of the whole statistic, such as (cols, cols).
    tokens: how many calibration tokens were added up.
    values: (numbers,) as a `sums.Sum` made them for sending.
    """

    layers: tuple[str, ...]
    shape: tuple[int, ...]
    tokens: int
    values: Tensor


@dataclass(frozen=True)
class StatisticsMessage:
    """The statistics of a decoder block's layers, from a client to the server.

    samples: calibration windows behind them.
    """

    sender: str
    round: int
    block: int
    samples: int
    statistics: tuple[StatisticMessage, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all statistics' payloads."""
        return sum(statistic.values.nbytes for statistic in self.statistics)


def pack_layer(
    weight: Tensor,
    mask: Tensor,
    dtype: torch.dtype | None,
    mask_only: bool,
    kept: int | None = None,
) -> LayerMessage:
    """A weight and its mask, both (rows, cols), as a message; dtype None keeps the weight's.

    kept: how many weights the mask keeps, where the caller knows it: no device is waited for then.
    """
    shape = (weight.shape[0], weight.shape[1])
    if mask_only:
        return LayerMessage(shape, pack_mask(mask), None, kept)
    packed = compress(weight if dtype is None else weight.to(dtype), mask, kept=kept)
    if dtype == torch.float16:
        refuse(packed.values.isinf().any(), partial(_explain_overflow, weight))
    return LayerMessage(shape, packed.bits, packed.values, packed.values.numel())


def _explain_overflow(weight: Tensor) -> None:
    raise ValueError(
        f"a weight of magnitude {float(weight.abs().max()):.3g} does not fit into messages of "
        f"float16; use message_dtype bfloat16 or float32"
    )
