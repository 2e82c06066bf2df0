"""Every command of docs/deployment.md is run, by a server and three clients on loopback.

With TLS and node keys; and what comes of it is what `fedspa.federate` makes, to the bit.
"""

import json
import re
import shlex
import shutil
import tempfile
import tomllib

import pytest
from guide import PAGE, Readers, read_page
from nearby_grid import make_federation
from ports import free_ports
from processes import interrupt, wait_for
from test_flower_run import in_process, same_files

from fedspa.flower.beforehand import APP

ROOT = PAGE.parents[1]
# Flower puts what a run.toml does not say beside it.
DEFAULTS = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
# The page's client, and two more: what each of them changes in it.
CLIENTS = {
    "clinic": {},
    "bank": {"clinic": "bank", "partition-id = 0": "partition-id = 1", "= 1.0 ": "= 0.7 "},
    "court": {"clinic": "court", "partition-id = 0": "partition-id = 2"},
}
# It does as they do, but nobody lets it in.
STRANGER = "stranger"
SMALL = {"samples = 128": "samples = 3", "seqlen = 2048": "seqlen = 16"}


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


def start_together(blocks, readers, folders):
    """From nothing to a server and four nodes, one of them a stranger's."""
    check_installation(blocks.take("both", "pip install"))
    begin = blocks.take("both", "federation/begin")
    for party in folders:
        readers.go(party, begin)
    readers.go("superlink", blocks.take("server", "openssl"))
    link = blocks.take(
        "server: stays", "flower-superlink", "--ssl-certfile", "--enable-supernode-auth"
    )
    process = readers.stay("superlink", link)
    for name in (*CLIENTS, STRANGER):
        shutil.copy(folders["superlink"] / "ca.pem", folders[name])
    readers.go("superlink", blocks.take("server", "config.toml", "root-certificates"))
    key = blocks.take("client", "ssh-keygen")
    register = blocks.take("server: for each client", "flwr supernode register")
    for name in (*CLIENTS, STRANGER):
        readers.go(name, key)
    readers.wait_for_text("superlink", "Uvicorn running")
    for name, change in CLIENTS.items():
        shutil.copy(folders[name] / "node.key.pub", folders["superlink"] / f"{name}.pub")
        readers.go("superlink", register, change)

    # It "can be ended and started again with the same command", and still knows the keys.
    interrupt(process.pid)
    process.wait(30)
    readers.stay("superlink", link)
    readers.wait_for_text("superlink", "Uvicorn running", times=2)


def start_nodes(blocks, readers, ports):
    """Each client's SuperNode, and the stranger's."""
    node = blocks.take("client", "# ~/federation/client.toml")
    supernode = blocks.take("client: stays", "--root-certificates", "--auth-supernode-private-key")
    for name, port in zip((*CLIENTS, STRANGER), ports, strict=True):
        readers.write(name, node, CLIENTS.get(name))
        readers.stay(name, supernode, {"flower-supernode": f"flower-supernode --port {port}"})


def stop_a_run(block, readers, run):
    """Start another run, and stop it once it is at work."""
    (readers.folder / "superlink" / "federation" / "pruned").rename(readers.folder / "first")
    wait_for(lambda: not readers.processes("superlink", "flwr-serverapp"), "the run's end", 30)
    readers.stay("superlink", run)
    found = []

    def has_id():
        found[:] = re.findall(r"Successfully started run (\d+)", readers.text("superlink"))
        return found

    wait_for(has_id, "the start of a run", 60)
    wait_for(lambda: readers.processes("superlink", "flwr-serverapp"), "the run's process", 30)
    said = readers.go("superlink", block, {"RUN_ID": found[0]})
    assert "stopped" in said, said
    wait_for(lambda: not readers.processes("superlink", "flwr-serverapp"), "the run's end", 30)


