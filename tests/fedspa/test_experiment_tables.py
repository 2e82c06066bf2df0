"""What becomes of a grid's records: rows and tables."""

import csv
import io
import math
import re

import pytest
from experiment_records import ORDER, curves, failed, grid, record, standalone, variants
from rich.console import Console

from fedspa.experiments.results.comparisons import axis_tables, improvement_tables, world_tables
from fedspa.experiments.results.pictures import write_pictures
from fedspa.experiments.results.summary import summarise
from fedspa.experiments.results.tables import domain_tables, main_tables, table, write_tables

STATISTICS = {"aggregation": "statistics"}


def cells(markdown, heading=None):
    """Every table of a page as a dictionary: the first cell of a line to the others."""
    if heading is not None:
        markdown = markdown[markdown.index(heading) :].split("\n**")[0]
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines if not line[0].startswith(":--")}


def test_a_row_has_the_plain_mean_and_the_sample_deviation_over_seeds():
    means = (40.0, 50.0, 66.0)
    records = [
        record("FedSpaLLM", seed=seed, geometric_mean=mean, bytes_up=100 * (seed + 1))
        for seed, mean in enumerate(means)
    ]
    (row,) = summarise(records)
    assert row.seeds == (0, 1, 2)
    assert row.mean == pytest.approx(52.0)
    # ((12² + 2² + 14²) / 2) ** 0.5
    assert row.spread == pytest.approx(172**0.5)
    assert row.perplexity == {"speeches": pytest.approx(52), "novel": pytest.approx(52)}
    assert (row.bytes_up, row.seconds, row.exchanges, row.sparsity) == (200, 10, 1, 0.6)
    assert cells(main_tables(records))["FedSpaLLM"] == ["**52.00 ± 13.11**"]


def test_the_last_record_of_a_key_counts():
    twice = [record("FedSpaLLM", geometric_mean=99.0), record("FedSpaLLM", geometric_mean=40.0)]
    assert twice[0]["key"] == twice[1]["key"]
    assert [row.mean for row in summarise(twice)] == [40.0]
    again = [failed("FedSpaLLM", "killed"), *twice]
    assert [(row.mean, row.failed) for row in summarise(again)] == [(40.0, 0)]


def test_standalone_is_its_mean_its_best_and_its_worst_client_of_each_seed():
    records = [standalone([60.0, 90.0, 150.0]), standalone([80.0, 50.0, 110.0], seed=1)]
    rows = {row.method: row for row in summarise(records)}
    assert rows["standalone, mean"].mean == pytest.approx(90.0)
    # The best is another client in each seed.
    assert rows["standalone, best client"].mean == pytest.approx((60 + 50) / 2)
    assert rows["standalone, worst client"].mean == pytest.approx((150 + 110) / 2)
    assert rows["standalone, worst client"].perplexity["novel"] == pytest.approx(130)
    assert rows["standalone, best client"].seeds == (0, 1)


def test_a_client_whose_model_is_broken_is_the_worst_and_never_the_best():
    rows = {row.method: row for row in summarise([standalone([math.nan, 60.0, 90.0])])}
    assert rows["standalone, best client"].mean == 60.0
    assert math.isnan(rows["standalone, worst client"].mean)
    rows = {row.method: row for row in summarise([standalone([math.inf, 60.0])])}
    assert rows["standalone, best client"].mean == 60.0
    assert rows["standalone, worst client"].mean == math.inf


def test_the_best_federated_method_of_a_target_is_bold_and_no_reference_is():
    records = [
        record("dense", "dense", geometric_mean=20.0),
        record("centralised", "centralised", geometric_mean=30.0),
        standalone([31.0, 33.0]),
        record("FedSpaLLM", geometric_mean=40.0),
        record("statistics", geometric_mean=35.5, settings=STATISTICS),
        record("FedSpaLLM", target="2:4", geometric_mean=41.0),
    ]
    found = cells(main_tables(records, ORDER))
    assert list(found) == [
        "perplexity",
        "dense",
        "standalone, mean",
        "standalone, best client",
        "standalone, worst client",
        "FedSpaLLM",
        "statistics",
        "centralised",
    ]
    assert found["perplexity"] == ["60 %", "2:4"]
    assert found["dense"] == ["20.00", "20.00"]
    assert found["centralised"] == ["30.00", "–"]
    assert found["FedSpaLLM"] == ["40.00", "**41.00**"]
    assert found["statistics"] == ["**35.50**", "–"]


