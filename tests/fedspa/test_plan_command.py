import json

import pytest
import torch
from click.testing import CliRunner
from small_models import configurations

from fedspa.planning import rates
from fedspa.planning.cli import command
from fedspa.planning.quantities import parse_bytes, written

GB = 10**9


def plan(*arguments):
    return CliRunner().invoke(command, [*arguments, "--host-memory", "64GB", "--disk", "1TB"])


def planned(*arguments):
    result = plan(*arguments, "--json")
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * GB), ("80 GiB", 80 * 2**30), ("1.5mb", 1_500_000), ("4096", 4096)],
)
def test_sizes_are_read_in_both_kinds_of_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80 parsecs", "", "-1GB", "0GB"])
def test_an_unclear_size_is_refused(text):
    with pytest.raises(ValueError, match="write it such as 80GB"):
        parse_bytes(text)


def test_sizes_are_written_in_units_of_a_thousand():
    assert [written(size) for size in (80 * GB, 12_345_678, 1500, 0)] == [
        "80.00 GB",
        "12.35 MB",
        "1.50 kB",
        "0",
    ]


def test_the_command_says_what_fits_and_what_does_not():
    options = ["llama-2-70b", "--clients", "8", "--device-memory"]
    good = plan(*options, "80GB")
    assert good.exit_code == 0 and "It fits: " in good.stdout
    for word in ("embed", "calibrate", "prune", "aggregate", "propagate", "write", "--calibrate"):
        assert word in good.stdout
    bad = plan(*options, "24GB", "--activations", "gpu")
    assert bad.exit_code == 1
    assert "It does not fit: " in bad.stdout and "with --activations" in bad.stdout


def test_json_holds_the_exact_bytes():
    found = planned("llama-2-7b", "--device-memory", "80GB", "--clients", "3", "--pattern", "2:4")
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert found["client_bytes"] == {"up": weights + weights // 8, "down": weights + weights // 8}
    assert found["fits"] and found["lacking"] == {} and found["seconds"] is None
    assert found["needs"]["gpu"] == max(stage["gpu"] for stage in found["stages"].values())
    assert found["has"] == {"gpu": 80 * GB, "host": 64 * GB, "disk": 1000 * GB}


def test_only_the_configuration_of_a_folder_is_read(tmp_path):
    configurations()["llama"].save_pretrained(tmp_path)
    found = planned(str(tmp_path), "--device", "cpu", "--samples", "4", "--seqlen", "16")
    assert found["model"]["blocks"] == 2 and found["traced"] and found["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-2-7", "--device", "cpu"], "llama-2-7 is neither .* llama-2-7b"),
        (["opt-125m", "--device", "cpu", "--seqlen", "4096"], "made for 2048 positions"),
        (["opt-125m", "--device", "cpu", "--split", "samples"], "--ranks of 2 or more"),
        (["opt-125m", "--device", "cpu", "--activations", "gpu"], "choose auto, host or disk"),
        (
            ["opt-125m", "--device", "cpu", "--split", "clients", "--ranks", "2"],
            "there are 1 clients to share",
        ),
        (["opt-125m", "--sparsity", "1.5", "--device", "cpu"], "outside"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_a_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_a_gpu_that_is_not_here_needs_a_size(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device-memory 80GB"):
        CliRunner().invoke(command, ["opt-125m", "--device", "cuda"], catch_exceptions=False)
    result = plan("opt-125m", "--device-memory", "80GB", "--calibrate")
    assert isinstance(result.exception, RuntimeError) and "no GPU here" in str(result.exception)


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "magnitude"])
def test_calibration_measures_every_rate(pruner, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "SECONDS", 0.001)
    monkeypatch.setattr(rates, "FILE", 1 << 20)
    monkeypatch.setattr(rates, "COPIED", {"cpu": 1 << 16})
    configurations()["llama"].save_pretrained(tmp_path / "model")
    options = ["--device", "cpu", "--samples", "4", "--seqlen", "16", "--calibrate"]
    found = planned(str(tmp_path / "model"), *options, "--pruner", pruner, "--out", str(tmp_path))
    assert all(rate > 0 for rate in found["rates"].values())
    stages = {stage: need["seconds"] for stage, need in found["stages"].items()}
    assert found["seconds"] > 0 and stages["prune"] > 0 and stages["write"] > 0
    assert (stages["calibrate"] > 0) == (pruner != "magnitude")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]
