import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from small_models import ARCHITECTURES, LENGTH, configurations, make_clients, make_model
from transformers import AutoModelForCausalLM

from fedspa import Settings, federate
from fedspa.planning import flight
from fedspa.planning.architecture import Architecture, read_architecture
from fedspa.planning.cli import command
from fedspa.planning.duration import estimate
from fedspa.planning.job import Job
from fedspa.planning.known import MODELS
from fedspa.planning.memory import most, needs
from fedspa.planning.meter import metered
from fedspa.planning.rates import Rates
from fedspa.planning.traffic import client_traffic
from fedspa.planning.verdict import Room, judge, ways_out

GB = 10**9
# Memory of a run by its plan: the promise of `fedspa plan`.
WITHIN = 0.15
RUN = Path(__file__).with_name("planned_runs.py")
ROOT = Path(__file__).parents[2]


def small(name="llama", dtype=torch.float32):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configurations()[name], dtype=dtype).eval()
    return Architecture(model, name, dtype)


def job(architecture=None, clients=2, samples=4, seqlen=LENGTH, **settings):
    if "pattern" not in settings:
        settings.setdefault("sparsity", 0.5)
    return Job(architecture or small(), Settings(**settings), clients, samples, seqlen, "cpu", None)


@pytest.fixture(scope="module")
def llama_70b():
    return Job(
        read_architecture("llama-2-70b"),
        Settings(sparsity=0.5),
        clients=8,
        samples=128,
        seqlen=2048,
        device="cuda",
        device_memory=80 * GB,
    )


def test_a_meter_counts_what_lives_at_once():
    there = torch.empty(100, device="meta")
    with metered([there]) as meter:
        first = there + 1
        second = first * 2
        del first
        third = second.view(10, 10)[:5]
        _ = third + 1
    assert meter.peak == 2 * 400
    del second, third, _
    assert meter.live == 0


def test_the_known_models_have_their_published_sizes():
    billions = {
        name: sum(p.numel() for p in read_architecture(name).model.parameters()) / 1e9
        for name in ("opt-66b", "llama-2-7b", "llama-2-70b", "llama-3-8b")
    }
    assert billions == {
        "opt-66b": pytest.approx(65.7, rel=0.01),
        "llama-2-7b": pytest.approx(6.74, rel=0.01),
        "llama-2-70b": pytest.approx(68.98, rel=0.01),
        "llama-3-8b": pytest.approx(8.03, rel=0.01),
    }
    assert len(MODELS) == 12


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_traced_with_all_of_its_layers(name):
    (found,) = job(small(name)).flights
    (kind,) = small(name).kinds
    assert found.traced
    layers = [layer.name for group in found.groups for layer in group]
    assert sorted(layers) == sorted(layer.name for layer in kind.layers)
    assert found.calibrate > found.hidden and found.propagate > found.hidden


def test_layers_that_get_the_same_tensor_share_a_statistic():
    (found,) = job().flights
    names = [[layer.name.split(".")[-1] for layer in group] for group in found.groups]
    assert names == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_a_block_that_cannot_be_traced_is_bounded_from_above(monkeypatch):
    (traced,) = job().flights

    def fails(*_):
        raise RuntimeError("values are needed")

    monkeypatch.setattr(flight, "embed", fails)
    (bound,) = job().flights
    assert not bound.traced and bound.hidden == traced.hidden
    assert bound.calibrate >= traced.calibrate and len(bound.groups) == 7
    assert most(needs(job(), "host")).host > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.37},
        {"sparsity": 0.37, "block_size": 24},
        {"sparsity": 0.37, "block_size": 256},
        {"pattern": "2:4"},
        {"sparsity": 0.37, "pruner": "wanda"},
        {"pattern": "2:4", "pruner": "wanda", "schedule": "synchronous"},
        {"sparsity": 0.37, "pruner": "magnitude"},
        {"sparsity": 0.37, "aggregation": "mask"},
        {"sparsity": 0.37, "aggregation": "mean", "message_dtype": "bfloat16"},
        {"sparsity": 0.37, "aggregation": "statistics"},
        {"sparsity": 0.37, "aggregation": "statistics", "statistics_dtype": "bfloat16"},
        {"sparsity": 0.37, "aggregation": "statistics", "statistics_dtype": "int64"},
        {"pattern": "2:4", "aggregation": "statistics", "pruner": "wanda"},
    ],
)
def test_traffic_is_what_the_report_of_the_run_counts(settings):
    report = federate(make_model(), make_clients(2), Settings(**settings))
    up, down = client_traffic(job(**settings))
    assert {(client.bytes_up, client.bytes_down) for client in report.clients} == {(up, down)}


