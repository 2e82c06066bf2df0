"""Answers that are slow to arrive keep nobody else's waiting."""

import threading

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


def test_an_answer_is_there_or_not():
    post = Post(m="hello")
    box = Mailbox(post)
    assert (box.look("m"), box.look("n"), box.look("")) == (["hello"], [], [])
    assert post.looks == ["m", "n"]


def test_what_flower_cannot_build_is_an_answer_that_cannot_be_read(caplog):
    assert Mailbox(Post(m=RecursionError("a secret"))).look("m") == [None]
    assert "secret" not in caplog.text and "RecursionError" in caplog.text


def test_a_network_that_fails_is_the_callers():
    with pytest.raises(httpx.ConnectError):
        Mailbox(Post(m=httpx.ConnectError("refused"))).look("m")


def test_others_are_taken_in_beside_an_upload_that_stalls(monkeypatch):
    monkeypatch.setattr(mailbox, "ALONE", 0.1)
    post = Post(slow="at last", other="hello")
    post.slow["slow"] = threading.Event()
    box = Mailbox(post)
    assert box.look("slow") == [] and box.look("other") == ["hello"]
    assert box.look("slow") == []
    post.slow["slow"].set()
    assert box._slow["slow"].done.wait(60)
    assert box.look("slow") == ["at last"]
    assert post.looks == ["slow", "other"], "a message was asked for twice"
