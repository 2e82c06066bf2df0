"""A message as bytes: what the frame says of itself, a header, a payload, and their checksum.

    magic      8 bytes
    schema     uint32    changes whenever bytes of one version would be misread by another
    header     uint32    its bytes
    payload    uint64    its bytes
    checksum   uint32    CRC-32 of all bytes but these four and the magic
    header               JSON, filled up with spaces so that the payload begins at a multiple of 64
    payload              numbers one behind the other, all little endian

What arrives was written by somebody else. Nothing of it is believed: every size is compared with
what was asked before anything is made of it, and whatever the bytes are, `ValueError` is all that
comes of them.
"""

from __future__ import annotations

import json
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspa.streaming.pieces import bytes_of
from fedspa.wire.header import Expected, check_header, shown

MAGIC = b"\x8ffedspa\n"
SCHEMA = 1
HEADER_LIMIT = 2**20
# Of the payload within a frame, which suits every dtype and every vector unit.
ALIGNMENT = 64
_SIZES = struct.Struct("<IIQ")
_CHECKSUM = struct.Struct("<I")
_PREFIX = len(MAGIC) + _SIZES.size + _CHECKSUM.size


def write_frame(header: Mapping[str, Any], pieces: Sequence[Tensor]) -> bytes:
    """A frame of a header and the numbers behind it, copied once.

    pieces: of any shape, strides and device; contiguous ones in main memory are not copied before
    raises: ValueError where the header is too large
    """
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    text += b" " * (-(_PREFIX + len(text)) % ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise ValueError(
            f"the header of a block comes to {len(text)} bytes, and a frame takes {HEADER_LIMIT}; "
            f"shorten the names of its layers"
        )
    contents: list[bytes | memoryview] = [bytes_of(_in_a_row(p)) for p in pieces if p.numel()]
    sizes = _SIZES.pack(SCHEMA, len(text), sum(map(len, contents)))
    checksum = 0
    for content in [sizes, text, *contents]:
        checksum = zlib.crc32(content, checksum)
    return b"".join([MAGIC, sizes, _CHECKSUM.pack(checksum), text, *contents])


def _in_a_row(piece: Tensor) -> Tensor:
    """The numbers of a tensor in main memory, one behind the other: (numbers,)."""
    piece = piece.detach().cpu().contiguous()
    # One number is contiguous at any stride, and then has no bytes to look at.
    return piece.as_strided((piece.numel(),), (1,))


def read_frame(
    content: bytes | memoryview, expected: Expected, payload_limit: int | None
) -> tuple[dict[str, Any], Tensor]:
    """The header of a frame, compared with what was expected, and its payload, not copied.

    payload_limit: bytes that the payload comes to at most; None: those that are there
    returns:       the header, of which envelope, sender, round, block, samples and dtype are
                   checked, and the payload, (bytes,) uint8, which is not to be written to
    raises:        ValueError with a sentence that names the sender, the block and the values
    """
    view = memoryview(content).cast("B")
    begin = _check_sizes(view, expected.who, payload_limit)
    checksum = zlib.crc32(view[begin:], zlib.crc32(view[_PREFIX:begin], _sizes_checksum(view)))
    (written,) = _CHECKSUM.unpack_from(view, _PREFIX - _CHECKSUM.size)
    if checksum != written:
        raise ValueError(
            f"{expected.who}: the frame is damaged (CRC-32 {checksum:08x}, {written:08x} when it "
            f"was written); it has to be sent again"
        )
    header = _read_header(bytes(view[_PREFIX:begin]), expected.who)
    check_header(header, expected)
    with warnings.catch_warnings():
        # Nobody writes to what was received.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        payload = torch.frombuffer(view, dtype=torch.uint8)[begin:]
    # A frame may begin anywhere in what a network library received.
    return header, payload.clone() if payload.data_ptr() % 8 else payload


def payload_size(path: Path) -> int:
    """The bytes of the payload in a file that `write_frame`'s bytes were written to."""
    with path.open("rb") as file:
        start = file.read(_PREFIX)
    _, _, payload = _SIZES.unpack_from(start, len(MAGIC))
    return int(payload)


def _sizes_checksum(view: memoryview) -> int:
    return zlib.crc32(view[len(MAGIC) : len(MAGIC) + _SIZES.size])


def _check_sizes(view: memoryview, who: str, payload_limit: int | None) -> int:
    """Where the payload begins; raises ValueError where what is before the header is wrong."""
    if len(view) < _PREFIX:
        raise ValueError(f"{who}: {len(view)} bytes came, and a frame has {_PREFIX} at the least")
    if view[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"{who}: the bytes begin with {bytes(view[: len(MAGIC)]).hex()}, and a frame of FedSpa "
            f"with {MAGIC.hex()}"
        )
    schema, header, payload = _SIZES.unpack_from(view, len(MAGIC))
    if schema != SCHEMA:
        raise ValueError(
            f"{who}: the frame is of schema version {schema}, and this FedSpa speaks {SCHEMA}; "
            f"install the same version everywhere"
        )
    if header > HEADER_LIMIT:
        raise ValueError(f"{who}: a header of {header} bytes, and at most {HEADER_LIMIT} are read")
    if (_PREFIX + header) % ALIGNMENT:
        raise ValueError(
            f"{who}: the payload begins at byte {_PREFIX + header}, and not at a multiple of "
            f"{ALIGNMENT}"
        )
    if payload_limit is not None and payload > payload_limit:
        raise ValueError(
            f"{who}: a payload of {payload} bytes, and its layers come to {payload_limit} at most"
        )
    if len(view) != _PREFIX + header + payload:
        raise ValueError(
            f"{who}: {len(view)} bytes came, and the frame says that it has "
            f"{_PREFIX + header + payload}; it was cut, or something was added to it"
        )
    return _PREFIX + header


def _read_header(text: bytes, who: str) -> dict[str, Any]:
    try:
        header = json.loads(
            text.decode(), object_pairs_hook=_each_once, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{who}: the frame's header is not JSON as it should be: {error}"
        ) from None
    if not isinstance(header, dict):
        raise ValueError(f"{who}: the frame's header is {shown(header)}, and not a JSON object")
    return header


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name stands twice among {shown([name for name, _ in pairs])}")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
