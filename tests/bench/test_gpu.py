"""`python -m bench gpu` and `operators`, at sizes that a CPU measures in no time."""

import json

import pytest
import torch
from click.testing import CliRunner

from bench import gpu, results
from bench.__main__ import main
from bench.operators import Sizes, find_operator, run
from bench.operators.plan import Job, jobs
from bench.protocol import WrongResult

CEILINGS = {"copy": 1e10, "matmul": {"float32": 1e11}}
TINY = Sizes(8, 16, clients=2, tokens=8)


@pytest.fixture
def quick(monkeypatch):
    """No second for the ceilings, and a race that is over soon."""
    monkeypatch.setattr(run.ceilings, "measure", lambda device: CEILINGS)
    monkeypatch.setattr(run, "MOST_RACE", 0.01)


def invoke(*arguments):
    return CliRunner().invoke(main, arguments)


def job(operator, place=0):
    return Job(find_operator(operator)[place], "8x16", TINY, torch.float32)


def test_without_a_gpu_it_is_a_sentence_and_2(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = invoke("gpu", "--out", str(tmp_path / "gpu.json"))
    assert done.exit_code == 2
    assert "no CUDA GPU is available to PyTorch here" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["gpu", "operators"])
@pytest.mark.parametrize(
    ("option", "name", "known"),
    [
        ("--operator", "wanda", "choose from accumulate_hessian_, "),
        ("--shape", "llama-2-7b", "pass ROWSxCOLS"),
        ("--dtype", "float8", "choose from float32, bfloat16, float16"),
    ],
)
def test_unknown_names_are_a_sentence_and_2(command, option, name, known):
    done = invoke(command, option, name)
    assert done.exit_code == 2
    assert repr(name) in done.stderr and known in done.stderr


def test_an_unknown_command_is_2():
    assert invoke("graphics").exit_code == 2


def test_the_file_is_whole_after_every_job(quick, tmp_path, monkeypatch):
    path, seen = tmp_path / "cpu.json", []
    todo = [job("pack_mask"), job("unpack_mask")]
    line = run.line

    def looking(result):
        seen.append(results.read(path)["results"] if path.exists() else [])
        return line(result)

    monkeypatch.setattr(run, "line", looking)
    assert run.run_jobs(todo, "cpu", path, 60) == 0
    assert [len(found) for found in seen] == [0, 1]
    assert [r["operator"] for r in results.read(path)["results"]] == ["pack_mask", "unpack_mask"]


def test_a_job_that_raises_is_a_sentence_and_the_rest_goes_on(quick, tmp_path, capsys):
    path = tmp_path / "cpu.json"

    def out_of_memory(inputs, backend):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    from dataclasses import replace

    bad = job("pack_mask")
    bad = bad._replace(case=replace(bad.case, run=out_of_memory))
    assert run.run_jobs([bad, job("unpack_mask")], "cpu", path, 60) == 1
    failed, good = results.read(path)["results"]
    assert failed["failed"] == "OutOfMemoryError: tried to allocate 1 TiB"
    assert failed["operator"] == "pack_mask" and "times" not in failed
    assert good["times"]["fedspa"]["runs"] >= 5
    assert "OutOfMemoryError" in capsys.readouterr().out


def test_a_gpu_that_a_kernel_broke_ends_the_run_after_the_file_was_written(
    quick, tmp_path, monkeypatch
):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    measured = {**run.described(*job("pack_mask")), "failed": "AcceleratorError: illegal access"}
    monkeypatch.setattr(run, "_run", lambda *arguments: measured)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    path = tmp_path / "gpu.json"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.run_jobs([job("pack_mask")] * 2, "cuda", path, 60)
    assert results.read(path)["results"] == [measured]


def test_a_wrong_result_is_stored_without_a_time(quick, tmp_path):
    from dataclasses import replace

    def inverted(inputs, backend):
        bits = case.run(inputs, backend)
        return bits if backend == "reference" else ~bits

    case = find_operator("pack_mask")[0]
    bad = job("pack_mask")._replace(case=replace(case, run=inverted))
    assert run.run_jobs([bad], "cpu", tmp_path / "cpu.json", 60) == 1
    (failed,) = results.read(tmp_path / "cpu.json")["results"]
    assert failed["failed"].startswith("WrongResult: pack_mask (8, 16, 2, 8)")
    assert "times" not in failed
    assert WrongResult.__name__ in failed["failed"]


def test_when_the_time_is_over_the_rest_is_not_measured(quick, tmp_path, monkeypatch):
    assert run.run_jobs([job("pack_mask")], "cpu", tmp_path / "cpu.json", 0) == 1
    (failed,) = results.read(tmp_path / "cpu.json")["results"]
    assert failed["failed"].startswith("not measured, the time was over")


def test_first_jobs_may_be_slow_and_the_last_keep_their_part(monkeypatch):
    now = iter([100.0, 120.0, 129.7])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(now))
    todo = [job("pack_mask")] * 3
    (_, first), (_, second), (_, third) = run.shares(todo, 130.0)
    assert first.race == run.MOST_RACE
    assert second.race == pytest.approx(run.RACE * 5), "of what is left when it starts"
    assert first.longest == pytest.approx((30 - 2 * run.LEAST_JOB) / run.SLOW_CALLS)
    assert second.longest == pytest.approx((10 - run.LEAST_JOB) / run.SLOW_CALLS)
    assert third is None, "less is left than a job needs"


def test_the_usual_gpu_run_has_time_for_the_loop_that_its_target_is_about(monkeypatch):
    """At 8192² SparseGPT's loop is measured, though each job before took three times its least."""
    monkeypatch.setattr(run.time, "monotonic", lambda: now)
    todo, now = jobs("cuda"), 0.0
    places = [n for n, j in enumerate(todo) if j.name == "obs_prune 50 %, llama-2-70b.q, bfloat16"]
    assert len(places) == 1
    for number, (one, share) in enumerate(run.shares(todo, 450.0)):
        loop = one.case.baselines.get("sparsegpt")
        if number == places[0]:
            assert share.longest > loop.seconds(one.sizes, "cuda")
            return
        slow = loop.seconds(one.sizes, "cuda") if loop else 0
        now += 3 * run.LEAST_JOB + (3 * slow if slow < share.longest else 0)


def test_operators_writes_a_file_from_the_command_line(quick, tmp_path):
    path = tmp_path / "cpu.json"
    done = invoke(
        *("operators", "--out", str(path), "--operator", "unpack_mask", "--shape", "8x16")
    )
    assert done.exit_code == 0, done.output
    assert json.loads(path.read_text())["kind"] == "operators"
    assert "[1/1] unpack_mask, 8x16, float32: " in done.output


@pytest.mark.parametrize(
    ("shape", "clients"), [("llama-2-7b.q", (1, 8, 64)), ("llama-2-70b.q", (8, 64))]
)
def test_the_gpu_measures_both_dtypes_and_many_clients(shape, clients):
    todo = jobs("cuda", operators=["l0_average"], shapes=[shape])
    assert {(j.sizes.clients, str(j.dtype)) for j in todo} == {
        (count, dtype) for count in clients for dtype in ("torch.bfloat16", "torch.float32")
    }


def test_the_gpu_sizes_are_those_of_the_targets():
    sizes = {(j.sizes.rows, j.sizes.cols) for j in jobs("cuda")}
    assert {(4096, 4096), (8192, 8192), (28672, 8192), (8192, 28672)} < sizes


def test_a_gpu_names_its_file():
    assert gpu.default_name("NVIDIA H200") == "nvidia-h200-operators.json"
    assert gpu.default_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb-operators.json"
