"""The output folder: whole or absent, whatever happens; and what is in it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from small_models import make_clients, make_model
from transformers import AutoModelForCausalLM

from fedspa import Report, Settings, federate, load_masks
from fedspa.output import check_output, complete_folder, free_name

HALF = Settings(sparsity=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_is_a_checkpoint_with_masks_and_reports(tmp_path, dtype):
    model = make_model("llama", dtype=dtype)
    report = federate(model, make_clients(2), HALF, out=tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == dtype
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    masks = load_masks(tmp_path / "out")
    weights = dict(again.named_parameters())
    assert set(masks) == set(report.masks) and len(masks) == 14
    for name, mask in masks.items():
        assert mask.shape == weights[f"{name}.weight"].shape
        assert not bool(weights[f"{name}.weight"][~mask].any())
        assert int(mask.sum()) == mask.numel() // 2
    stored = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert stored == report
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_conv1d_masks_are_outputs_by_inputs(tmp_path):
    model = make_model("gpt2")
    federate(model, make_clients(2), HALF, out=tmp_path / "out")
    weights = dict(model.named_parameters())
    for name, mask in load_masks(tmp_path / "out").items():
        assert not bool(weights[f"{name}.weight"].T[~mask].any())


def test_a_path_in_gives_a_folder_out(tmp_path):
    make_model().save_pretrained(tmp_path / "dense")
    federate(tmp_path / "dense", make_clients(2), HALF, out=tmp_path / "pruned")
    model = make_model()
    federate(model, make_clients(2), HALF)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_an_existing_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="out exists and is not empty"):
        federate(model, make_clients(2), HALF, out=tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    federate(make_model(), make_clients(1), HALF, out=tmp_path / "out")
    assert (tmp_path / "out" / "report.json").is_file()


def test_too_small_a_disk_is_found_before_any_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 12_345))
    with pytest.raises(RuntimeError, match="needs about 4 MB, but .* has 0 MB free"):
        federate(make_model(), make_clients(1), HALF, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "x"), RuntimeError("io: No space left on device (os error 28)")]
)
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, error):
    with pytest.raises(RuntimeError, match="no space left.*free some space"):  # noqa: SIM117
        with complete_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("written")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("broken")

    monkeypatch.setattr("fedspa.output.write_html", fail)
    with pytest.raises(ValueError, match="broken"):
        federate(make_model(), make_clients(1), HALF, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# A process for every folder, forked since imports take seconds: what is killed tells its id, and
# its parent then how it ended.
KILLED = """
import os, signal, sys, time
from fedspa.cli import _terminate
from fedspa.output import complete_folder
for out in sys.argv[1:]:
    if os.fork():
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
        continue
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    with complete_folder(out) as folder:
        (folder / "model.safetensors").write_bytes(bytes(1000))
        print(os.getpid(), flush=True)
        time.sleep(60)
"""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder for every signal, in which a run to "out" was ended by it."""
    folders = {number: tmp_path_factory.mktemp(number.name) for number in SIGNALS}
    command = [sys.executable, "-c", KILLED, *(folder / "out" for folder in folders.values())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        for number in folders:
            os.kill(int(run.stdout.readline()), number)
            assert int(run.stdout.readline()) != 0
        assert run.wait(timeout=30) == 0
    return folders


@pytest.mark.parametrize("number", SIGNALS)
def test_a_killed_run_leaves_no_folder_under_the_final_name(killed, number):
    left = [path.name for path in killed[number].iterdir()]
    # SIGKILL cannot be answered: what was half written stays, hidden and under another name.
    assert "out" not in left
    assert len(left) == (1 if number == signal.SIGKILL else 0)
    assert all(name.startswith(".out.partial-") for name in left)


def test_a_path_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="exists and is not empty"):
        check_output(tmp_path / "file")
    with pytest.raises(ValueError, match="out cannot be made: .*file is a file"):
        check_output(tmp_path / "file" / "out")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    with pytest.raises(ValueError, match="is the root of a mounted disk"):
        check_output(tmp_path / "disk")


def test_free_names_count_up(tmp_path):
    names = []
    for _ in range(3):
        path = free_name(tmp_path / "demo")
        path.mkdir()
        names.append(path.name)
    assert names == ["demo", "demo-2", "demo-3"]


def test_load_masks_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="holds no masks.safetensors"):
        load_masks(tmp_path)


def test_the_report_records_how_it_was_made(tmp_path):
    report = federate(make_model(), make_clients(2), Settings(sparsity=0.5, seed=11))
    record = json.loads(report.to_json())
    assert record["settings"]["seed"] == 11
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["peak_memory"] > 10**7
    assert {"embed", "calibrate", "prune", "aggregate", "propagate"} <= set(record["seconds"])
    assert all(client["bytes_up"] > 0 for client in record["clients"])
    assert record["model"]["blocks"] == 2


def test_a_link_is_no_place_for_an_output(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(ValueError, match="is a link to"):
        check_output(tmp_path / "link")
