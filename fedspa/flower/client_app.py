"""The ClientApp: answers the server's messages, each in a process of its own."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedspa.flower import windows
from fedspa.flower.client_work import answer
from fedspa.flower.hello import introduce
from fedspa.flower.letters import FINISH, HELLO, WORK, read_letter, write_letter
from fedspa.flower.node_config import Node, read_node_config
from fedspa.flower.result import is_written, write_result
from fedspa.flower.run_config import Network, read_run_config
from fedspa.flower.site import OtherModel, open_site, run_folder
from fedspa.flower.tasks import DONE, LACKS, STRANGER, Task
from fedspa.settings import Settings

log = logging.getLogger("flwr")
app = ClientApp()

Record = dict[str, Any]
# What a handler is given and returns: a record and frames by the number of their block.
Handler = Callable[
    [Node, Network, Settings, Record, dict[int, bytes]], tuple[Record, Mapping[int, bytes]]
]
# Behind a task's deadline a process that hangs is ended by itself, after so many seconds more.
GRACE = 5.0


@app.query(HELLO.partition(".")[2])
def hello(message: Message, context: Context) -> Message:
    """Say who this client is; its text and tokens stay here."""
    return _answered(message, context, _hello)


@app.train(WORK.partition(".")[2])
def work(message: Message, context: Context) -> Message:
    """Work on the blocks of a task, and send a frame for each."""
    return _answered(message, context, _work)


@app.train(FINISH.partition(".")[2])
def finish(message: Message, context: Context) -> Message:
    """Take the last agreed blocks, write this client's own result, and forget the run."""
    return _answered(message, context, _finish)


def _hello(
    node: Node, network: Network, settings: Settings, record: Record, frames: dict[int, bytes]
) -> tuple[Record, Mapping[int, bytes]]:
    is_written(node, str(record.get("run", "")))
    return introduce(node, network, settings, str(record.get("model"))), {}


def _work(
    node: Node, network: Network, settings: Settings, record: Record, frames: dict[int, bytes]
) -> tuple[Record, Mapping[int, bytes]]:
    task = Task.from_record(record)
    with _ended_after(task.seconds), open_site(node, network, settings, task) as site:
        found = answer(site, task, frames)
    return {"code": LACKS if found.lacks else DONE, "lacks": found.lacks}, found.frames


def _finish(
    node: Node, network: Network, settings: Settings, record: Record, frames: dict[int, bytes]
) -> tuple[Record, Mapping[int, bytes]]:
    task = Task.from_record(record)
    if not task.copies:
        if node.out is not None and not is_written(node, task.run):
            log.warning("fedspa: out=... came after this client had joined: there is no copy")
    elif not is_written(node, task.run):
        with _ended_after(task.seconds), open_site(node, network, settings, task) as site:
            found = answer(site, task, frames)
            if found.lacks:
                return {"code": LACKS, "lacks": found.lacks}, {}
            write_result(site, node)
            log.info("fedspa: the pruned model is in %s", node.out)
    shutil.rmtree(run_folder(node, task.run), ignore_errors=True)
    windows.remove(node.work, task.digest)
    return {"code": DONE, "lacks": ()}, {}


def _answered(message: Message, context: Context, handle: Handler) -> Message:
    """Answer a message; of what goes wrong the server is told a code, and this log the text."""
    nonce = ""
    frames: Mapping[int, bytes] = {}
    try:
        record, received = read_letter(message)
        nonce = str(record.get("nonce", ""))
        settings, network = read_run_config(context.run_config)
        node = read_node_config(context.node_config, network)
        numbered = {int(name): frame for name, frame in received.items()}
        found, frames = handle(node, network, settings, record, numbered)
        reply = {"code": DONE, **found}
    except OtherModel as error:
        reply = _refusal("other model", error)
    except windows.Stranger as error:
        reply = _refusal(STRANGER, error)
    except ValueError as error:
        reply = _refusal("refused", error)
    except (OSError, RuntimeError, MemoryError) as error:
        reply = _refusal("machine", error)
    except Exception:
        # Whatever it is, its text could hold some of the client's own.
        log.exception("fedspa: this client failed")
        reply = {"code": "failed"}
    named = {str(block): frame for block, frame in frames.items()}
    return Message(write_letter({**reply, "nonce": nonce}, named), reply_to=message)


def _refusal(code: str, error: BaseException) -> Record:
    log.error("fedspa: %s", error)
    return {"code": code}


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End this process if it still works on a task that nobody waits for any more."""

    def end() -> None:
        log.error("fedspa: this task took longer than its %.0f s; its process is ended", seconds)
        os._exit(1)

    timer = threading.Timer(seconds + GRACE, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
