"""Messages of small blocks, and frames written by hand, for the tests of the wire."""

import json
import struct
import zlib

import torch

from fedspa.messages import BlockMessage, StatisticMessage, StatisticsMessage, pack_layer
from fedspa.triangle import pack_triangle
from fedspa.wire import Envelope, Expected

ENVELOPE = Envelope(model="ab" * 32, run="cd" * 16, task="ef" * 16)
# Rows and columns that fill no byte, no vector and no multiple of the others.
SHAPES = {"q": (5, 13), "k": (3, 13), "v": (3, 13), "down": (13, 8), "one": (1, 1)}
MAGIC = b"\x8ffedspa\n"
PREFIX = 28


def block(
    dtype=torch.float32, *, mask_only=False, shapes=SHAPES, sparsity=0.5, seed=0
) -> BlockMessage:
    """A pruned block of random weights and masks."""
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=draw)
        mask = torch.rand(shape, generator=draw) >= sparsity
        layers[name] = pack_layer(weight.to(dtype), mask, None, mask_only)
    return BlockMessage("c1", 1, 2, 7, layers, loss=0.1 + seed)


def sums(dtype=torch.float32, kind="hessian", *, without=(), seed=0) -> StatisticsMessage:
    """Statistics of the same block, of 40 tokens; q, k and v share theirs."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for group in (("q", "k", "v"), ("down",), ("one",)):
        cols = SHAPES[group[0]][1]
        inputs = torch.randn(40, cols, generator=draw)
        statistic = inputs.T @ inputs
        if kind != "hessian":
            statistic = statistic.diagonal().contiguous()
        values = pack_triangle(statistic) if kind == "hessian" else statistic
        values = (values * 2**24).round().long() if dtype == torch.int64 else values.to(dtype)
        layers = tuple(name for name in group if name not in without)
        if layers:
            found.append(StatisticMessage(layers, tuple(statistic.shape), 40, values))
    return StatisticsMessage("c1", 1, 2, 7, tuple(found))


def expected(kind="weights", dtype=torch.float32, **other) -> Expected:
    """What is expected of the messages above."""
    given = {"sender": "c1", "round": 1, "block": 2, "samples": 7, "shapes": SHAPES}
    return Expected(**{"envelope": ENVELOPE, "kind": kind, "dtype": dtype, **given, **other})


def take_apart(frame: bytes) -> tuple[dict, bytes]:
    """A frame's header and payload, read as the layout in `wire/frame.py` says."""
    assert frame[:8] == MAGIC
    schema, header, payload, checksum = struct.unpack_from("<IIQI", frame, 8)
    assert (schema, len(frame)) == (1, PREFIX + header + payload)
    assert checksum == zlib.crc32(frame[8:24] + frame[PREFIX:])
    return json.loads(frame[PREFIX : PREFIX + header]), frame[PREFIX + header :]


def seal(header, payload: bytes, *, schema=1) -> bytes:
    """A frame of any header and payload, whose sizes and checksum are right."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(PREFIX + len(text)) % 64)
    sizes = struct.pack("<IIQ", schema, len(text), len(payload))
    checksum = struct.pack("<I", zlib.crc32(sizes + text + payload))
    return MAGIC + sizes + checksum + text + payload
