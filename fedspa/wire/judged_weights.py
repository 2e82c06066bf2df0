"""What a server checks of a pruned block's numbers before it adds them to those of others.

A frame that was decoded has the right shapes. Whether its numbers can be those of a client that did
its task is decided here, from them and the server's own weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedspa.messages import BlockMessage, LayerMessage
from fedspa.schedule import Target
from fedspa_kernels import compress, unpack_mask
from fedspa_kernels.arguments import parse_pattern

# Numbers, or entries of a mask, that are computed with at a time: they stay in the cache.
PART = 2**18
# What rounding to bfloat16 may have added to a norm, as a share of it, and more.
ROUNDED = 2.0**-7


@torch.no_grad()
def judge_weights(
    message: BlockMessage,
    dense: Mapping[str, Tensor],
    target: Target,
    support: Mapping[str, Tensor] | None,
    norm_bound: float,
    *,
    unchanged: bool = False,
) -> None:
    """Refuse a pruned block that no client that did its task can have sent.

    dense: the block's weights (rows, cols) before this round, as the server holds them.
    target: what this client was asked to reach.
    support: (rows, cols) bool by layer, where former rounds left a weight; None: everywhere.
    norm_bound: how often a layer's norm may be that of its dense weights, and a row's that of its
        own and of the mean row together.
    unchanged: whether the pruner leaves the weights that it keeps as they are.
    Raises ValueError naming the sender, the block and the layer where values are NaN or infinite or
    beyond the bound, where a weight is kept that a former round pruned, or where too many or too
    few weights are pruned, in a layer or in a group of a pattern. Pruners round their counts down
    by row, column or block of columns, so that a layer may be off by max(rows, cols) weights.
    """
    for name, layer in message.layers.items():
        where = f"{message.sender!r}, block {message.block}, layer {name}"
        kept_before = None if support is None else support[name]
        if kept_before is not None or target.pattern is not None:
            _judge_mask(layer, target, kept_before, where)
        _judge_count(layer, target, kept_before, where)
        if layer.values is None:
            continue
        if unchanged:
            _judge_same(layer, layer.values, dense[name], where)
        else:
            _judge_norm(layer.values, dense[name], norm_bound, where)
            _judge_rows(layer, dense[name], norm_bound, where)


def judge_finite(message: BlockMessage) -> None:
    """Raise ValueError where a weight is NaN or infinite; masks alone pass."""
    for name, layer in message.layers.items():
        if layer.values is not None and not math.isfinite(_squares(layer.values)):
            where = f"{message.sender!r}, block {message.block}, layer {name}"
            raise ValueError(f"{where}: weights are NaN or infinite")


def _judge_count(layer: LayerMessage, target: Target, support: Tensor | None, where: str) -> None:
    rows, cols = layer.shape
    size = rows * cols
    if target.pattern is None:
        assert target.sparsity is not None
        wanted, slack = size * target.sparsity, max(rows, cols)
    else:
        kept, of = parse_pattern(where, target.pattern, cols)
        wanted, slack = size * (1 - kept / of), 0
    before = 0 if support is None else size - int(support.count_nonzero())
    least, most = wanted - slack, max(before, wanted + slack)
    # A share of many weights is not exact as a float.
    if not least - 0.5 <= layer.pruned <= most + 0.5:
        raise ValueError(
            f"{where}: {layer.pruned} of {size} weights are pruned, and the task was to prune "
            f"{max(0, math.ceil(least))} to {min(size, math.floor(most))} of them"
        )


def _judge_mask(layer: LayerMessage, target: Target, support: Tensor | None, where: str) -> None:
    rows, cols = layer.shape
    step = max(1, PART // cols)
    for begin in range(0, rows, step):
        mask = unpack_mask(layer.bits[begin : begin + step], cols)
        if support is not None:
            allowed = support[begin : begin + step].to(mask.device)
            if again := int((mask > allowed).count_nonzero()):
                raise ValueError(
                    f"{where}: {again} weights from row {begin} on are kept that a former round "
                    f"pruned; they have to stay pruned"
                )
        if target.pattern is not None:
            kept, of = parse_pattern(where, target.pattern, cols)
            most = int(mask.view(-1, of).sum(1, dtype=torch.int32).amax())
            if most > kept:
                raise ValueError(
                    f"{where}: {most} of {of} neighbours are kept from row {begin} on, and the "
                    f"pattern {target.pattern} keeps {kept}"
                )


def _judge_norm(values: Tensor, dense: Tensor, bound: float, where: str) -> None:
    squares = _squares(values)
    # NaN and infinity go through a sum of squares.
    if not math.isfinite(squares):
        raise ValueError(f"{where}: weights are NaN or infinite")
    norm, most = math.sqrt(squares), bound * math.sqrt(_squares(dense))
    if norm > most * (1 + ROUNDED):
        raise ValueError(
            f"{where}: the norm of its weights is {norm:.4g}, and {most:.4g} at most is believed, "
            f"{bound:g} times that of the dense weights; a larger norm_bound would let it pass"
        )


def _judge_same(layer: LayerMessage, values: Tensor, dense: Tensor, where: str) -> None:
    """Refuse weights that are not the dense ones, which pruning by a mask alone leaves alone."""
    own = compress(dense.to(values.dtype), layer.mask()).values
    # NaN is unlike everything.
    if not torch.equal(own, values):
        raise ValueError(
            f"{where}: it keeps weights that are not the model's, which its pruner does not change"
        )


def _judge_rows(layer: LayerMessage, dense: Tensor, bound: float, where: str) -> None:
    """Refuse a row whose norm is absurd, which the layer's may hide."""
    own = _row_norms(dense)
    most = bound * (own + own.square().mean().sqrt()) * (1 + ROUNDED)
    norms = _row_norms(layer.weight())
    if bool((norms > most).any()):
        row = int((norms - most).argmax())
        raise ValueError(
            f"{where}: the norm of its row {row} is {float(norms[row]):.4g}, and "
            f"{float(most[row]):.4g} at most is believed; a larger norm_bound would let it pass"
        )


def _row_norms(weight: Tensor) -> Tensor:
    """The norm of every row in float64, some rows at a time."""
    step = max(1, PART // max(1, weight.shape[1]))
    return torch.cat([rows.double().norm(dim=1) for rows in weight.split(step)])


def _squares(values: Tensor) -> float:
    """The sum of squares in float64, a part at a time; any shape, dtype and strides."""
    flat = values.view(-1) if values.is_contiguous() else values
    step = max(1, PART * len(flat) // max(1, flat.numel()))
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for part in flat.split(step):
        wide = part.double().reshape(-1)
        total += torch.dot(wide, wide)
    return float(total)
