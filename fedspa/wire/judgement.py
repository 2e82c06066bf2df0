"""What a server checks of numbers before it adds them to those of others.

A frame that was decoded has the right shapes. Whether its numbers can be those of a client that did
its task is decided here, from them, the server's own weights and what others sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from fedspa.messages import BlockMessage, LayerMessage, StatisticMessage, StatisticsMessage
from fedspa.schedule import Target
from fedspa.sums import ONE, ROOM
from fedspa.triangle import PANEL, triangle_diagonal
from fedspa_kernels import unpack_mask
from fedspa_kernels.arguments import parse_pattern

# Numbers, or entries of a mask, that are computed with at a time: they stay in the cache.
PART = 2**18
# What rounding to bfloat16 may have added to a norm, as a share of it, and more.
ROUNDED = 2.0**-7
# How far an entry of a hessian may be above the root of its squares, as a share of that: bfloat16
# rounds each of the three by 2^-9, and sums in float32 are off by far less than 2^-10.
SLACK = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-10, torch.int64: 2.0**-10}
# Twice what one token's part of an entry may be rounded by, however small it is, in the numbers as
# they come: where float32 ends, and half a step of fixed point.
LEAST = {torch.bfloat16: 2.0**-125, torch.float32: 2.0**-125, torch.int64: 1.0}
# Fewer clients than these have no median that one of them could not move.
ENOUGH = 3


@torch.no_grad()
def judge_weights(
    message: BlockMessage,
    dense: Mapping[str, Tensor],
    target: Target,
    support: Mapping[str, Tensor] | None,
    norm_bound: float,
) -> None:
    """Refuse a pruned block that no client that did its task can have sent.

    dense: the block's weights (rows, cols) before this round, as the server holds them.
    target: what this client was asked to reach.
    support: (rows, cols) bool by layer, where former rounds left a weight; None: everywhere.
    norm_bound: how often a layer's norm may be that of its dense weights.
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
        if layer.values is not None:
            _judge_norm(layer.values, dense[name], norm_bound, where)


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


