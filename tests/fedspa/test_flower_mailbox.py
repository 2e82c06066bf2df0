"""Answers that are slow to arrive keep nobody else's waiting."""

import threading
import time

import httpx
import pytest

from fedspa.flower import mailbox
from fedspa.flower.mailbox import Mailbox


class Post:
    """Answers by message; those of `slow` have begun to arrive, and take until it is set."""

    def __init__(self, **answers):
        self.answers = answers
        self.slow = {}
        self.looks = []

    def pull_messages(self, message_ids):
        (message_id,) = message_ids
        self.looks.append(message_id)
        if message_id in self.slow:
            self.slow[message_id].wait(60)
        answer = self.answers.get(message_id)
        if isinstance(answer, Exception):
            raise answer
        return [] if answer is None else [answer]


@pytest.fixture
def opened():
    """Opens mailboxes; none of their threads stays behind them."""
    boxes = []

    def open_mailbox(post):
        boxes.append(Mailbox(post, longest=60.0))
        return boxes[-1]

    yield open_mailbox
    for box in boxes:
        box.__exit__()
    end = time.monotonic() + 60
    while left := [thread for thread in threading.enumerate() if thread.name == mailbox.THREAD]:
        assert time.monotonic() < end, left
        time.sleep(0.01)


def test_an_answer_is_there_or_not(opened):
    post = Post(m="hello")
    box = opened(post)
    assert (box.look("m"), box.look("n"), box.look("")) == (["hello"], [], [])
    assert post.looks == ["m", "n"]


def test_what_flower_cannot_build_is_an_answer_that_cannot_be_read(opened, caplog):
    assert opened(Post(m=RecursionError("a secret"))).look("m") == [None]
    assert "secret" not in caplog.text and "RecursionError" in caplog.text


def test_a_network_that_fails_is_the_callers(opened):
    with pytest.raises(httpx.ConnectError):
        opened(Post(m=httpx.ConnectError("refused"))).look("m")


@pytest.fixture
def stalled(opened, monkeypatch):
    """A mailbox that has looked for an answer, "slow", which does not come; and its post."""
    post = Post(slow="at last", other="hello")
    post.slow["slow"] = threading.Event()
    box = opened(post)
    monkeypatch.setattr(mailbox, "ALONE", 0.1)
    assert box.look("slow") == []
    monkeypatch.setattr(mailbox, "ALONE", 60.0)
    return box, post


def test_others_are_taken_in_beside_an_upload_that_stalls(stalled):
    box, post = stalled
    assert box.look("other") == ["hello"] and box.look("slow") == []
    post.slow["slow"].set()
    assert box._slow["slow"].done.wait(60)
    assert box.look("slow") == ["at last"]
    assert post.looks == ["slow", "other"], "a message was asked for twice"


def test_what_is_forgotten_is_kept_no_longer_than_it_arrives(stalled):
    box, post = stalled
    box.forget("slow")
    box.forget("never asked for")
    post.slow.pop("slow").set()
    assert not box._slow
    assert (box.look("slow"), box.look("other")) == (["at last"], ["hello"])


def test_a_few_slow_ones_are_taken_in_at_a_time(opened, monkeypatch):
    names = [f"m{number}" for number in range(mailbox.AT_ONCE + 1)]
    post = Post(**dict.fromkeys(names, "at last"), quick="hello")
    post.slow = {name: threading.Event() for name in names}
    box = opened(post)
    monkeypatch.setattr(mailbox, "ALONE", 0.01)
    for name in [*names, "quick"]:
        assert box.look(name) == []
    assert post.looks == names[:-1], "more were begun than memory is meant for"
    monkeypatch.setattr(mailbox, "ALONE", 60.0)
    post.slow.pop("m2").set()
    assert box._slow["m2"].done.wait(60)
    assert box.look("m2") == ["at last"] and box.look("quick") == ["hello"]
    # Those that were slow for too long keep nobody waiting any more.
    monkeypatch.setattr(mailbox, "ALONE", 0.01)
    assert box.look("m4") == [] and "m4" in box._slow
    monkeypatch.setattr(mailbox, "ALONE", 60.0)
    box._longest = 0.0
    post.answers["other"] = "hello"
    assert box.look("other") == ["hello"]
    for event in post.slow.values():
        event.set()
