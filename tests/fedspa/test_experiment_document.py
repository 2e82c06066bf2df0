"""Tables and pictures between the markers of a page; the prose is its author's."""

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from experiment_records import ORDER, curves, grid, record, standalone, variants

from fedspa.experiments.experiment_file import read_experiment, shipped_grids
from fedspa.experiments.results.comparisons import improvement_tables
from fedspa.experiments.results.document import main, write_document
from fedspa.experiments.results.expectations import Expectation, check

PAGE = """# Results

Prose before, with a | pipe and <!-- a comment -->.

<!-- results:main -->
old
<!-- end:main -->

Prose between.

<!-- results:exchanges --><!-- end:exchanges -->
<!-- results:picture-sparsity -->
<!-- end:picture-sparsity -->

Prose at the end, without a newline"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "docs" / "results.md"
    path.parent.mkdir()
    path.write_text(PAGE, encoding="utf-8")
    return path


def test_sections_are_replaced_and_prose_stays(page):
    write_document([*grid(clients=(4,)), *curves()], page, page.parent / "results", ORDER)
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    for prose in ("with a | pipe and <!-- a comment -->.", "\n\nProse between.\n\n"):
        assert prose in text
    assert text.endswith("Prose at the end, without a newline")
    assert "| statistics | **30.29 ± 0.09** |" in text
    assert "| curve | 30 |" in text
    assert "](results/sparsity.svg)" in text
    assert (page.parent / "results" / "sparsity.svg").exists()


def test_a_second_run_changes_nothing(page, tmp_path):
    results = tmp_path / "results.jsonl"
    others = [*grid(clients=(4, 8), targets=(0.5, 0.6)), *curves(), *variants()]
    asked = [invented(case) for case in read_experiment("quick").cases]
    # The results of parallel workers come in any order, and a file may hold those of other grids.
    lines = [json.dumps(line) + "\n" for line in [*asked, *others]]
    results.write_text("".join(lines))
    experiment = "quick"
    words = [str(results), str(page), "--experiment", experiment]
    states = []
    for content in (lines, lines, reversed(lines)):
        results.write_text("".join(content))
        outcome = CliRunner().invoke(main, words)
        assert outcome.exit_code == 0, outcome.output
        drawn = sorted((page.parent / "results").glob("*.svg"))
        assert drawn
        states.append((page.read_bytes(), [picture.read_bytes() for picture in drawn]))
    assert states[0] == states[1] == states[2]


def test_wanda_has_a_section_of_its_own_beside_the_main_one(page):
    page.write_text(
        "<!-- results:main -->\n<!-- end:main -->\n<!-- results:wanda -->\n<!-- end:wanda -->\n"
    )
    records = [
        record("FedSpaLLM", geometric_mean=40.0),
        record("FedSpaLLM", geometric_mean=45.0, settings={"pruner": "wanda"}),
    ]
    write_document(records, page, page.parent)
    main_section, wanda_section = page.read_text().split("<!-- end:main -->")
    assert "40.00" in main_section and "45.00" not in main_section
    assert "45.00" in wanda_section and "40.00" not in wanda_section


def test_a_section_without_results_says_so_and_is_filled_later(page):
    write_document([record("FedSpaLLM")], page, page.parent)
    assert page.read_text(encoding="utf-8").count("No results yet.") == 2
    write_document([record("FedSpaLLM"), *curves()], page, page.parent)
    assert page.read_text(encoding="utf-8").count("No results yet.") == 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("\n<!-- results:mian -->\n<!-- end:mian -->", "line 2: there are no results named 'mian'"),
        ("<!-- results:main -->\ntext", "results:main has no end"),
        ("<!-- results:main --><!-- results:world --><!-- end:world -->", "main has no end"),
        ("<!-- results:main --><!-- end:world -->", "end:world ends nothing"),
        ("text <!-- end:main -->", "end:main ends nothing"),
        (PAGE + "<!-- results:main -->", "results:main has no end"),
    ],
    ids=["unknown", "no end", "nested", "crossed", "no start", "late"],
)
def test_markers_that_do_not_match_are_refused_and_nothing_is_written(page, text, named):
    page.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="document: ") as error:
        write_document([record("FedSpaLLM")], page, page.parent / "results")
    assert named in str(error.value)
    assert page.read_text(encoding="utf-8") == text
    assert not (page.parent / "results").exists()


def test_the_command_says_what_is_wrong_and_exits_with_two(page, tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(record("FedSpaLLM")) + "\n")
    page.write_text("<!-- results:main -->")
    outcome = CliRunner().invoke(main, [str(results), str(page)])
    assert outcome.exit_code == 2 and "has no end" in outcome.output


RESULTS = Path(__file__).parents[2] / "docs" / "results.md"


def invented(case):
    """A record of a case, whatever it would give."""
    identity = {"key": case.key, **case.identity}
    if case.kind == "standalone":
        return standalone([90.0, 110.0]) | identity
    exchanges = 30 // case.settings.get("synchronize_every", 30)
    return record(case.method, case.kind, exchanges=exchanges) | identity


def test_every_method_of_the_evidence_has_a_line_on_its_page(tmp_path):
    experiment = read_experiment("smollm2")
    order = list(tomllib.loads(shipped_grids()["smollm2"].read_text())["method"])
    page = tmp_path / "results.md"
    page.write_text(RESULTS.read_text(encoding="utf-8"), encoding="utf-8")
    write_document([invented(case) for case in experiment.cases], page, tmp_path / "drawn", order)
    text = page.read_text(encoding="utf-8")
    assert "No results yet" not in text
    lines = [line.replace("**", "") for line in text.splitlines() if line.startswith("|")]
    for method in order:
        name = f"{method}, mean" if method == "standalone" else method
        assert any(f"| {name} |" in line for line in lines), method


def test_exact_sums_are_no_line_of_the_main_tables_and_no_reference_of_others():
    exact = {"settings": {"statistics_dtype": "int64"}}
    records = [
        record("centralised", "centralised", geometric_mean=50.0),
        record("centralised, exact", "centralised", geometric_mean=80.0, **exact),
        record("FedSpaLLM", geometric_mean=60.0, settings={"aggregation": "l0"}),
        record("FedSpaLLM", geometric_mean=60.0, settings={"aggregation": "l0"}, target=0.5),
    ]
    for order in (records, records[::-1]):
        assert "| FedSpaLLM | – | +20.0 |" in improvement_tables(order)


def test_methods_are_compared_over_the_seeds_that_both_have():
    ours = [
        record("FedSpaLLM", geometric_mean=value, seed=seed, settings={"aggregation": "l0"})
        for seed, value in ((0, 60.0), (1, 90.0))
    ]
    theirs = [standalone([100.0, 100.0], seed=0)]
    assert "| **40.0** |" in improvement_tables([*ours, *theirs])
    lower = Expectation("FedSpaLLM", "standalone, mean", at_least=1.6)
    assert [outcome.met for outcome in check([*ours, *theirs], [lower])] == [True]
