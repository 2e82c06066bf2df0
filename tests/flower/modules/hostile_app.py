"""The ClientApp of clients whose name is a kind of fault: they encode their messages so."""

from hostile_clients import KINDS

from fedspa.flower import client_app, client_work
from fedspa.wire import encode


def _encode(message, envelope):
    return KINDS.get(message.sender, encode)(message, envelope)


client_work.encode = _encode
app = client_app.app
