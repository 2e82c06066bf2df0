"""`python -m bench compare`: what counts as a change, and what is refused."""

import json

import pytest
from click.testing import CliRunner

from bench.__main__ import main


def operator(median, p20=None, p80=None, shape="4096x4096", **more):
    times = {"median": median, "p20": p20 or median, "p80": p80 or median, "runs": 5}
    return {
        "operator": "wanda_prune",
        "variant": "row 50 %",
        "shape": shape,
        "sizes": {"rows": 4096, "cols": 4096, "clients": None, "tokens": None},
        "dtype": "float32",
        "times": {"fedspa": times, "pytorch": times},
        **more,
    }


def document(*results, **more):
    return {
        "format": "fedspa-bench",
        "version": 1,
        "kind": "operators",
        "device": "cpu",
        "machine": {"cpu": "made-up processor", "cores": "2"},
        "versions": {"torch": "2.13.0"},
        "threads": 2,
        "ceilings": {"copy": 30e9, "matmul": {"float32": 1e11}},
        "results": list(results),
        **more,
    }


@pytest.fixture
def compared(tmp_path):
    """Run the command on two documents, or texts."""

    def run(before, after, *options):
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, content in zip(paths, (before, after), strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return CliRunner().invoke(main, ["compare", *map(str, paths), *options])

    return run


def test_a_change_counts_where_intervals_lie_apart_and_medians_differ_by_more_than_the_noise(
    compared,
):
    before = document(operator(1.0, 0.99, 1.01))
    found = compared(before, document(operator(1.2, 1.15, 1.25)))
    assert "1.20× slower  wanda_prune, row 50 %, 4096x4096" in found.output
    assert "1 slower, 0 faster, 0 as before" in found.output and found.exit_code == 0
    # apart, but within the noise
    assert "0 slower, 0 faster, 1 as before" in compared(before, document(operator(1.04))).output
    assert "1 slower" in compared(before, document(operator(1.04)), "--noise", "0.03").output
    # beyond the noise, but the intervals overlap
    wide = document(operator(1.2, 1.0, 1.4))
    assert "0 slower, 0 faster, 1 as before" in compared(before, wide).output


def test_the_slowest_come_first_and_cases_of_one_file_are_named(compared):
    before = document(operator(1.0, shape="a"), operator(1.0, shape="b"), operator(1.0, shape="c"))
    after = document(operator(0.5, shape="a"), operator(2.0, shape="b"), operator(1.0, shape="d"))
    lines = compared(before, after).output.splitlines()
    slower, faster = (
        next(i for i, line in enumerate(lines) if w in line) for w in ("2.00× s", "2.00× f")
    )
    assert slower < faster
    assert ", b, " in lines[slower] and ", a, " in lines[faster]
    assert any("only in" in line and "a.json" in line and ", c, " in line for line in lines)
    assert any("only in" in line and "b.json" in line and ", d, " in line for line in lines)


def test_the_exit_code_tells_of_slower_cases_only_when_asked(compared):
    before, after = document(operator(1.0)), document(operator(2.0))
    assert compared(before, after).exit_code == 0
    assert compared(before, after, "--fail-if-slower").exit_code == 1
    assert compared(after, before, "--fail-if-slower").exit_code == 0


def test_other_machines_threads_versions_and_ceilings_are_said(compared):
    after = document(
        operator(1.0),
        machine={"cpu": "other processor", "cores": "2"},
        threads=1,
        versions={"torch": "2.14.0"},
        ceilings={"copy": 15e9, "matmul": {}},
    )
    output = compared(document(operator(1.0)), after).output
    assert "made-up processor, 2 cores before, other processor, 2 cores, 1 thread after" in output
    assert "threads differ: 2 before, 1 after" in output
    assert "torch 2.13.0 before, 2.14.0 after" in output
    assert "0.50 times" in output
    assert "differ" not in compared(document(operator(1.0)), document(operator(1.0))).output


def test_cases_that_failed_are_left_out_with_a_line(compared):
    good, other = operator(1.0), operator(1.0, shape="64x64", dtype="bfloat16")
    bad = {key: value for key, value in other.items() if key != "times"}
    bad["failed"] = "OutOfMemoryError: tried to allocate 1 TiB"
    done = compared(document(good, bad), document(good, other))
    assert done.exit_code == 0, done.output
    assert "0 slower, 0 faster, 1 as before" in done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("left out")]
    assert "a.json: wanda_prune, row 50 %, 64x64, " in line and bad["failed"] in line
    assert "b.json: wanda_prune, row 50 %, 64x64, " in done.output, "one alone has a time"


def test_models_are_compared_by_the_sum_of_their_stages_without_making_weights(compared):
    def model(seconds):
        return {
            "model": "llama-2-7b",
            "pipeline": "fedspa",
            "pruner": "sparsegpt",
            "sparsity": 0.5,
            "pattern": None,
            "clients": 1,
            "samples": 8,
            "seqlen": 128,
            "dtype": "float32",
            "blocks": 2,
            "stages": {"calibrate": seconds, "prune": 2 * seconds, "build": 100 * seconds},
        }

    output = compared(document(model(1.0), kind="model"), document(model(3.0), kind="model")).output
    assert "3.00 s  9.00 s  3.00× slower  llama-2-7b, fedspa" in output


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        (document(kind="growth"), "kind operators, the other of growth"),
        (document(version=2), "version 2"),
        ('{"format": "fedspa-be', "no complete JSON"),
    ],
)
def test_what_cannot_be_compared_is_refused(compared, after, sentence):
    found = compared(document(operator(1.0)), after)
    assert found.exit_code == 2
    assert sentence in found.output


def test_a_file_that_is_not_there_is_refused(tmp_path):
    found = CliRunner().invoke(main, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert found.exit_code == 2
    assert "is not there" in found.output