def test_methods_stand_as_the_experiment_file_names_them_whatever_came_first():
    records = [record(name, settings=STATISTICS) for name in ("c", "a", "b")]
    assert list(cells(main_tables(records, ["b", "c", "a"])))[1:] == ["b", "c", "a"]


def test_undefined_infinite_large_failed_and_missing_results_are_told_apart():
    records = [
        record("undefined", geometric_mean="nan", settings=STATISTICS),
        record("infinite", geometric_mean="inf", settings=STATISTICS),
        record("large", geometric_mean=20528.4, settings=STATISTICS),
        failed("broken", "obs_prune: not positive definite", settings=STATISTICS),
        record("missing", target=0.7, geometric_mean=12.0, settings=STATISTICS),
    ]
    text = main_tables(records)
    found = cells(text)
    assert [found[name][0] for name in list(found)[1:]] == [
        "nan",
        "∞",
        "**20,528**",
        "failed",
        "–",
    ]
    assert "1 of 5 cases failed:" in text
    assert "broken, 60 %, clients 4, partition domain, seed 0: obs_prune: not positive" in text


def test_an_infinite_seed_has_no_spread_and_a_failed_seed_leaves_the_others():
    records = [
        record("a", geometric_mean="inf"),
        record("a", seed=1, geometric_mean=50.0),
        failed("b", "killed"),
        record("b", seed=1, geometric_mean=60.0),
    ]
    found = cells(main_tables(records))
    assert found["a"] == ["∞"]
    assert found["b"] == ["**60.00**"]
    assert [row.failed for row in summarise(records)] == [0, 1]


def test_dense_and_centralised_stand_in_every_federation_of_their_model_only():
    records = [
        record("dense", "dense", geometric_mean=20.0),
        record("centralised", "centralised", geometric_mean=30.0),
        record("FedSpaLLM", clients=8, partition="iid"),
        record("FedSpaLLM", clients=4),
        record("FedSpaLLM", model="opt", clients=4),
    ]
    text = main_tables(records)
    titles = re.findall(r"^\*\*(.*)\*\*$", text, re.MULTILINE)
    assert titles == [
        "smollm2-135m, 4 clients, by domain",
        "smollm2-135m, 8 clients, IID",
        "opt, 4 clients, by domain",
    ]
    assert text.count("| dense | 20.00 |") == 2 == text.count("| centralised | 30.00 |")


def test_records_of_other_data_are_never_averaged():
    other = {"windows": 16, "seqlen": 256, "eval_windows": 4}
    records = [record("a", geometric_mean=40.0), record("a", seed=1, data=other)]
    assert {row.model: row.mean for row in summarise(records)} == {
        "smollm2-135m, windows 8": 40.0,
        "smollm2-135m, windows 16": 50.0,
    }


def test_pruners_are_compared_apart_and_what_needs_no_data_with_each():
    wanda = {"pruner": "wanda"}
    records = [
        record("dense", "dense", geometric_mean=20.0),
        record("magnitude", geometric_mean=99.0, settings={"pruner": "magnitude"}),
        record("FedSpaLLM", geometric_mean=40.0),
        record("FedSpaLLM", geometric_mean=45.0, settings=wanda),
        record("centralised", "centralised", geometric_mean=38.0, settings=wanda),
    ]
    both = main_tables(records)
    assert "by domain, sparsegpt**" in both and "by domain, wanda**" in both
    found = cells(main_tables(records, pruners=["wanda"]))
    assert found["FedSpaLLM"] == ["**45.00**"]
    assert set(found) == {"perplexity", "dense", "magnitude", "FedSpaLLM", "centralised"}
    assert "centralised" not in cells(main_tables(records, pruners=["sparsegpt"]))


def test_the_domain_table_has_the_costs_of_one_target():
    records = [
        record("FedSpaLLM", perplexity={"novel": 10.0, "web": 90.0}, geometric_mean=30.0),
        record("FedSpaLLM", target=0.5, perplexity={"novel": 8.0}, geometric_mean=8.0),
    ]
    text = domain_tables(records)
    assert "by domain, 60 %**" in text
    found = cells(text)
    assert found["FedSpaLLM"] == ["10.00", "90.00", "30.00", "60", "2.00", "1.50", "1", "10"]
    assert found["perplexity"][-4:] == ["MB up", "MB down", "exchanges", "seconds"]
    assert cells(domain_tables(records, target=0.5))["FedSpaLLM"][:2] == ["8.00", "8.00"]


