"""What a message of Flower carries here: one JSON text, and frames by name (`fedspa.wire`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedspa.wire.header import shown

# Types of messages, which the client's app has a function for each.
HELLO, WORK, FINISH = "query.hello", "train.work", "train.finish"
TEXT, FRAMES, STYPE = "text", "frames", "fedspa.frame"
# No text of a client is longer: what describes numbers stands in their frames.
LONGEST_TEXT = 2**20


def write_letter(record: Mapping[str, Any], frames: Mapping[str, bytes]) -> RecordDict:
    """A message's content; the frames' bytes are handed on as they are."""
    arrays = {
        name: Array(dtype="uint8", shape=(len(frame),), stype=STYPE, data=frame)
        for name, frame in frames.items()
    }
    text = json.dumps(record, allow_nan=False)
    return RecordDict({TEXT: ConfigRecord({"json": text}), FRAMES: ArrayRecord(arrays)})


def read_letter(message: Message | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The JSON object and the frames of a message; raises ValueError where it has none such."""
    if message is None:
        raise ValueError("its answer could not be read")
    if message.has_error():
        # Flower's text holds that of the client's exception.
        raise ValueError("its app crashed or could not be reached; its own log says more")
    content = message.content
    configs, arrays = content.config_records, content.array_records
    if set(content) != {TEXT, FRAMES} or TEXT not in configs or FRAMES not in arrays:
        raise ValueError("its message holds something else than a text and frames")
    text = configs[TEXT].get("json")
    if not isinstance(text, str) or len(text) > LONGEST_TEXT:
        raise ValueError(f"its message's text is no text of at most {LONGEST_TEXT} characters")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its message's text is not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("its message's text is not a JSON object")
    frames = {}
    for name, array in arrays[FRAMES].items():
        if array.stype != STYPE:
            raise ValueError(f"its message has a frame of type {shown(array.stype)}, not {STYPE!r}")
        frames[name] = array.data
    return record, frames