def test_a_70b_model_fits_a_card_of_80_gb_and_not_one_of_8(llama_70b):
    room = Room(80 * GB, 64 * GB, 1000 * GB)
    assert judge(llama_70b, room).fits
    verdict = judge(llama_70b, replace(room, gpu=8 * GB))
    assert set(verdict.lacking) == {"gpu"} and verdict.placement != "gpu"


def test_hidden_states_lie_where_they_are_put(llama_70b):
    on_gpu, on_host, on_disk = (needs(llama_70b, where) for where in ("gpu", "host", "disk"))
    hidden = 8 * 128 * 2048 * 8192 * 2
    assert llama_70b.hidden == hidden
    assert on_host["prune"].host - on_gpu["prune"].host == hidden
    assert on_gpu["prune"].gpu - on_host["prune"].gpu == pytest.approx(hidden, rel=0.05)
    assert on_disk["prune"].host == on_gpu["prune"].host
    # Two generations, whatever the place.
    assert {n["propagate"].disk - n["calibrate"].disk for n in (on_gpu, on_disk)} == {hidden}


def test_memory_depends_on_neither_blocks_nor_clients_but_for_hidden_states(llama_70b):
    eight = most(needs(llama_70b, "disk"))
    many = most(needs(replace(llama_70b, clients=64), "disk"))
    assert many.gpu == eight.gpu
    shallow = llama_70b.architecture.model.config.__class__(
        **{**llama_70b.architecture.model.config.to_dict(), "num_hidden_layers": 2}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shallow, dtype=torch.float16).eval()
    two = replace(llama_70b, architecture=Architecture(model, "two blocks", torch.float16))
    assert most(needs(two, "disk")).gpu == eight.gpu


def test_ranks_divide_samples_or_clients(llama_70b):
    alone = llama_70b.hidden
    samples = replace(llama_70b, split="samples", ranks=4)
    clients = replace(llama_70b, split="clients", ranks=4)
    assert samples.hidden == clients.hidden == alone // 4
    assert needs(samples, "gpu")["prune"].gpu < needs(llama_70b, "gpu")["prune"].gpu - alone / 2


def test_more_statistics_need_more_memory():
    peaks = [most(needs(job(pruner=p), "host")).host for p in ("sparsegpt", "wanda")]
    assert peaks[0] > peaks[1]


def test_every_way_out_makes_it_fit(llama_70b):
    room = Room(30 * GB, 16 * GB, 1000 * GB)
    verdict = judge(replace(llama_70b, activations="gpu"), room)
    assert not verdict.fits
    ways = ways_out(verdict)
    assert ways == ["--activations disk", "--samples 16"]
    options = ["--clients", "8", "--device", "cuda", "--device-memory", "30GB"]
    options += ["--host-memory", "16GB", "--disk", "1TB"]
    for way in ways:
        asked = CliRunner().invoke(command, ["llama-2-70b", *options, *way.split()])
        assert asked.exit_code == 0, asked.output


def test_nothing_is_suggested_where_nothing_helps(llama_70b):
    verdict = judge(llama_70b, Room(2 * GB, 64 * GB, 1000 * GB))
    assert not verdict.fits and ways_out(verdict) == []


def test_time_follows_the_rates_and_the_longer_of_computing_and_moving():
    slow = Rates(1e9, 1e9, 1e9, 1e9, 1e9, 1e9, 1e9, 1e9)
    fast = replace(slow, product=2e9, gather=2e9)
    before, after = (estimate(job(), "host", found) for found in (slow, fast))
    assert before.stages["calibrate"] == pytest.approx(2 * after.stages["calibrate"])
    assert before.stages["prune"] == after.stages["prune"]
    stuck = estimate(job(), "disk", replace(slow, read=1.0))
    rest = stuck.stages["embed"] + stuck.stages["write"]
    assert stuck.total == pytest.approx(stuck.moving + rest)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here"
)
def test_runs_take_the_memory_that_was_planned():
    lines = [
        {"dtype": "float32", "clients": 2, "settings": {"sparsity": 0.5}},
        {"dtype": "float32", "clients": 1, "settings": {"sparsity": 0.5, "pruner": "wanda"}},
        {
            "dtype": "bfloat16",
            "clients": 2,
            "settings": {"pattern": "2:4", "schedule": "synchronous", "message_dtype": "float32"},
        },
        {
            "dtype": "float32",
            "clients": 3,
            "settings": {"sparsity": 0.5, "aggregation": "statistics"},
        },
        {
            "dtype": "bfloat16",
            "clients": 2,
            "settings": {
                "sparsity": 0.5,
                "aggregation": "statistics",
                "statistics_dtype": "int64",
                "schedule": "one-shot",
            },
        },
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        "MALLOC_TRIM_THRESHOLD_": str(2**20),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(RUN)],
        input="\n".join(map(json.dumps, lines)),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(lines)
    for line, one in zip(lines, found, strict=True):
        assert one["planned"] == pytest.approx(one["measured"], rel=WITHIN), line