@pytest.mark.slow
def test_two_people_prune_a_model_over_a_network(tmp_path, monkeypatch):
    nodes, _ = make_federation(tmp_path)
    blocks = Blocks(simulation=False)
    with free_ports(1 + len(CLIENTS) + 1) as (port, *node_ports):
        changes = {
            "server.example.org:8000": f"127.0.0.1:{port}",
            # Nobody outside of this machine is to reach a test.
            "--host 0.0.0.0 --port 8000": f"--host 127.0.0.1 --port {port}",
            "server.example.org": "localhost",
        }
        readers = Readers(tmp_path / "machines", changes | SMALL, {})
        try:
            folders = {name: readers.arrive(name) for name in ("superlink", *CLIENTS, STRANGER)}
            start_together(blocks, readers, folders)
            copy_what_they_have(tmp_path, readers, nodes)
            start_nodes(blocks, readers, node_ports)
            config = tomllib.loads(readers.write("superlink", blocks.take("server", "run.toml")))
            run = blocks.take("server", "flwr supernode ls", "flwr run")
            said = readers.go("superlink", run)
            (run_id,) = re.findall(r"Successfully started run (\d+)", said)
            (node_id, *_) = re.findall(r"\b\d{17,}\b", said)

            watch = blocks.take("server", "flwr ls", "flwr log")
            watched = readers.go("superlink", watch, {"RUN_ID": run_id})
            assert run_id in watched and watched.count("agreed on") == 3, watched
            stop_a_run(blocks.take("server: of a run", "flwr stop"), readers, run)
            out = blocks.take("server: of a client", "flwr supernode unregister")
            assert "unregistered" in readers.go("superlink", out, {"NODE_ID": node_id})
            assert "Failed to activate SuperNode" in readers.text(STRANGER)
            assert not blocks.left
        finally:
            left = readers.end()
        assert left == []
    compare(tmp_path, readers, config, monkeypatch)


def compare(tmp_path, readers, config, monkeypatch):
    """What the run left against the same clients in one process."""
    monkeypatch.setenv("HOME", str(readers.folder / "superlink"))
    clients = []
    for name in CLIENTS:
        home = readers.folder / name
        own = tomllib.loads((home / "federation" / "client.toml").read_text())
        clients.append({**own, "text": str(home / "federation" / f"{name}.txt")})
    assert [client["partition-id"] for client in clients] == [0, 1, 2]
    near = in_process(tmp_path, dict(enumerate(clients)), DEFAULTS | config)
    same_files(tmp_path / "near", readers.folder / "first")
    report = json.loads((readers.folder / "first" / "report.json").read_text())
    assert [client["name"] for client in report["clients"]] == list(CLIENTS)
    assert [sorted(block["clients"]) for block in report["blocks"]] == [
        sorted(block.clients) for block in near.blocks
    ]
    # The bank has capacity for two of the three blocks, and the others for all.
    for name in ("clinic", "court"):
        same_files(tmp_path / "near", readers.folder / name / "federation" / "pruned")
    assert (readers.folder / "bank" / "federation" / "pruned" / "config.json").is_file()


@pytest.mark.slow
def test_one_command_prunes_a_model_in_the_simulation(tmp_path, monkeypatch):
    nodes, _ = make_federation(tmp_path)
    blocks = Blocks(simulation=True)
    with free_ports(2) as (port, control), tempfile.TemporaryDirectory(prefix="ray") as scratch:
        environment = {
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": scratch,
        }
        readers = Readers(tmp_path / "machine", SMALL | {"39091": str(port)}, environment)
        try:
            folder = readers.arrive("superlink")
            (begin,) = (b for b in read_page() if "cat > ~/federation/begin" in b.text)
            readers.go("superlink", begin)
            shutil.copytree(tmp_path / "model", folder / "model")
            for node, name in zip(nodes.values(), CLIENTS, strict=True):
                shutil.copy(node["text"], folder / f"{name}.txt")
            toml = blocks.take("simulation", "# ~/federation/simulation.toml")
            config = tomllib.loads(readers.write("superlink", toml))
            said = readers.go("superlink", blocks.take("simulation", "flwr run"))
            assert said.count("agreed on") == 3, said
            readers.go("superlink", blocks.take("simulation", "kill"))
            wait_for(lambda: not readers.processes(), "the SuperLink's end", 30)
            assert not blocks.left
        finally:
            left = readers.end()
        assert left == []
    monkeypatch.setenv("HOME", str(readers.folder / "superlink"))
    clients = [
        {**node, "name": f"client {number + 1}"} for number, node in enumerate(nodes.values())
    ]
    in_process(tmp_path, dict(enumerate(clients)), DEFAULTS | config)
    same_files(tmp_path / "near", folder / "simulated")
