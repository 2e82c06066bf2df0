"""A client's own place: its model, its text, and what it keeps on disk between two messages.

Flower starts a process for every message. What is kept is a cache: hidden states where the work
will go on, and the blocks that were agreed on. Whatever is missing is computed again, or asked for.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedspa.data import Client
from fedspa.flower import windows
from fedspa.flower.node_config import Node
from fedspa.flower.run_config import Network
from fedspa.flower.tasks import Task
from fedspa.loading import open_model
from fedspa.members import Run
from fedspa.ranks import alone
from fedspa.rounds import batch_of
from fedspa.run import prepare
from fedspa.settings import Settings
from fedspa.streaming import journal
from fedspa.streaming.activations import Hidden
from fedspa.streaming.architecture import Source
from fedspa.streaming.blocks import StreamedBlocks
from fedspa.streaming.disk import write_whole
from fedspa.streaming.room import choose_place
from fedspa.walk import Stream

STATE, LOCK, HIDDEN = "state.json", "lock", "hidden"
# Seconds between two looks at a lock that another process holds.
LOOK = 0.2
# Days after which what is kept of another run, which broke off, is removed.
OLD = 7


class OtherModel(ValueError):
    """This client's model is not the server's."""


@dataclass
class Kept:
    """What a client keeps of a run.

    versions: for each agreed block that it got, its round
    base: where all agreed blocks before a block were walked: round, block and hidden states
    ahead: where it walked on from an exchange's beginning through its own blocks; the last two
    """

    run: str = ""
    versions: dict[int, int] = field(default_factory=dict)
    base: dict[str, Any] | None = None
    ahead: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Site:
    """A client while it answers one message: its run, of which it is the only member."""

    folder: Path
    kept: Kept
    source: Source
    run: Run
    blocks: StreamedBlocks

    @property
    def hidden(self) -> Hidden:
        """The client's hidden states."""
        hidden = self.run.members[0].stream.hidden
        assert isinstance(hidden, Hidden)
        return hidden

    def commit(self) -> None:
        """Make what is kept what the next message finds, and remove what it does not name."""
        write_whole(self.folder / STATE, json.dumps(asdict(self.kept)).encode())
        self._remove_hidden(self._named())
        journal.forget(self.folder, self.kept.versions)

    def reset(self) -> None:
        """Keep nothing, where something that was kept cannot be read."""
        self.kept.versions.clear()
        self.kept.base, self.kept.ahead = None, []
        self.commit()

    def place(self, **where: int) -> dict[str, Any]:
        """The present hidden states and where they are, to be kept."""
        self.hidden.flush()
        return {**where, "setup": self.setup, "hidden": self.hidden.describe()}

    @property
    def setup(self) -> list[Any]:
        """What hidden states depend on beside the run: where they are computed, and in batches."""
        (member,) = self.run.members
        return [str(self.run.blocks.device), batch_of(self.run, member)]

    def trim(self) -> None:
        """Remove hidden states that are neither named nor the present ones."""
        if len(self.hidden):
            self._remove_hidden({*self._named(), self.hidden.describe()["generation"]})

    def _named(self) -> set[int]:
        places = (self.kept.base, *self.kept.ahead)
        return {place["hidden"]["generation"] for place in places if place is not None}

    def _remove_hidden(self, keep: set[int]) -> None:
        for path in self.folder.glob(f"{HIDDEN}.*"):
            if int(path.suffix[1:]) not in keep:
                path.unlink()


def open_checkpoint(model: str, network: Network, device: str) -> Source:
    """The checkpoint of one side.

    Raises ValueError where it is missing, damaged or cannot be streamed.
    """
    opened = open_model(model, dtype=network.dtype, device=device, say=None)
    if not isinstance(opened, Source):
        raise ValueError(
            f"model: {model} cannot be streamed block by block, which a federation over a network "
            f"needs; give the folder of a safetensors checkpoint as save_pretrained writes it"
        )
    return opened


def check_same_model(node: Node, own: str, servers: str) -> None:
    """Raise OtherModel unless both digests are the same."""
    if own != servers:
        raise OtherModel(
            f"the model in {node.model} has the content hash {own[:12]}…, and the server's "
            f"{servers[:12]}…; copy the server's checkpoint, or name it with model=... in "
            f"--node-config, and mind that dtype is the same"
        )


@contextmanager
def open_site(node: Node, network: Network, settings: Settings, task: Task) -> Iterator[Site]:
    """This client's place in a task's run, for as long as it answers one message.

    Raises OtherModel where the server's is another, ValueError where this client's model or windows
    cannot be used, RuntimeError where another process holds the place for too long.
    """
    folder = run_folder(node, task.run)
    folder.mkdir(parents=True, exist_ok=True)
    tokens, model = windows.read(node.work, task.digest)
    check_same_model(node, model, task.model)
    with locked(folder, task.seconds):
        kept = _read_kept(folder)
        if kept.run != task.run:
            kept = Kept(run=task.run)
        source = open_checkpoint(node.model, network, node.device)
        client = Client(tokens, node.capacity, node.name, node.sparsity)
        blocks = StreamedBlocks(
            source,
            torch.device(node.device),
            folder,
            opened_again=True,
            versions=kept.versions,
        )
        try:
            run = own_run(source, blocks, client, settings)
            run.agreed = kept.versions
            place = choose_place("auto", run, source.dtype, folder)
            hidden = Hidden(run.blocks.device, place, folder, HIDDEN)
            run.members[0].stream = Stream(hidden, {})
            yield Site(folder, kept, source, run, blocks)
        finally:
            blocks.close()


def run_folder(node: Node, run_id: str) -> Path:
    """Where this client keeps what it has of a run."""
    return node.work / f"run-{run_id[:16]}"


def remove_old_runs(work: Path) -> None:
    """Remove what runs that broke off have left, windows too, once it is old."""
    for path in [*work.glob("run-*"), *work.glob(f"{windows.WINDOWS}-*")]:
        if time.time() - path.stat().st_mtime > OLD * 86_400:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, seconds: float) -> Iterator[None]:
    """Keep a client's other processes away, such as one that still works on a former task.

    Raises RuntimeError where one holds the folder for longer than so many seconds.
    """
    end = time.monotonic() + seconds
    with (folder / LOCK).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RuntimeError(
                        f"another process has held {folder} for {seconds:.0f} s; two nodes must "
                        f"not share a work folder: give each a work=... or name=... of its own"
                    ) from None
                time.sleep(LOOK)
        yield


def own_run(source: Source, blocks: StreamedBlocks, client: Client, settings: Settings) -> Run:
    """A run of which a client is the only member: draws are the server's.

    Raises ValueError where its windows, the model and the settings do not go together.
    """
    own = replace(settings, every_block=False, participation=1.0, dropout=0.0)
    return prepare(source.model, blocks, [client], own, None, None, alone())


def _read_kept(folder: Path) -> Kept:
    """What was kept; nothing where it cannot be read, since all of it can be had again."""
    try:
        record = json.loads((folder / STATE).read_bytes())
        versions = {int(block): int(version) for block, version in record["versions"].items()}
        return Kept(**record | {"versions": versions})
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return Kept()
