"""Every command of docs/deployment.md is run, by a server and three clients on loopback.

With TLS and node keys; and what comes of it is what `fedspa.federate` makes, to the bit.
"""

import re
import shlex
import shutil
import tomllib

import pytest
import torch
from guide import PAGE, Readers, read_page
from nearby_grid import make_federation
from ports import free_ports
from processes import interrupt

ROOT = PAGE.parents[1]
# The page's client, and two more: what each of them changes in it.
CLIENTS = {
    "clinic": {},
    "bank": {"clinic": "bank", "partition-id = 0": "partition-id = 1", "= 1.0 ": "= 0.7 "},
    "court": {"clinic": "court", "partition-id = 0": "partition-id = 2"},
}
# It does as they do, but nobody lets it in.
STRANGER = "stranger"
SMALL = {"samples = 128": "samples = 3", "seqlen = 2048": "seqlen = 16"}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the network's processes: other sums round otherwise
    yield
    torch.set_num_threads(before)


class Blocks:
    """The page's blocks that are not read yet."""

    def __init__(self, simulation: bool):
        self.left = [b for b in read_page() if (b.reader == "simulation") == simulation]

    def take(self, reader, *parts):
        """The next block: it must be this reader's, and have all these parts in it."""
        block = self.left.pop(0)
        assert block.reader == reader and all(part in block.text for part in parts), block
        return block


def test_every_block_says_who_runs_it():
    assert all(block.reader and block.language in ("bash", "toml") for block in read_page())


def check_installation(block):
    """Instead of running pip: the files, extras and packages that it is told of are there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = (ROOT / "constraints.txt").read_text()
    lines = [shlex.split(line) for line in block.text.splitlines()]
    assert lines[:2] == [
        ["python3", "-m", "venv", "~/fedspa-env"],
        [".", "~/fedspa-env/bin/activate"],
    ]
    for line in lines[2:]:
        assert line[:4] == ["pip", "install", "-c", "constraints.txt"]
        for word in line[4:]:
            extra = re.fullmatch(r"\.\[(\w+)\]", word)
            if extra:
                assert extra[1] in project["optional-dependencies"]
            elif word != "--no-build-isolation":
                assert f"\n{word}==" in pinned
    assert len(lines) == 4


def copy_what_they_have(tmp_path, readers, nodes):
    """The model to everybody, a text to each client."""
    for party in ("superlink", *CLIENTS, STRANGER):
        shutil.copytree(tmp_path / "model", readers.folder / party / "federation" / "model")
    for node, name in zip(nodes.values(), CLIENTS, strict=True):
        shutil.copy(node["text"], readers.folder / name / "federation" / f"{name}.txt")


def test_two_people_prune_a_model_over_a_network(tmp_path, monkeypatch, one_thread):
    nodes, _ = make_federation(tmp_path)
    blocks = Blocks(simulation=False)
    everybody = ("superlink", *CLIENTS, STRANGER)
    with free_ports(1 + len(CLIENTS) + 1) as (port, *node_ports):
        changes = {
            "server.example.org:8000": f"127.0.0.1:{port}",
            # Nobody outside of this machine is to reach a test.
            "--host 0.0.0.0 --port 8000": f"--host 127.0.0.1 --port {port}",
            "server.example.org": "localhost",
        }
        readers = Readers(tmp_path / "machines", changes | SMALL, {})
        try:
            folders = {party: readers.arrive(party) for party in everybody}
            each = {name: CLIENTS.get(name, {}) for name in (*CLIENTS, STRANGER)}
            check_installation(blocks.take("both", "pip install"))
            begin = blocks.take("both", "begin")
            for party in everybody:
                readers.go(party, begin)
            copy_what_they_have(tmp_path, readers, nodes)

            readers.go("superlink", blocks.take("server", "openssl"))
            superlink = blocks.take("server: stays", "flower-superlink", "--enable-supernode-auth")
            process = readers.stay("superlink", superlink)
            for name in each:
                shutil.copy(folders["superlink"] / "ca.pem", folders[name])
            readers.go("superlink", blocks.take("server", "config.toml"))

            key = blocks.take("client", "ssh-keygen")
            register = blocks.take("server: for each client", "flwr supernode register")
            readers.wait_for_text("superlink", "Uvicorn running")
            for name in each:
                readers.go(name, key)
            for name, change in CLIENTS.items():
                public = folders["superlink"] / f"{name}.pub"
                shutil.copy(folders[name] / "node.key.pub", public)
                readers.go("superlink", register, change)

            # "The SuperLink can be ended and started again with the same command."
            interrupt(process.pid)
            process.wait(30)
            readers.stay("superlink", superlink)
            readers.wait_for_text("superlink", "Uvicorn running", times=2)

            node = blocks.take("client", "# ~/federation/client.toml")
            supernode = blocks.take("client: stays", "flower-supernode", "--root-certificates ca")
            for (name, change), node_port in zip(each.items(), node_ports, strict=True):
                readers.write(name, node, change)
                own_port = {"flower-supernode": f"flower-supernode --port {node_port}"}
                readers.stay(name, supernode, own_port)
            config = tomllib.loads(readers.write("superlink", blocks.take("server", "run.toml")))
            said = readers.go("superlink", blocks.take("server", "flwr supernode ls", "flwr run"))
            assert said.count("agreed on") == 3, said
            print(said)

            (run_id,) = re.findall(r"Successfully started run (\d+)", said)
            said = readers.go("superlink", blocks.take("server", "flwr ls"), {"RUN_ID": run_id})
            assert run_id in said and "block 3 of 3 agreed on" in said, said
            print(said)
            print(readers.text(STRANGER))
            print(blocks.left)
        finally:
            left = readers.end()
        assert left == []
