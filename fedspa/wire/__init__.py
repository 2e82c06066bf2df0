"""What travels between machines, as bytes, and what is checked of it on arrival.

    content = encode(message, envelope)
    message = decode(content, expected)
    judge_weights(message, dense, target, support, norm_bound)

Nothing here knows of a network: bytes go out and come in.
"""

from fedspa.messages import BlockMessage, StatisticsMessage
from fedspa.wire.frame import SCHEMA, payload_size
from fedspa.wire.header import Envelope, Expected
from fedspa.wire.judged_sums import (
    judge_definite,
    judge_mean_squares,
    judge_statistics,
    mean_squares,
    square_limits,
)
from fedspa.wire.judged_weights import judge_finite, judge_weights
from fedspa.wire.sums import decode_statistics, encode_statistics
from fedspa.wire.weights import decode_weights, encode_weights

__all__ = [
    "SCHEMA",
    "Envelope",
    "Expected",
    "decode",
    "encode",
    "judge_definite",
    "judge_finite",
    "judge_mean_squares",
    "judge_statistics",
    "judge_weights",
    "mean_squares",
    "payload_size",
    "square_limits",
]


def encode(message: BlockMessage | StatisticsMessage, envelope: Envelope) -> bytes:
    """A message as a frame; the same message comes to the same bytes.

    Raises ValueError where a frame cannot hold it.
    """
    if isinstance(message, BlockMessage):
        return encode_weights(message, envelope)
    return encode_statistics(message, envelope)


def decode(content: bytes | memoryview, expected: Expected) -> BlockMessage | StatisticsMessage:
    """The message of a frame: a `BlockMessage` of weights and masks, else a `StatisticsMessage`.

    content: one frame, and nothing behind it. The tensors share its memory and hold it; they are
        not to be written to.
    Raises ValueError with a sentence that names the sender, the block, the layer and the values
    where anything is not as it was expected, and nothing else, whatever the bytes are. What the
    numbers are is not looked at here.
    """
    if expected.kind in ("weights", "mask"):
        return decode_weights(content, expected)
    return decode_statistics(content, expected)
