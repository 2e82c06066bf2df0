"""The shipped grids: each is read, and the papers' run on stand-ins for weights and text."""

import json
import random
import tomllib

import pytest
from small_models import make_model, save_with_tokenizer

from fedspa.experiments import read_experiment, run_experiment
from fedspa.experiments.experiment_file import shipped_grids
from fedspa.experiments.results.expectations import check

GRIDS = shipped_grids()
PAPERS = {
    "fedspallm-opt-125m": "opt",
    "fedspallm-opt-1.3b": "opt",
    "fedspallm-llama-2-7b": "llama",
    "fedprllm-llama-2-7b": "llama",
}
# What decides the time of a case, cut down; every client still holds a window.
CLIENTS, WINDOWS, SEQLEN, EVAL_WINDOWS = 4, 8, 16, 2


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder with a checkpoint of either architecture and two texts."""
    folder = tmp_path_factory.mktemp("stand-ins")
    for architecture in set(PAPERS.values()):
        save_with_tokenizer(make_model(architecture), folder / architecture)
    draw = random.Random(5)
    for name in ("calibration", "heldout"):
        words = " ".join(f"word{draw.randrange(96)}" for _ in range(800))
        (folder / f"{name}.txt").write_text(words)
    return folder


def toml(value):
    """A value as TOML; of these, JSON is TOML but for tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(v) for v in value) + "]"
    return json.dumps(value)


def write_toml(path, table):
    """A table as a TOML file, of one line for each of its keys."""
    path.write_text("".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in table.items()))


def with_stand_ins(grid, folder):
    """The table of a shipped grid, its methods and first targets, on stand-ins and few clients."""
    table = tomllib.loads(GRIDS[grid].read_text(encoding="utf-8"))
    both = {part: str(folder / f"{part}.txt") for part in ("calibration", "heldout")}
    data = table["data"]
    data |= {"windows": WINDOWS, "seqlen": SEQLEN, "eval_windows": EVAL_WINDOWS}
    data["domains"] = dict.fromkeys(data["domains"], both)
    data["evaluate"] = dict.fromkeys(data["evaluate"], both)
    table["models"] = [str(folder / PAPERS[grid])]
    for part in table["grid"]:
        part |= {"targets": part["targets"][:1], "clients": [CLIENTS]}
    return table


@pytest.mark.parametrize("grid", GRIDS)
def test_every_shipped_grid_is_read_and_runs_all_of_its_methods(grid):
    experiment = read_experiment(grid)
    table = tomllib.loads(GRIDS[grid].read_text(encoding="utf-8"))
    assert experiment.name == grid == table["name"]
    assert {case.method for case in experiment.cases} == set(table["method"])
    assert len({case.key for case in experiment.cases}) == len(experiment.cases)


def test_the_papers_grids_are_shipped_with_their_models():
    assert set(PAPERS) <= set(GRIDS)
    models = {grid: {case.source for case in read_experiment(grid).cases} for grid in PAPERS}
    assert models == {
        "fedspallm-opt-125m": {"facebook/opt-125m"},
        "fedspallm-opt-1.3b": {"facebook/opt-1.3b"},
        "fedspallm-llama-2-7b": {"meta-llama/Llama-2-7b-hf"},
        "fedprllm-llama-2-7b": {"meta-llama/Llama-2-7b-hf"},
    }


def test_fedprllms_grid_is_the_published_one():
    cases = read_experiment("fedprllm-llama-2-7b").cases
    votes = [case for case in cases if case.settings.get("aggregation") == "mask"]
    # Two samples of C4 for each of 64 clients; three sparsities, and twelve variants at each.
    assert {case.clients for case in votes} == {64}
    assert all(case.data.windows == 128 and case.data.seqlen == 4096 for case in cases)
    assert len(votes) == 36 and {case.target for case in votes} == {0.5, 0.6, 0.7}
    federations = [case.federation() for case in votes]
    assert all(settings.pruner == "wanda" for settings in federations)
    variants = {(s.expansion, s.scaling, s.walking) for s in federations}
    assert variants == {
        (group, scaling, schedule)
        for group in ("layer", "row", "column")
        for scaling in (False, True)
        for schedule in ("one-shot", "synchronous")
    }


@pytest.mark.parametrize("grid", PAPERS)
def test_a_papers_grid_runs_on_stand_ins(grid, stand_ins, tmp_path):
    table = with_stand_ins(grid, stand_ins)
    write_toml(tmp_path / "grid.toml", table)
    experiment = read_experiment(tmp_path / "grid.toml")
    records = run_experiment(experiment, tmp_path / "out")
    assert {record["method"] for record in records} == set(table["method"])
    for record in records:
        assert "error" not in record, (record["method"], record["error"])
        if record["kind"] == "dense":
            assert record["sparsity"] == 0
        elif record["capacities"] is None:
            assert record["sparsity"] >= record["target"] - 1e-3
            # What all clients pruned stays pruned, in a column beyond its target.
            if record["settings"].get("expansion") != "column":
                assert record["sparsity"] == pytest.approx(record["target"], abs=1e-3)
        else:
            assert 0 < record["sparsity"] <= record["target"] + 1e-3
        assert set(record["perplexity"]) == set(table["data"]["evaluate"])
        assert all(value > 1 for value in record["perplexity"].values())
    told = [str(outcome) for outcome in check(records, experiment.expectations)]
    assert not [sentence for sentence in told if "no results to compare" in sentence]
    by_method = {record["method"]: record["geometric_mean"] for record in records}
    assert by_method["statistics"] == pytest.approx(by_method["centralised"], rel=5e-3)


def test_fedspallm_with_wanda_is_fedprllms_best_variant(stand_ins, tmp_path):
    table = with_stand_ins("fedprllm-llama-2-7b", stand_ins)
    table["grid"][0]["methods"] = ["layer", "FedSpaLLM, Wanda"]
    del table["expect"]  # which is of the other methods
    write_toml(tmp_path / "grid.toml", table)
    one, other = run_experiment(read_experiment(tmp_path / "grid.toml"), tmp_path / "out")
    assert one["method"] != other["method"]
    assert one["geometric_mean"] == pytest.approx(other["geometric_mean"], rel=1e-3)
