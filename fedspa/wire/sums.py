"""Statistics as frames: the numbers of all of a block's inputs, one behind the other."""

from __future__ import annotations

from math import prod
from typing import Any

from fedspa.messages import StatisticMessage, StatisticsMessage
from fedspa.triangle import triangle_size
from fedspa.wire.frame import read_frame, write_frame
from fedspa.wire.header import NAMES, Envelope, Expected, check_whole, field, shown

# Axes that a statistic of a user's own kind may have.
AXES = 8


def encode_statistics(message: StatisticsMessage, envelope: Envelope) -> bytes:
    """A block's statistics as a frame.

    Raises ValueError where there are none, or they have several dtypes or one that does not travel.
    """
    dtypes = {statistic.values.dtype for statistic in message.statistics}
    if len(dtypes) != 1 or not dtypes <= NAMES.keys():
        raise ValueError(
            f"{message.sender!r}, block {message.block}: {len(message.statistics)} statistics of "
            f"dtypes {sorted(map(str, dtypes))}; a frame takes one or more, all of one dtype of "
            f"{sorted(NAMES.values())}"
        )
    header = {
        "kind": "statistics",
        "model": envelope.model,
        "run": envelope.run,
        "task": envelope.task,
        "sender": message.sender,
        "round": message.round,
        "block": message.block,
        "samples": message.samples,
        "dtype": NAMES[dtypes.pop()],
        "statistics": [
            [list(of.layers), list(of.shape), of.tokens, of.values.numel()]
            for of in message.statistics
        ],
    }
    return write_frame(header, [statistic.values for statistic in message.statistics])


def decode_statistics(content: bytes | memoryview, expected: Expected) -> StatisticsMessage:
    """The statistics of a frame, in main memory that they share with the frame.

    Layers that no token reached, as an expert's, may be missing, but not all of them.
    Raises ValueError with a sentence where anything is not as it was expected.
    """
    assert expected.dtype is not None
    size = expected.dtype.itemsize
    # What a user's own sums come to is known only when they are there.
    limit = None if expected.kind == "sums" else _most_numbers(expected) * size
    header, payload = read_frame(content, expected, limit)
    described = _read_statistics(field(header, "statistics", expected.who), expected)
    total = sum(numbers for *_, numbers in described) * size
    if len(payload) != total:
        raise ValueError(
            f"{expected.who}: the payload has {len(payload)} bytes, and its statistics come to "
            f"{total}"
        )
    parts = payload.view(expected.dtype).split([numbers for *_, numbers in described])
    statistics = tuple(
        StatisticMessage(layers, shape, tokens, values)
        for (layers, shape, tokens, _), values in zip(described, parts, strict=True)
    )
    place = (expected.sender, expected.round, expected.block, header["samples"])
    return StatisticsMessage(*place, statistics)


Described = tuple[tuple[str, ...], tuple[int, ...], int, int]


def _most_numbers(expected: Expected) -> int:
    """The numbers that come where no two layers share an input."""
    columns = [cols for _, cols in expected.shapes.values()]
    return sum(map(triangle_size, columns)) if expected.kind == "hessian" else sum(columns)


def _read_statistics(described: Any, expected: Expected) -> list[Described]:
    """Layers, shape, tokens and numbers of each statistic, all checked."""
    if not isinstance(described, list) or not described:
        raise ValueError(
            f"{expected.who}: the frame's statistics are {shown(described)}, and not a list of one "
            f"or more"
        )
    found = []
    seen: set[str] = set()
    for one in described:
        if not isinstance(one, list) or len(one) != 4:
            raise ValueError(
                f"{expected.who}: a statistic is described as {shown(one)}, and not by 4 fields"
            )
        layers = _read_layers(one[0], seen, expected)
        where = f"{expected.who}, layer {' and '.join(layers)}"
        shape, tokens, numbers = _read_shape(layers, one, expected, where)
        found.append((layers, shape, tokens, numbers))
    return found


def _read_layers(names: Any, seen: set[str], expected: Expected) -> tuple[str, ...]:
    if not isinstance(names, list) or not names:
        raise ValueError(f"{expected.who}: a statistic is of layers {shown(names)}")
    for name in names:
        if not isinstance(name, str) or name not in expected.shapes or name in seen:
            twice = isinstance(name, str) and name in seen
            raise ValueError(
                f"{expected.who}: a statistic of layer {shown(name)} came "
                f"{'twice' if twice else 'unasked'}; the block has {sorted(expected.shapes)}"
            )
        seen.add(name)
    return tuple(names)


def _read_shape(
    layers: tuple[str, ...], described: list[Any], expected: Expected, where: str
) -> tuple[tuple[int, ...], int, int]:
    """Shape, tokens and numbers of a statistic, as its layers' inputs need them."""
    _, shape, tokens, numbers = described
    if not isinstance(shape, list) or len(shape) > AXES:
        raise ValueError(f"{where}: its statistic has shape {shown(shape)}")
    for length in shape:
        check_whole(length, "an axis of a statistic's shape", where)
    axes, wanted = tuple(shape), prod(shape)
    if expected.kind != "sums":
        columns = {expected.shapes[name][1] for name in layers}
        if len(columns) > 1:
            raise ValueError(
                f"{where}: they have {sorted(columns)} inputs, and cannot share a statistic"
            )
        (cols,) = columns
        needed = (cols, cols) if expected.kind == "hessian" else (cols,)
        if axes != needed:
            raise ValueError(
                f"{where}: its statistic has shape {axes}, and {expected.kind} of {cols} inputs "
                f"need {needed}; all must run with the same pruner"
            )
        wanted = triangle_size(cols) if expected.kind == "hessian" else cols
    check_whole(tokens, "tokens", where)
    if type(numbers) is not int or numbers != wanted or not numbers:
        raise ValueError(f"{where}: {shown(numbers)} numbers came, and {axes} needs {wanted}")
    return axes, tokens, numbers