def _squares(values: Tensor) -> float:
    """The sum of squares in float64, a part at a time; any shape, dtype and strides."""
    flat = values.view(-1) if values.is_contiguous() else values
    step = max(1, PART * len(flat) // max(1, flat.numel()))
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for part in flat.split(step):
        wide = part.double().reshape(-1)
        total += torch.dot(wide, wide)
    return float(total)


@torch.no_grad()
def judge_statistics(
    message: StatisticsMessage, kind: str, limits: Mapping[tuple[str, ...], float] | None
) -> None:
    """Refuse statistics that are no sums over tokens, of floats or in fixed point.

    kind: of the statistic, one of `pruners.SUMS`.
    limits: from `square_limits`, or None: the others' are not known yet.
    Raises ValueError naming the sender, the block and the layers where no token was counted, where
    numbers are NaN, infinite or leave no room to add others, where squares are negative, where an
    entry of a hessian is larger than the root of its two squares allows (Cauchy and Schwarz), or
    where the mean square is above its limit.
    """
    for statistic in message.statistics:
        where = _where(message, statistic)
        if statistic.tokens < 1:
            raise ValueError(f"{where}: its statistics count {statistic.tokens} tokens")
        least, most = (float(extreme) for extreme in statistic.values.aminmax())
        # NaN compares as false.
        room = math.inf if statistic.values.is_floating_point() else ROOM
        if not (-room < least and most < room):
            raise ValueError(
                f"{where}: statistics are NaN, infinite or too large to be added ({least:.3g} to "
                f"{most:.3g})"
            )
        if kind == "hessian":
            least = float(_squares_of(statistic, kind).amin())
        if kind != "sums" and least < 0:
            raise ValueError(f"{where}: a sum of squares is {least:.3g}, and none is negative")
        if kind == "hessian":
            _judge_products(statistic, where)
    if limits is not None:
        judge_mean_squares(message, mean_squares(message, kind), limits)


def judge_mean_squares(
    message: StatisticsMessage,
    found: Mapping[tuple[str, ...], float],
    limits: Mapping[tuple[str, ...], float],
) -> None:
    """Raise ValueError where a mean square, as `mean_squares` found it, is above its limit."""
    for statistic in message.statistics:
        limit = limits.get(statistic.layers, math.inf)
        if found[statistic.layers] > limit:
            raise ValueError(
                f"{_where(message, statistic)}: the mean square of its inputs is "
                f"{found[statistic.layers]:.3g}, and {limit:.3g} at most is believed beside those "
                f"of the other clients; a larger norm_bound would let it pass"
            )


def mean_squares(message: StatisticsMessage, kind: str) -> dict[tuple[str, ...], float]:
    """The mean square per token and input of each statistic; of other sums the mean magnitude."""
    found = {}
    for statistic in message.statistics:
        values = _squares_of(statistic, kind)
        count = max(1, values.numel() * statistic.tokens)
        scale = 1.0 if values.is_floating_point() else ONE
        total = values.abs().sum(dtype=torch.float64)
        found[statistic.layers] = float(total) / scale / count
    return found


def square_limits(
    found: Sequence[Mapping[tuple[str, ...], float]], bound: float
) -> dict[tuple[str, ...], float]:
    """Up to which mean square a statistic is believed: bound² times the clients' median.

    found: what `mean_squares` found of each client that sent the block.
    returns: for the layers of every statistic; infinite where fewer than three clients sent it, or
        where the median is 0, which is no scale.
    """
    keys = {key: None for squares in found for key in squares}
    limits = {}
    for key in keys:
        values = [squares[key] for squares in found if math.isfinite(squares.get(key, math.inf))]
        middle = median(values) if len(values) >= ENOUGH else 0.0
        limits[key] = bound**2 * middle if middle else math.inf
    return limits


def _where(message: StatisticsMessage, statistic: StatisticMessage) -> str:
    layers = " and ".join(statistic.layers)
    return f"{message.sender!r}, block {message.block}, layer {layers}"


def _squares_of(statistic: StatisticMessage, kind: str) -> Tensor:
    """The numbers of a statistic that are sums of squares, or all of other sums, as they came."""
    if kind == "hessian":
        return triangle_diagonal(statistic.values, statistic.shape[0])
    return statistic.values


def _judge_products(statistic: StatisticMessage, where: str) -> None:
    """Refuse h_ij² > h_ii h_jj, a panel of the packed triangle at a time."""
    cols, dtype = statistic.shape[0], statistic.values.dtype
    left, odd = (cols + 1) // 2, cols % 2
    folded = statistic.values.view(-1, max(1, left))
    # Of squares that were rounded to 0 the products with others need not be 0. What an entry itself
    # is rounded by is in it too: (x² + d)(y² + d) >= (xy + d)².
    squares = triangle_diagonal(statistic.values, cols).double() + LEAST[dtype] * statistic.tokens
    roots = (squares.sqrt() * (1 + SLACK[dtype]) ** 0.5).float()
    # A row of the packed triangle holds parts of two rows: these are their roots, and those of the
    # columns of the second one.
    below = torch.cat([roots.new_zeros(1 - odd), roots])
    right = torch.cat([roots.new_zeros(odd), roots[left:]])
    for begin in range(0, len(folded), PANEL):
        part = folded[begin : begin + PANEL]
        most = below[begin : begin + len(part), None] * roots[:left]
        upper = roots[left + begin : left + begin + len(part), None] * right
        # The first row's part ends at this column, and those of the others one further each.
        last = begin + odd - 1
        most[: len(upper)] = most[: len(upper)].tril(last) + upper.triu(last + 1)
        wrong = part.abs() > most
        if wrong.any():
            raise ValueError(
                f"{where}: an entry of its hessian is {float(part[wrong][0]):.4g}, and the squares "
                f"on the diagonal allow {float(most[wrong][0]):.4g}; it is no sum of products"
            )
