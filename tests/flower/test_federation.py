"""Server and clients on a real network, each in processes of its own, on loopback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from counting import CountingProxy
from deployment import Deployment
from nearby_grid import make_federation
from processes import wait_for
from small_models import SPECIAL, VOCABULARY
from test_flower_run import in_process, same_files
from transformers import LlamaConfig, LlamaForCausalLM

from fedspa.flower.beforehand import APP
from fedspa.report import Report

HERE = Path(__file__).resolve().parent
MODULES = [HERE / "modules", HERE.parent / "fedspa"]
MIB = 2**20
# Seconds: three clients start their processes on two cores at once, and others may work there.
PATIENT = {"deadline": 200.0, "join-timeout": 400.0, "message-dtype": "float32"}
HOSTILE = ("NaN", "wrong shape", "replay", "truncated")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A SuperLink that survives a restart, three nodes of which one is behind a proxy."""
    folder = tmp_path_factory.mktemp("flower")
    nodes, config = make_federation(folder, sparsity=0.6, **PATIENT)
    for node in nodes.values():
        # Several runs take place here, and no result is overwritten.
        del node["out"]
    with Deployment(folder / "network", database=True, modules=MODULES) as deployment:
        with CountingProxy(deployment.port) as proxy:
            first, *others = nodes.values()
            deployment.start_node(0, first, port=proxy.port)
            for index, node in enumerate(others, start=1):
                deployment.start_node(index, node)
            yield deployment, proxy, nodes, config


def wait_for_line(run, line, timeout=400):
    """Wait until the log of a run under way has this in it."""
    wait_for(lambda: line in run.log.read_text(errors="replace"), f"{line!r} in the log", timeout)


def finished(deployment, config, app=APP, timeout=500):
    run = deployment.run(app, config, timeout)
    assert run.status == "finished:completed", f"{run.details}\n{run.log}"
    return Report.from_json((Path(config["out"]) / "report.json").read_text()), run.log


def test_300_mib_of_updates_in_bounded_memory(here, tmp_path):
    deployment, proxy, nodes, config = here
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
    large = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=4, **sizes, **SPECIAL)
    LlamaForCausalLM(large).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes(
        (Path(config["model"]) / "tokenizer.json").read_bytes()
    )
    (tmp_path / "model" / "tokenizer_config.json").write_bytes(
        (Path(config["model"]) / "tokenizer_config.json").read_bytes()
    )
    config = config | {"model": str(tmp_path / "model"), "out": str(tmp_path / "out")}
    # By magnitude all would send the same, which Flower carries once.
    config |= {"pruner": "wanda", "sparsity": 0.5, "blocks-per-message": 2}
    before = proxy.sent
    far, _ = finished(deployment, config)

    # The same in one process of its own, whose memory can be compared.
    program = (
        "import json, sys; from pathlib import Path\n"
        "from test_flower_run import in_process\n"
        "folder, nodes, config = json.loads(sys.argv[1])\n"
        "in_process(Path(folder), nodes, config)"
    )
    given = json.dumps([str(tmp_path), nodes, config])
    path = {"PYTHONPATH": deployment.environment["PYTHONPATH"], "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", program, given], check=True, env=deployment.environment | path
    )
    near = Report.from_json((tmp_path / "near" / "report.json").read_text())
    same_files(tmp_path / "near", tmp_path / "out")
    assert far.layers == near.layers and far.blocks == near.blocks

    sent = sum(client.bytes_up for client in far.clients)
    assert sent > 300 * MIB and sent == sum(client.bytes_up for client in near.clients)
    (client,) = (client for client in far.clients if client.name == "c0")
    # What a wire counts is what the report says, and Flower's own words.
    counted = proxy.sent - before
    assert client.bytes_up < client.wire_up < counted < 1.02 * client.wire_up + 2**18
    # Six messages of 52 MiB came. Flower makes four copies of the one that is being taken in, and
    # takes room for its own code.
    message = client.wire_up / 2
    assert far.peak_memory < near.peak_memory + 5 * message < near.peak_memory + sent


def test_a_killed_server_goes_on(here, tmp_path):
    deployment, _, nodes, config = here
    config = config | {"out": str(tmp_path / "out"), "schedule": "synchronous"}
    run = deployment.launch(APP, config)
    wait_for_line(run, "agreed on (2 of 3)")
    deployment.kill("superlink")
    run.stream.wait(30)
    assert not (tmp_path / "out").exists()
    deployment.start_superlink()
    report, log = finished(deployment, config)
    near = in_process(tmp_path, nodes, config)
    same_files(tmp_path / "near", tmp_path / "out")
    assert report.layers == near.layers and report.blocks == near.blocks
    assert "agreed on (1 of 3)" not in log


def test_bad_clients_are_left_out(here, tmp_path):
    deployment, _, nodes, config = here
    app = tmp_path / "app"
    app.mkdir()
    text = (APP / "pyproject.toml").read_text()
    assert "fedspa.flower.client_app:app" in text
    app.joinpath("pyproject.toml").write_text(
        text.replace("fedspa.flower.client_app:app", "hostile_app:app")
    )
    for index, kind in enumerate(HOSTILE, start=3):
        node = nodes[11] | {"partition-id": index, "num-partitions": 7, "name": kind}
        deployment.start_node(index, node | {"work": str(tmp_path / kind)})
    config = config | {"out": str(tmp_path / "out"), "clients": 7, "min-clients": 1}
    config |= {"deadline": 60.0}
    # In the middle of their work c1's process is killed, and c2's hangs.
    done = deployment.run(app, config, 500)
    assert done.status == "finished:completed", f"{done.details}\n{done.log}"
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    for block in report.blocks:
        bad = {"c1", "c2", *HOSTILE} - ({"replay"} if block.block == 0 else set())
        assert set(block.left_out) == bad, block
        assert "c0" in block.clients
    reasons = report.blocks[2].left_out
    assert "not finite" in reasons["NaN"] or "NaN" in reasons["NaN"]
    assert "cut" in reasons["truncated"] and "block" in reasons["replay"]
    for name in ("c1", "c2"):
        assert "no answer within 60 s" in reasons[name] or "crashed" in reasons[name]
