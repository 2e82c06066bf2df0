"""Server and clients on a real network, each in processes of its own, on loopback."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from counting import CountingProxy
from deployment import Deployment
from nearby_grid import make_federation
from parties import read
from processes import wait_for
from small_models import SPECIAL, VOCABULARY
from test_flower_run import in_process, same_files
from transformers import LlamaConfig, LlamaForCausalLM

from fedspa.flower.beforehand import APP
from fedspa.report import Report

HERE = Path(__file__).resolve().parent
MODULES = [HERE / "modules", HERE.parent / "fedspa"]
MIB = 2**20
# Seconds: clients start their processes on two cores at once, and others may work there.
PATIENT = {"deadline": 300.0, "join-timeout": 300.0, "message-dtype": "float32"}


class Federation(Deployment):
    """A SuperLink that survives a restart; clients come as they are needed, c0 behind a proxy."""

    def __init__(self, folder):
        found, self.config = make_federation(folder, clients=4, layers=4, sparsity=0.6, **PATIENT)
        self.clients = list(found.values())
        for node in self.clients:
            # Several runs take place here, and no result is overwritten.
            del node["out"]
        super().__init__(folder / "network", database=True, modules=MODULES)

    def __enter__(self):
        super().__enter__()
        self.proxy = self.claims.enter_context(CountingProxy(self.port))
        return self

    def among(self, clients, out, **config):
        """The configuration of a run among the first clients, whose nodes are there then."""
        for index in range(clients):
            if not self.processes(f"node-{index}"):
                port = self.port if index else self.proxy.port
                self.start_node(index, self.clients[index], port=port)
        given = {key.replace("_", "-"): value for key, value in config.items()}
        return self.config | {"clients": clients, "out": str(out)} | given

    def near(self, folder, config, *clients):
        """A run of the same clients in this process."""
        return in_process(folder, dict(enumerate(self.clients[c] for c in clients)), config)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with Federation(tmp_path_factory.mktemp("flower")) as federation:
        yield federation


def finished(federation, config, app=APP, timeout=500):
    run = federation.run(app, config, timeout)
    assert run.status == "finished:completed", f"{run.details}\n{run.log}"
    return Report.from_json((Path(config["out"]) / "report.json").read_text()), run.log


def test_a_killed_server_goes_on(here, tmp_path):
    config = here.among(2, tmp_path / "out", schedule="synchronous", synchronize_every=2)
    run = here.launch(APP, config)
    said = partial(read, run.log)
    wait_for(lambda: "agreed on (2 of 4)" in said(), "the first exchange's end", 400)
    # What is agreed on is committed before the next two are asked for.
    asked = "Receiving: train.work"
    wait_for(lambda: here.text("node-0").count(asked) > 1, "the second exchange", 100)
    here.kill("superlink")
    run.stream.wait(30)
    assert not (tmp_path / "out").exists()
    here.start_superlink()
    report, log = finished(here, config)
    near = here.near(tmp_path, config, 0, 1)
    same_files(tmp_path / "near", tmp_path / "out")
    assert report.layers == near.layers and report.blocks == near.blocks
    assert "agreed on (2 of 4)" not in log and "agreed on (3 of 4)" in log


def save_large_model(folder, tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
    large = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=4, **sizes, **SPECIAL)
    LlamaForCausalLM(large).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())


def in_a_process_of_its_own(here, folder, config, clients):
    """A run in one process, whose memory can be compared with that of a server's."""
    program = (
        "import json, sys; from pathlib import Path\n"
        "from test_flower_run import in_process\n"
        "folder, clients, config = json.loads(sys.argv[1])\n"
        "in_process(Path(folder), dict(enumerate(clients)), config)"
    )
    given = json.dumps([str(folder), here.clients[:clients], config])
    subprocess.run([sys.executable, "-c", program, given], check=True, env=here.environment)
    return Report.from_json((folder / "near" / "report.json").read_text())


def test_300_mib_of_updates_in_bounded_memory(here, tmp_path):
    save_large_model(tmp_path / "model", tokenizer=Path(here.config["model"]))
    # By magnitude all would send the same, which Flower carries once.
    given = {"model": str(tmp_path / "model"), "pruner": "wanda", "sparsity": 0.5}
    # Two blocks at a time; the first two come back, for the clients to walk on through them.
    given |= {"schedule": "synchronous", "synchronize_every": 2}
    config = here.among(3, tmp_path / "out", **given)
    proxy = here.proxy
    sent_before, received_before = proxy.sent, proxy.received
    far, _ = finished(here, config)
    up, down = proxy.sent - sent_before, proxy.received - received_before
    near = in_a_process_of_its_own(here, tmp_path, config, 3)
    same_files(tmp_path / "near", tmp_path / "out")
    assert far.layers == near.layers and far.blocks == near.blocks

    sent = sum(client.bytes_up for client in far.clients)
    assert sent > 300 * MIB and sent == sum(client.bytes_up for client in near.clients)
    (client,) = (client for client in far.clients if client.name == "c0")
    # What a wire counts is what the report says, and Flower's own words.
    assert client.bytes_up < client.wire_up < up < 1.02 * client.wire_up + 2**18
    assert 50 * MIB < client.bytes_down < client.wire_down < down < 1.02 * client.wire_down + 2**18
    # Six messages of 52 MiB came. Flower makes some copies of the one that is being taken in, and
    # takes room for its own code.
    message = client.wire_up / 2
    assert far.peak_memory < near.peak_memory + 4 * message < near.peak_memory + sent


REASONS = ["not finite|NaN", "shape|rows", "cut", "block"]


def test_bad_clients_are_left_out(here, tmp_path):
    app = tmp_path / "app"
    app.mkdir()
    text = (APP / "pyproject.toml").read_text()
    assert "fedspa.flower.client_app:app" in text
    app.joinpath("pyproject.toml").write_text(
        text.replace("fedspa.flower.client_app:app", "hostile_app:app")
    )
    # In the middle of their work c1's process is killed, and c2's hangs: until the deadline all are
    # waited for, and then somebody's answer.
    times = {"deadline": 90.0, "patience": 300.0}
    config = here.among(4, tmp_path / "out", min_clients=1, **times)
    report, log = finished(here, config, app)
    assert log.count("left out: ") == len(report.blocks) == len(REASONS)
    for block, reason in zip(report.blocks, REASONS, strict=True):
        assert block.clients == ("c0",) and set(block.left_out) == {"c1", "c2", "c3"}
        assert re.search(reason, block.left_out["c3"]), block
        for name in ("c1", "c2"):
            assert re.search("no answer within 90 s|crashed", block.left_out[name]), block
    near = here.near(tmp_path, config, 0)
    same_files(tmp_path / "near", tmp_path / "out")
    assert report.layers == near.layers
