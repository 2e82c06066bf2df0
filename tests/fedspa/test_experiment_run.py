import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from experiment_files import GRID, METHODS, make_folder, write_experiment

from fedspa.cli import main
from fedspa.evaluate import domain_perplexity
from fedspa.experiments import read_experiment, run_experiment
from fedspa.experiments.store import RESULTS_FILE, appending, read_records, succeeded
from fedspa.experiments.workbench import Workbench
from fedspa.run import federate

ROOT = Path(__file__).parents[2]
# What two runs of the same case may differ in.
CIRCUMSTANCES = ("seconds", "peak_memory", "finished", "machine", "versions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="module")
def experiment(folder):
    return read_experiment(write_experiment(folder))


@pytest.fixture(scope="module")
def records(experiment, tmp_path_factory):
    """What an undisturbed run in one process leaves."""
    return run_experiment(experiment, tmp_path_factory.mktemp("undisturbed"))


def measured(records):
    return [{k: v for k, v in r.items() if k not in CIRCUMSTANCES} for r in records]


def by_method(records):
    return {record["method"]: record for record in records}


def test_a_record_says_what_was_asked_for_and_what_was_measured(experiment, records):
    assert [record["key"] for record in records] == [case.key for case in experiment.cases]
    for case, record in zip(experiment.cases, records, strict=True):
        assert succeeded(record), record
        assert case.identity.items() <= record.items()
        assert set(record["perplexity"]) == {"a", "b", "c"} and record["geometric_mean"] > 1
        assert set(record["seconds"]) == {"prune", "evaluate"} and record["peak_memory"] > 0
    found = by_method(records)
    assert found["dense"]["sparsity"] == 0 and found["dense"]["exchanges"] == 0
    for name in ("mean", "l0", "synchronous", "statistics", "centralised"):
        assert found[name]["sparsity"] == 0.5
    exchanges = {name: record["exchanges"] for name, record in found.items()}
    assert exchanges["l0"] == 1 and exchanges["synchronous"] == exchanges["statistics"] == 2
    # Three domains of 4 windows of 16 tokens, 4 bytes each.
    assert found["centralised"]["bytes_up"] == 3 * 4 * 16 * 4


def test_standalone_has_every_client_and_their_mean(records):
    record = by_method(records)["standalone"]
    members = record["members"]
    assert [member["name"] for member in members] == ["a", "b", "c"]
    assert [member["samples"] for member in members] == [4, 4, 4]
    mean = sum(member["geometric_mean"] for member in members) / 3
    assert record["geometric_mean"] == pytest.approx(mean, rel=1e-12)
    for domain, value in record["perplexity"].items():
        mean = sum(member["perplexity"][domain] for member in members) / 3
        assert value == pytest.approx(mean, rel=1e-12)
    assert len({member["geometric_mean"] for member in members}) == 3


def test_a_shared_walk_gives_what_a_federation_of_its_own_does(experiment, records):
    bench = Workbench()
    shared = [case for case in experiment.cases if case.one_walk and case.kind == "federated"]
    assert len(shared) == 6
    found = {record["key"]: record for record in records}
    for case in shared:
        bench.lay_out(case)
        heldout = bench.heldout(case)
        report = federate(bench.model, bench.clients(case), case.federation(), progress=False)
        record = found[case.key]
        assert domain_perplexity(bench.model, heldout) == record["perplexity"], case.title
        assert {client.bytes_up for client in report.clients} == {record["bytes_up"]}
        assert {client.bytes_down for client in report.clients} == {record["bytes_down"]}
        assert report.sparsity == record["sparsity"]


def test_masks_alone_travel_as_bits(records):
    found = by_method(records)
    # A bit a weight: half of the weights in bfloat16 beside their bits are nine times as much.
    assert 9 * found["mask"]["bytes_up"] == found["l0"]["bytes_up"]


def test_statistics_are_as_good_as_pooled_data(records):
    found = by_method(records)
    expected = found["centralised"]["geometric_mean"]
    assert found["statistics"]["geometric_mean"] == pytest.approx(expected, rel=0.005)


def test_the_centralised_result_is_the_same_for_every_partition(folder, tmp_path, records):
    grid = GRID.replace('"domain"', '"dirichlet:0.3"').replace("[3]", "[4, 5]")
    other = run_experiment(
        read_experiment(write_experiment(folder, "b.toml", grids=grid)), tmp_path
    )
    key = by_method(records)["centralised"]["key"]
    (again,) = [record for record in other if record["method"] == "centralised"]
    assert again["key"] == key and measured([again]) == measured(
        [by_method(records)["centralised"]]
    )


@pytest.mark.slow
def test_a_run_goes_on_where_a_killed_one_was(folder, experiment, tmp_path, records):
    path = tmp_path / RESULTS_FILE
    command = [sys.executable, "-m", "fedspa", "experiment", str(folder / "grid.toml")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--quiet", "--out", str(tmp_path)], env=environment)
    while process.poll() is None and len(read_records(path)) < 2:
        time.sleep(0.002)
    process.kill()
    process.wait()
    before = read_records(path)
    assert 2 <= len(before) < len(records)
    with open(path, "ab") as file:
        file.write(b'{"key": "cut o')
    told = []
    found = run_experiment(experiment, tmp_path, done=told.append)
    assert measured(found) == measured(records)
    assert {record["key"] for record in told} == {r["key"] for r in records} - set(before)
    assert len(path.read_bytes().split(b"\n")) == len(records) + 1


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_it_has_and_leaves_no_process(experiment, tmp_path):
    def interrupt(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, tmp_path, workers=2, done=interrupt)
    assert len(read_records(tmp_path / RESULTS_FILE)) == 1
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_killed_worker_is_recorded_and_replaced(experiment, tmp_path, records):
    told = []

    def kill_first():
        while len(multiprocessing.active_children()) < 2:
            time.sleep(0.001)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_first)
    thread.start()
    found = run_experiment(experiment, tmp_path, workers=2, done=told.append)
    thread.join()
    assert {record["key"] for record in told} == {case.key for case in experiment.cases}
    assert not multiprocessing.active_children()
    failed = [record for record in found if not succeeded(record)]
    assert failed and all("was ended by signal 9" in record["error"] for record in failed)
    assert len(failed) in {1, 7}, "the cases of one job"
    # The other worker and the new one leave what one process does.
    there = {record["key"] for record in found if succeeded(record)}
    expected = [record for record in records if record["key"] in there]
    assert there and measured(filter(succeeded, found)) == measured(expected)
    assert measured(run_experiment(experiment, tmp_path)) == measured(records)


def test_a_model_that_is_not_there_does_not_stop_the_others(folder, tmp_path, records):
    path = write_experiment(folder, "absent.toml", models='["./absent", "model"]')
    found = run_experiment(read_experiment(path), tmp_path)
    failed = [record for record in found if not succeeded(record)]
    assert {record["model"] for record in failed} == {"./absent"}
    assert all("there is no folder or file" in record["error"] for record in failed)
    assert measured(r for r in found if r["model"] == "model") == measured(records)


def test_a_text_with_too_few_windows_fails_what_needs_it_alone(folder, tmp_path):
    path = write_experiment(folder, "long.toml", windows=8)
    found = run_experiment(read_experiment(path), tmp_path)
    failed = [record for record in found if not succeeded(record)]
    assert len(found) - len(failed) == 1 and "dense" not in by_method(failed)
    sentence = "holds 7 windows of 16 tokens, fewer than 8; give more text, or lower windows"
    assert all(sentence in record["error"] for record in failed)


def test_a_case_that_fails_does_not_stop_those_of_its_walk(folder, tmp_path, monkeypatch):
    from fedspa.experiments import jobs

    def refuse(dense, messages, settings):
        if settings.aggregation == "mean":
            raise ZeroDivisionError("nobody")
        return aggregate_again(dense, messages, settings)

    aggregate_again = jobs.aggregate_again
    monkeypatch.setattr(jobs, "aggregate_again", refuse)
    found = run_experiment(read_experiment(folder / "grid.toml"), tmp_path)
    assert {r["method"]: r["error"] for r in found if not succeeded(r)} == {
        "mean": "ZeroDivisionError: nobody"
    }


def test_records_are_read_by_key_the_last_one_counts(tmp_path):
    path = tmp_path / RESULTS_FILE
    with appending(path) as append:
        append({"key": "a", "error": "first"})
        append({"key": "b", "value": 1})
        append({"key": "a", "value": 2})
        with pytest.raises(RuntimeError, match="another run is appending"), appending(path):
            pass
    assert read_records(path) == {"a": {"key": "a", "value": 2}, "b": {"key": "b", "value": 1}}
    path.write_bytes(path.read_bytes() + b'{"key": "c", "val')
    assert set(read_records(path)) == {"a", "b"}
    with appending(path) as append:
        append({"key": "d"})
    assert list(read_records(path)) == ["a", "b", "d"]
    path.write_text('{"key": "a"}\nnot a record\n')
    with pytest.raises(ValueError, match="line 2 is not a record"):
        read_records(path)


def run_command(*arguments):
    return CliRunner().invoke(main, ["experiment", *map(str, arguments)])


def test_the_command_writes_tables_and_tells_what_was_not_met(folder, tmp_path):
    expect = "[[expect]]\nlower = '{}'\nhigher = '{}'\nat_least = {}\n"
    methods = '["dense", "l0", "statistics", "centralised"]'
    grid = GRID[: GRID.index("methods")] + f"methods = {methods}\n"
    met = write_experiment(folder, "met.toml", grids=grid + expect.format("l0", "l0", 1.0))
    result = run_command(met, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert {"results.jsonl", "results.csv", "tables.md"} <= {p.name for p in tmp_path.iterdir()}
    lacking = write_experiment(folder, "no.toml", grids=grid + expect.format("l0", "dense", 9.0))
    result = run_command(lacking, "--out", tmp_path, "--tables-only", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and found["failed"] == 0
    assert [outcome["met"] for outcome in found["expectations"]] == [False]
    assert len(found["records"]) == 4
    quiet = run_command(met, "--out", tmp_path, "--quiet")
    assert quiet.exit_code == 0 and quiet.output == ""


def test_the_command_ends_with_1_where_a_case_failed(folder, tmp_path):
    path = write_experiment(folder, "gone.toml", models='["./absent"]', methods=METHODS)
    result = run_command(path, "--out", tmp_path, "--quiet")
    assert result.exit_code == 1 and "failed: dense: model: there is no folder" in result.stderr
    nothing = run_command(path, "--out", tmp_path / "empty", "--tables-only")
    assert nothing.exit_code == 2 and "holds no result" in nothing.stderr
