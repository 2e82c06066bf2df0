"""What a server checks of a client's statistics before it adds them to those of others.

A frame that was decoded has the right shapes. Whether its numbers can be sums over tokens is
decided here, from them and from what other clients sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from fedspa.messages import StatisticMessage, StatisticsMessage
from fedspa.statistics import raise_rounded_
from fedspa.sums import ONE, ROOM, from_fixed
from fedspa.triangle import PANEL, triangle_diagonal, unpack_triangle

# How far an entry of a hessian may be above the root of its squares, as a share of that: bfloat16
# rounds each of the three by 2^-9, and sums in float32 are off by far less than 2^-10.
SLACK = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-10, torch.int64: 2.0**-10}
# Twice what one token's part of an entry may be rounded by, however small it is, in the numbers as
# they come: where float32 ends, and half a step of fixed point.
LEAST = {torch.bfloat16: 2.0**-125, torch.float32: 2.0**-125, torch.int64: 1.0}
# Fewer clients than these have no median that one of them could not move.
ENOUGH = 3


@torch.no_grad()
def judge_statistics(message: StatisticsMessage, kind: str) -> None:
    """Refuse statistics that are no sums over tokens, of floats or in fixed point.

    kind: of the statistic, one of `pruners.SUMS`.
    Raises ValueError naming the sender, the block and the layers where no token was counted, where
    numbers are NaN, infinite or leave no room to add others, where squares are negative, or where
    an entry of a hessian is larger than the root of its two squares allows (Cauchy and Schwarz).
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


@torch.no_grad()
def judge_definite(message: StatisticsMessage, damping: float) -> None:
    """Refuse hessians that are not positive definite after damping, as every real one is.

    damping: share of the mean diagonal that the pruner adds to it. It costs a factorisation of
    cols**3 / 3 for each hessian, so that it is for sums which turned out not to be definite.
    Raises ValueError naming the sender, the block and the layers.
    """
    for statistic in message.statistics:
        matrix = unpack_triangle(from_fixed(statistic.values), statistic.shape[0])
        if statistic.values.dtype == torch.bfloat16:
            raise_rounded_(matrix)
        diagonal = matrix.diagonal()
        # The pruner divides by the columns that were reached, of which the sum may have more: with
        # all columns, what passes here has a sum that passes too.
        mean = diagonal.sum(dtype=torch.float64) / len(diagonal)
        # What is 0 was never reached, and has no part in the factor.
        diagonal.add_(damping * float(mean)).masked_fill_(diagonal == 0, 1.0)
        if int(torch.linalg.cholesky_ex(matrix).info):
            raise ValueError(
                f"{_where(message, statistic)}: its hessian is not positive definite after damping "
                f"{damping:g}, which no sum of products is"
            )
