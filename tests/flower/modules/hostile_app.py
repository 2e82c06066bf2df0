"""The ClientApp of three clients that go wrong as they send what they made of a block."""

import os
import signal
import time

from hostile_clients import KINDS

from fedspa.flower import client_app, client_work
from fedspa.wire import encode

SENT = []


def _killed(message, envelope):
    os.kill(os.getpid(), signal.SIGKILL)


def _hung(message, envelope):
    time.sleep(3600)


def _replayed(message, envelope):
    return SENT[0]


# By client, and by block.
FAULTS = {
    "c1": [_killed],
    "c2": [_hung],
    "c3": [KINDS["NaN"], KINDS["wrong shape"], KINDS["truncated"], _replayed],
}


def _encode(message, envelope):
    how = FAULTS[message.sender][message.block] if message.sender in FAULTS else encode
    SENT.append(how(message, envelope))
    return SENT[-1]


client_work.encode = _encode
app = client_app.app
