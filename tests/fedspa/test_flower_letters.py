"""What a message of Flower must hold to be read, whoever made it."""

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedspa.flower.letters import FRAMES, LONGEST_TEXT, TEXT, read_letter, write_letter


@pytest.fixture(autouse=True)
def identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def message(content):
    return Message(content, 5, "train.work")


def holding(text='{"a": 1}', frames=None, **more):
    records = {TEXT: ConfigRecord({"json": text}), FRAMES: ArrayRecord(frames or {})}
    return message(RecordDict(records | more))


def test_what_was_written_is_read():
    frames = {"3": b"abc", "4": b""}
    assert read_letter(message(write_letter({"a": [1, "b"]}, frames))) == ({"a": [1, "b"]}, frames)


@pytest.mark.parametrize(
    ("letter", "match"),
    {
        "nothing": (lambda: message(RecordDict()), "something else than a text"),
        "more": (lambda: holding(other=ConfigRecord({})), "something else than a text"),
        "no text": (
            lambda: message(RecordDict({TEXT: ConfigRecord({}), FRAMES: ArrayRecord()})),
            "no text",
        ),
        "a number": (lambda: holding(text=3), "no text of at most"),
        "too long": (lambda: holding(text=" " * (LONGEST_TEXT + 1)), "no text of at most"),
        "no JSON": (lambda: holding(text="{"), "not JSON"),
        "deep": (lambda: holding(text="[" * 200_000), "not JSON"),
        "a list": (lambda: holding(text="[1]"), "not a JSON object"),
        "another frame": (
            lambda: holding(frames={"1": Array("uint8", (1,), "numpy.ndarray" * 99, b"x")}),
            "frame of type 'numpy.*not 'fedspa.frame'",
        ),
        "unreadable": (lambda: None, "could not be read"),
    }.values(),
)
def test_anything_else_is_refused(letter, match):
    with pytest.raises(ValueError, match=match) as refused:
        read_letter(letter())
    assert len(str(refused.value)) < 200


def test_an_error_is_told_without_its_text():
    first = message(write_letter({}, {}))
    first.metadata.__dict__["_message_id"] = "1"
    with pytest.raises(ValueError, match="crashed or could not be reached") as refused:
        read_letter(Message(Error(2, "a secret"), reply_to=first))
    assert "secret" not in str(refused.value)
