"""What is measured at which sizes, and `make bench` as a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import results
from bench.operators import OPERATORS
from bench.operators.plan import jobs

ROOT = Path(__file__).parents[2]


def test_the_usual_choice_has_the_sizes_of_the_targets_and_some_in_between():
    chosen = jobs("cpu")
    sizes = {(job.sizes.rows, job.sizes.cols) for job in chosen if job.dtype == torch.float32}
    assert {(4096, 4096), (768, 3072), (2048, 2048), (2048, 8192), (64, 64)} < sizes
    assert {(576, 1536), (1000, 1500), (2000, 3000)} < sizes
    assert {job.case.operator for job in chosen} == set(OPERATORS)
    assert {job.case.operator for job in chosen if job.shape == "opt-1.3b.down"} == {
        "accumulate_hessian_",
        "obs_prune",
    }
    averages = {
        (job.shape, job.sizes.clients) for job in chosen if job.case.name == "l0_average masks"
    }
    assert ("llama-2-7b.q", 16) in averages
    assert {clients for shape, clients in averages if shape == "opt-125m.down"} == {1, 8, 16, 64}
    assert len({job.name for job in chosen}) == len(chosen)


def test_what_is_asked_for_is_chosen():
    asked = jobs(
        "cpu", operators=["expand_mask"], shapes=["8x12"], dtypes=["float16"], clients=[4, 5]
    )
    names = [
        f"expand_mask {how}, 8x12, float16, {n} clients"
        for how in ("layer 50 %", "2:4")
        for n in (4, 5)
    ]
    assert [job.name for job in asked] == names
    every = jobs("cpu", operators=["wanda_scores"], shapes=["all"], dtypes=["float32"])
    assert len({(job.sizes.rows, job.sizes.cols) for job in every}) == len(every) > 30


def test_patterns_need_whole_groups_and_masks_no_dtype():
    odd = jobs("cpu", operators=["wanda_prune", "pack_mask"], shapes=["8x13"])
    assert [job.name for job in odd if job.case.variant == "2:4"] == []
    assert sum(job.case.operator == "pack_mask" for job in odd) == 1
    assert sum(job.case.variant == "row 50 %" for job in odd) == 2, "in float32 and in bfloat16"


def run_bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "bench/test_operators.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )


def test_make_bench_times_ours_by_pytest_benchmark(tmp_path):
    ours, theirs = tmp_path / "cpu.json", tmp_path / "pytest.json"
    done = run_bench(
        *("--operator", "pack_mask", "--shape", "8x16", "--budget", "0.01"),
        *("--results", str(ours), "--benchmark-json", str(theirs)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1/1] pack_mask, 8x16, float32: " in done.stdout
    (result,) = results.read(ours)["results"]
    (benchmark,) = json.loads(theirs.read_text())["benchmarks"]
    assert benchmark["stats"]["median"] == pytest.approx(result["times"]["fedspa"]["median"])
    assert benchmark["stats"]["iterations"] == 200
    assert 1e-7 < benchmark["stats"]["median"] < 1e-3, "of a call, not of the 200"
    assert benchmark["extra_info"]["ratios"] == result["ratios"]
    assert set(result["ratios"]) == {"reference", "pytorch"}


def test_make_bench_refuses_an_unknown_shape(tmp_path):
    done = run_bench("--shape", "llama-9", "--results", str(tmp_path / "cpu.json"))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "shape 'llama-9' is not known; pass ROWSxCOLS" in done.stderr


def test_plain_pytest_leaves_the_benches_alone(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
