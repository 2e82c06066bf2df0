import json
import sys

import pytest

from bench import results

CEILINGS = {"copy": 1e10, "matmul": {"float32": 1e11}}


@pytest.fixture
def content():
    return results.new("operators", "cpu", [{"operator": "pack_mask"}], CEILINGS)


def test_a_file_says_what_it_was_measured_with(content, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/__main__.py", "gpu", "--minutes", "8"])
    content = results.new("operators", "cuda", [], CEILINGS)
    assert content["format"] == "fedspa-bench" and content["version"] == 1
    assert content["command"] == ["bench", "gpu", "--minutes", "8"]
    assert content["created"].endswith("+00:00")
    assert content["versions"]["torch"] and content["machine"]["cores"]
    assert content["ceilings"] == CEILINGS


def test_it_is_read_as_it_was_written(content, tmp_path):
    path = tmp_path / "new folder" / "cpu.json"
    results.write(path, content)
    assert results.read(path) == content
    assert list(path.parent.iterdir()) == [path]


def test_a_figure_that_is_no_number_leaves_the_last_file(content, tmp_path):
    path = tmp_path / "cpu.json"
    results.write(path, content)
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write(path, {**content, "results": [{"bytes_per_s": float("inf")}]})
    assert results.read(path) == content


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 2}, "has version 2 of the format, and this is version 1"),
        ({"format": "pytest-benchmark"}, "is not a fedspa-bench file"),
        ({"kind": "weather"}, "has kind 'weather'.*operators, model, growth"),
        ({"results": None}, "results that cannot be read"),
    ],
)
def test_another_file_is_refused(content, tmp_path, change, sentence):
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=sentence):
        results.read(path)


def test_a_file_that_is_cut_off_or_missing_is_refused(content, tmp_path):
    path = tmp_path / "cpu.json"
    results.write(path, content)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="cpu.json is no complete JSON"):
        results.read(path)
    with pytest.raises(ValueError, match="other.json is not there"):
        results.read(tmp_path / "other.json")
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="is not a fedspa-bench file"):
        results.read(path)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'operator' is not known; choose from operators, model"):
        results.new("operator", "cpu", [], CEILINGS)