def test_improvements_are_relative_and_bold_over_thirty_per_cent():
    records = [
        standalone([90.0, 110.0]),
        record("centralised", "centralised", geometric_mean=50.0),
        record("FedSpaLLM", geometric_mean=69.0),
        record("statistics", geometric_mean=50.1, settings=STATISTICS),
        record("FedPrLLM", geometric_mean=60.0, settings={"aggregation": "mask"}),
        record("FedSpaLLM", target=0.7, geometric_mean=200.0),
    ]
    text = improvement_tables(records, ORDER)
    lines = [line for line in text.splitlines() if line.startswith("| 4 clients")]
    assert [line.split(" | ", 1)[1] for line in lines] == [
        # Over the mean of 100, over the best of 90, above the pooled 50.
        "FedSpaLLM | **31.0** | – |",
        "statistics | **49.9** | – |",
        "FedSpaLLM | 23.3 | – |",
        "statistics | **44.3** | – |",
        "FedSpaLLM | +38.0 | – |",
        "statistics | +0.20 | – |",
    ]


def test_a_settings_axis_has_a_table_of_its_own_and_no_line_in_the_main_one():
    records = [*curves(), *variants(), record("dense", "dense", geometric_mean=22.0)]
    assert "curve" not in main_tables(records)
    text = axis_tables(records, axes=["synchronize_every"])
    assert "| method | synchronize_every | 60 % | MB up | MB down | exchanges | seconds |" in text
    every = [re.split(r" \| ", line)[1] for line in text.splitlines() if "| curve |" in line]
    # By size, not by letters.
    assert every == ["1", "2", "5", "10", "30"]
    assert "| dense |  | 22.00 |" in text and "FedPrLLM" not in text
    text = axis_tables(records, axes=["scaling"])
    assert "| FedPrLLM variants | column | true | 819.00 | 2.00 | 1.50 | 1 | 10 |" in text
    assert len([line for line in text.splitlines() if "variants" in line]) == 6


def test_a_setting_left_out_is_its_default_and_no_other_value():
    records = [record("a", settings={}), record("a", seed=1, settings={"aggregation": "l0"})]
    assert [row.axes for row in summarise(records)] == [()]


def test_federations_of_one_target_are_lines_of_the_world_table():
    places = [(32, "dirichlet:0.1", None), (2, "sizes:1.0", [1.0, 0.5])]
    records = [
        *(record("FedSpaLLM", target=target) for target in (0.5, 0.6)),
        *(
            record(name, clients=clients, partition=partition, capacities=capacities)
            for clients, partition, capacities in places
            for name in ("FedSpaLLM", "other")
        ),
    ]
    text = world_tables(records)
    assert "| 32 | Dirichlet(0.1) | **50.00** | **50.00** |" in text
    assert "| 2 | unequal sizes (1.0), capacities 1, 0.5 | **50.00** | **50.00** |" in text
    assert "| 4 |" not in text
    assert "Dirichlet" not in main_tables(records)
    assert world_tables(records[2:]) == ""


def test_a_name_cannot_break_a_table():
    (line,) = [li for li in main_tables([record("a | b")]).splitlines() if "a \\| b" in li]
    assert line == "| a \\| b | **50.00** |"


def test_the_files_hold_every_table_and_a_line_for_every_row(tmp_path):
    records = [*grid(clients=(4,)), *curves(), failed("x", "killed", settings=STATISTICS)]
    tables, results = write_tables(records, tmp_path / "new", ORDER)
    text = tables.read_text(encoding="utf-8")
    for heading in ("Perplexity", "By domain", "Against the clients", "By setting"):
        assert f"\n## {heading}" in text
    with open(results, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = summarise(records)
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line["method"] == row.method
        assert float(line["perplexity"] or "nan") == pytest.approx(row.mean, nan_ok=True)
    by_method = {line["method"]: line for line in lines}
    assert by_method["x"]["perplexity"] == "" and by_method["x"]["failed"] == "1"
    assert by_method["curve"]["settings"] == '{"synchronize_every": 30}'
    assert by_method["statistics"]["seeds"] == "0 1"
    assert by_method["statistics"]["bytes_up"] == "190000000.0"


def test_the_terminals_table_has_every_method_and_target():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table([*grid(clients=(4,)), *curves()], ORDER))
    text = console.export_text()
    assert "statistics" in text and "curve, synchronize_every=30" in text
    assert "52.56 ± 0.15" in text and "80 %" in text


def test_nothing_at_all_is_no_table_and_no_picture(tmp_path):
    assert main_tables([]) == domain_tables([]) == axis_tables([]) == improvement_tables([]) == ""
    assert write_pictures([], tmp_path) == []
    assert len(write_tables([], tmp_path)) == 2
