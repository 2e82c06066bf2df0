"""Pruned blocks as frames: the kept values of all layers, and behind them the masks of all."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fedspa.messages import BlockMessage, LayerMessage
from fedspa.wire.frame import read_frame, write_frame
from fedspa.wire.header import NAMES, Envelope, Expected, check_whole, field, shown

# Bytes of a mask that are counted at a time: they stay in the cache with their temporaries.
PART = 2**16


def encode_weights(message: BlockMessage, envelope: Envelope) -> bytes:
    """A pruned block as a frame.

    Raises ValueError where only some layers have values, where they have several dtypes or one
    that does not travel, or where the loss is not finite or negative.
    """
    who = f"{message.sender!r}, block {message.block}"
    layers = message.layers.values()
    values = [layer.values for layer in layers if layer.values is not None]
    dtypes = {value.dtype for value in values}
    if values and (len(values) < len(layers) or len(dtypes) > 1 or not dtypes <= NAMES.keys()):
        raise ValueError(
            f"{who}: {len(values)} of {len(layers)} layers have values, of dtypes "
            f"{sorted(map(str, dtypes))}; a frame takes all of one dtype or none, so set a "
            f"message_dtype"
        )
    header = {
        "kind": "weights" if values else "mask",
        "model": envelope.model,
        "run": envelope.run,
        "task": envelope.task,
        "sender": message.sender,
        "round": message.round,
        "block": message.block,
        "samples": message.samples,
        "loss": _check_loss(float(message.loss), who),
        "dtype": NAMES[values[0].dtype] if values else None,
        "layers": [
            [
                name,
                *layer.shape,
                _kept(layer.bits.cpu()) if layer.values is None else len(layer.values),
            ]
            for name, layer in message.layers.items()
        ],
    }
    return write_frame(header, values + [layer.bits for layer in layers])


def decode_weights(content: bytes | memoryview, expected: Expected) -> BlockMessage:
    """The pruned block of a frame, in main memory that it shares with the frame.

    Its layers come in the order in which they were expected, whatever that of the frame is.
    Raises ValueError with a sentence where anything is not as it was expected.
    """
    size = 0 if expected.dtype is None else expected.dtype.itemsize
    limit = sum(rows * (cols * size + _width(cols)) for rows, cols in expected.shapes.values())
    header, payload = read_frame(content, expected, limit)
    loss = _check_loss(field(header, "loss", expected.who), expected.who)
    kept = _read_layers(field(header, "layers", expected.who), expected)
    masks = sum(rows * _width(cols) for rows, cols in expected.shapes.values())
    if len(payload) != sum(kept.values()) * size + masks:
        raise ValueError(
            f"{expected.who}: the payload has {len(payload)} bytes, and {sum(kept.values())} kept "
            f"weights with their masks come to {sum(kept.values()) * size + masks}"
        )
    numbers, bits = payload.split([len(payload) - masks, masks])
    found, value, mask = {}, 0, 0
    for name, count in kept.items():
        rows, cols = expected.shapes[name]
        layer_bits = bits[mask : mask + rows * _width(cols)].view(rows, _width(cols))
        mask += layer_bits.numel()
        _check_bits(layer_bits, cols, count, f"{expected.who}, layer {name}")
        values = None
        if expected.dtype is not None:
            values = numbers[value : value + count * size].view(expected.dtype)
            value += count * size
        found[name] = LayerMessage((rows, cols), layer_bits, values, count)
    layers = {name: found[name] for name in expected.shapes}
    samples = header["samples"]
    return BlockMessage(expected.sender, expected.round, expected.block, samples, layers, loss)


def _read_layers(described: Any, expected: Expected) -> dict[str, int]:
    """How many weights each layer keeps, in the order of the frame."""
    who = expected.who
    if not isinstance(described, list):
        raise ValueError(f"{who}: the frame's layers are {shown(described)}, and not a list")
    kept: dict[str, int] = {}
    for layer in described:
        if not isinstance(layer, list) or len(layer) != 4 or not isinstance(layer[0], str):
            raise ValueError(f"{who}: a layer is described as {shown(layer)}, and not by 4 fields")
        name, rows, cols, count = layer
        if name not in expected.shapes or name in kept:
            raise ValueError(
                f"{who}: layer {shown(name)} came {'twice' if name in kept else 'unasked'}; the "
                f"block has {sorted(expected.shapes)}"
            )
        check_whole(rows, f"of layer {name} rows", who)
        check_whole(cols, f"of layer {name} columns", who)
        if (rows, cols) != expected.shapes[name]:
            raise ValueError(
                f"{who}, layer {name}: its shape is {(rows, cols)}, and the model's is "
                f"{expected.shapes[name]}; load the very checkpoint that the server has"
            )
        kept[name] = check_whole(count, f"of layer {name} kept weights", who)
        if count > rows * cols:
            raise ValueError(f"{who}, layer {name}: {count} of {rows * cols} weights are kept")
    missing = [name for name in expected.shapes if name not in kept]
    if missing:
        raise ValueError(f"{who}: the layers {missing} are missing from the frame")
    return kept


def _check_loss(loss: Any, who: str) -> float:
    if type(loss) is not float or not 0 <= loss < math.inf:
        raise ValueError(f"{who}: the loss is {shown(loss)}, and not a finite number >= 0")
    return loss


def _check_bits(bits: Tensor, cols: int, count: int, where: str) -> None:
    if cols % 8 and bool((bits[:, -1] >> cols % 8).any()):
        raise ValueError(f"{where}: bits of its mask are set behind its last column {cols - 1}")
    kept = _kept(bits)
    if kept != count:
        raise ValueError(f"{where}: {count} weights came, and the mask keeps {kept}")


def _kept(bits: Tensor) -> int:
    """How many bits are set, any shape of uint8: sums of 1, 2, then 4 neighbouring bits a byte."""
    total = 0
    for part in bits.reshape(-1).split(PART):
        pairs = part - ((part >> 1) & 0x55)
        fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
        total += int(((fours + (fours >> 4)) & 0x0F).sum())
    return total


def _width(cols: int) -> int:
    """Bytes of a row of a mask."""
    return (cols + 7) // 8
