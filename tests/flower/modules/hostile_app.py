"""The ClientApp of clients whose name is a kind of fault: they encode their messages so."""

import os
import signal
import time

from hostile_clients import KINDS

from fedspa.flower import client_app, client_work
from fedspa.wire import encode


def _killed(message, envelope):
    os.kill(os.getpid(), signal.SIGKILL)


def _hung(message, envelope):
    time.sleep(3600)


FAULTS = KINDS | {"c1": _killed, "c2": _hung}


def _encode(message, envelope):
    return FAULTS.get(message.sender, encode)(message, envelope)


client_work.encode = _encode
app = client_app.app
