"""Clients that send what they should not: each kind as a stand-in for `client_work.encode`."""

from dataclasses import replace

import torch
from flwr.app import Message

from fedspa.flower import client_work
from fedspa.flower.letters import WORK, read_letter, write_letter
from fedspa.messages import BlockMessage, pack_layer
from fedspa.wire import encode

# A client's frames by block, of all tasks so far: what a replay sends again.
SENT: dict[int, bytes] = {}


def values(message, change):
    """The message with other numbers in its first layer or statistic."""
    if isinstance(message, BlockMessage):
        name, layer = next(iter(message.layers.items()))
        changed = replace(layer, values=change(layer.values.clone()))
        return replace(message, layers=message.layers | {name: changed})
    first, *rest = message.statistics
    changed = replace(first, values=change(first.values.clone()))
    return replace(message, statistics=(changed, *rest))


def first_to(number):
    def change(numbers):
        numbers[0] = number
        return numbers

    return change


def one_column_less(message):
    name, layer = next(iter(message.layers.items()))
    other = pack_layer(
        layer.weight()[:, 1:].contiguous(), layer.mask()[:, 1:].contiguous(), None, False
    )
    return replace(message, layers=message.layers | {name: other})


def dense(message):
    layers = {}
    for name, layer in message.layers.items():
        weight = layer.weight() + 0.01
        layers[name] = pack_layer(weight, torch.ones_like(weight, dtype=torch.bool), None, False)
    return replace(message, layers=layers)


def replayed(message, envelope):
    """The frame of another block, or the one that it sent of this block before."""
    SENT.setdefault(message.block, encode(message, envelope))
    return SENT[min(SENT)]


KINDS = {
    "NaN": lambda m, e: encode(values(m, first_to(float("nan"))), e),
    "infinity": lambda m, e: encode(values(m, first_to(float("inf"))), e),
    "absurd weights": lambda m, e: encode(values(m, lambda numbers: numbers * 1e4), e),
    "wrong shape": lambda m, e: encode(one_column_less(m), e),
    "not pruned": lambda m, e: encode(dense(m), e),
    "another sender": lambda m, e: encode(replace(m, sender="c0"), e),
    "another round": lambda m, e: encode(replace(m, round=m.round + 1), e),
    "another number of windows": lambda m, e: encode(replace(m, samples=m.samples + 1), e),
    "another run": lambda m, e: encode(m, replace(e, run="00" * 16)),
    "another model": lambda m, e: encode(m, replace(e, model="00" * 32)),
    "replay": replayed,
    "truncated": lambda m, e: encode(m, e)[:-7],
    "damaged": lambda m, e: encode(m, e)[:-1] + b"\x00\x01"[m.block % 2 : m.block % 2 + 1],
    "noise": lambda m, e: bytes(range(256)) * 40,
    "nothing": lambda m, e: b"",
    "far too much": lambda m, e: encode(m, e) + bytes(2**22),
}


def one_hostile(monkeypatch, change, blocks=None):
    """Let client c1 encode its messages otherwise: of every block, or of some."""

    def hostile(message, envelope):
        if message.sender != "c1" or blocks is not None and message.block not in blocks:
            return encode(message, envelope)
        return change(message, envelope)

    monkeypatch.setattr(client_work, "encode", hostile)
    SENT.clear()


def changed(reply, record=None, frames=None):
    """An answer with other fields in its record, or with other frames."""
    found, sent = read_letter(reply)
    content = write_letter(found | (record or {}), sent if frames is None else frames)
    other = Message.__new__(Message)
    other.__dict__.update(reply.__dict__ | {"_content": content})
    return other


def of_c1(change):
    """Let what client c1 answers to a task be something else."""
    return lambda name, kind, reply: change(reply) if (name, kind) == ("c1", WORK) else reply
