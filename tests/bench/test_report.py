"""docs/performance.md: numbers and sentences from made-up results, and the page that is stored."""

import json
import re

import pytest
from click.testing import CliRunner
from made_up import GPU, document, operator, row

from bench import report
from bench.__main__ import main
from bench.loaded import machines
from bench.tables import duration, number


def test_numbers_and_durations_have_three_digits_and_a_unit():
    numbers = {0: "0", 0.0123: "0.012", 1.234: "1.23", 12.34: "12.3", 99.96: "100", 1234.5: "1,234"}
    assert {x: number(x) for x in numbers} == numbers
    times = {4.56e-5: "45.6 µs", 1.234e-3: "1.23 ms", 12.34: "12.3 s", 272: "4 min 32 s"}
    times |= {9000: "2.5 h"}
    assert {x: duration(x) for x in times} == times


def test_a_row_has_the_times_the_rates_the_shares_and_every_ratio(written):
    case = operator("wanda_prune", "row 50 %", ratios={"pytorch": 30.0, "sorted": 41.5})
    page = written(document(case))
    section = page[page.index("### `wanda_prune`") :]
    headings = row(section, "| shape |")
    cells = dict(zip(headings, row(section, "| 4096x4096 |"), strict=True))
    # 9 · 4096² bytes in 10 ms are 15.1 GB/s, of 40.
    assert cells == {
        "shape": "4096x4096",
        "case": "row 50 %",
        "dtype": "float32",
        "rows × cols": "4096 × 4096",
        "time": "10.0 ms",
        "p20–p80": "9.00–12.0",
        "GB/s": "15.1",
        "% of copy": "38",
        "× pytorch": "30.0",
        "× sorted": "41.5",
        "peak MB": "84.0",
    }
    assert "mask equal to the reference's, 16,777,216 entries" in section


def test_a_compute_bound_row_has_flops_of_the_matrix_rate(written):
    page = written(document(operator("obs_prune", "50 %", seconds=2.0, operations=10**11)))
    section = page[page.index("### `obs_prune`") :]
    cells = dict(zip(row(section, "| shape |"), row(section, "| 4096x4096 |"), strict=True))
    assert (cells["TFLOP/s"], cells["% of matmul"]) == ("0.050", "25")
    assert "GB/s" not in cells


def test_the_summary_comes_first_with_one_line_an_operator(written):
    cases = [
        operator(name, rows=rows, clients=clients, ratios={"pytorch": ratio, "reference": 80.0})
        for name, clients in (("expand_mask", 8), ("l0_average", 8))
        for rows, ratio in ((4096, 20.0), (64, 7.0))
    ]
    page = written(document(*cases))
    table = page[: page.index("## Targets")]
    assert row(table, "`l0_average`") == [
        "`l0_average`",
        "4096×4096, 8 clients, float32",
        "10.0 ms",
        "38% of copy",
        "20.0× (pytorch)",
        "7.00× – 20.0×",
    ]
    assert page.index("`l0_average`") < page.index("`expand_mask`")
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 4
    assert "no GPU result file yet" in table


def test_machines_have_sections_of_their_own_and_files_their_origin(written):
    page = written(
        document(operator("expand_mask")), document(operator("expand_mask"), device="cuda")
    )
    assert page.index("### NVIDIA H200") < page.index("### made-up processor, 2 cores")
    assert "no GPU result file" not in page
    origin = row(page, "| 1.json |")
    assert origin[1:4] == ["operators", f"cuda: {', '.join(GPU.values())}", "2"]
    assert origin[4:] == [
        "2026-01-02T03:04:05+00:00",
        "0123456789ab-dirty",
        "`python -m bench operators --all`",
        "python 3.12.1, torch 2.11.0",
    ]


def test_of_two_files_with_the_same_case_the_newer_counts():
    old = document(operator("expand_mask", seconds=1.0), operator("expand_mask", "2:4"))
    new = document(operator("expand_mask", seconds=2.0), created="2026-02-01T00:00:00+00:00")
    (machine,) = machines([("old", old), ("new", new)])
    seconds = {r["variant"]: r["times"]["fedspa"]["median"] for r in machine.operators}
    assert seconds == {"": 2.0, "2:4": 0.01}


def failed(name, why, **more):
    """A result as a run stores it where a case raised or had no time left."""
    chosen = ("operator", "variant", "shape", "sizes", "dtype")
    whole = operator(name, "row 50 %", **more)
    return {key: whole[key] for key in chosen} | {"failed": why}


def test_what_failed_is_listed_and_in_no_other_table(written):
    over = [failed("wanda_prune", "the time was over.", rows=rows) for rows in (64, 4096)]
    wrong = failed("expand_mask", "WrongResult: mask differs | in 3 entries", dtype="bfloat16")
    page = written(document(operator("l0_average"), *over, wrong))
    table = page[page.index("## Not measured on made-up processor") : page.index("## Files")]
    assert row(table, "`wanda_prune`")[1:] == [
        "64 × 4096 float32, 4096 × 4096 float32",
        "the time was over",
        "2",
    ]
    assert row(table, "`expand_mask`")[2] == "WrongResult: mask differs / in 3 entries"
    assert "### `wanda_prune`" not in page and "### `l0_average`" in page
    assert "## Not measured" not in written(document(operator("l0_average")))


def test_a_file_of_failures_alone_makes_a_page(written):
    page = written(document(failed("wanda_prune", "the time was over")))
    assert "## Not measured on" in page and "## Operators on" not in page


def test_a_failure_takes_no_older_time_away_and_a_newer_time_ends_it():
    bad = failed("expand_mask", "out of memory")
    good = operator("expand_mask", "row 50 %")
    (machine,) = machines([("old", document(good)), ("new", document(bad))])
    assert len(machine.operators) == len(machine.failed) == 1
    (machine,) = machines([("old", document(bad)), ("new", document(good))])
    assert len(machine.operators) == 1 and machine.failed == []


def test_an_analysis_is_included_where_there_is_one(written):
    files = [document(operator("expand_mask"))]
    assert "Where a target is missed" not in written(*files)
    page = written(*files, analysis="It is bound by memory.\n")
    assert "## Where a target is missed\n\nIt is bound by memory.\n" in page


def test_the_same_results_give_the_same_bytes_and_pictures_that_nobody_draws_go(written, tmp_path):
    case = operator("obs_prune", seconds=2.0, operations=10**11)
    other = operator("expand_mask", dtype="bfloat16")
    first = written(document(case, other))
    drawn = {p.name: p.read_bytes() for p in (tmp_path / "page").iterdir()}
    assert len(drawn) == 2 and all(b"prefers-color-scheme: dark" in d for d in drawn.values())
    assert written(document(case, other)) == first
    assert {p.name: p.read_bytes() for p in (tmp_path / "page").iterdir()} == drawn
    (tmp_path / "page" / "hand.svg").write_text("<svg/>")
    written(document(case))
    left = sorted(p.name for p in (tmp_path / "page").iterdir())
    assert left == ["hand.svg", "roofline-made-up-processor-2-cores-float32.svg"]


def test_growth_is_drawn_and_told(written, tmp_path):
    measured = [
        operator("wanda_prune", cols=cols, seconds=1e-9 * cols**2) | {"axis": "cols"}
        for cols in (1024, 2048, 4096)
    ]
    page = written(document(*measured, kind="growth"))
    assert "`wanda_prune`: its time grows with cols^2.00" in page
    assert "| `wanda_prune` | 4,096 rows, float32 | 1.05 ms, 84.0 MB |" in page
    assert (tmp_path / "page" / "growth-made-up-processor-2-cores-cols.svg").is_file()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (json.dumps(document() | {"version": 2}), "version 2"),
        (json.dumps({"format": "other"}), "not a fedspa-bench file"),
        ('{"format"', "no complete JSON"),
        (None, "holds no result file"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, content, sentence):
    folder = tmp_path / "results"
    folder.mkdir()
    if content is not None:
        (folder / "a.json").write_text(content)
    page = tmp_path / "page.md"
    arguments = ["report", "--results", str(folder), "--out", str(page)]
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 2 and sentence in found.output
    assert not page.exists()


def test_the_stored_page_is_what_the_stored_results_give(tmp_path):
    """The page is not written by hand: `python -m bench report` after a change of either."""
    if not list(report.RESULTS.glob("*.json")):
        assert not report.PAGE.exists(), f"{report.PAGE} was written without results"
        return
    again = tmp_path / report.PAGE.name
    report.write(report.RESULTS, again, report.ANALYSIS)
    assert report.PAGE.read_text(encoding="utf-8") == again.read_text(encoding="utf-8")
    for picture in re.findall(r"\]\((\S+\.svg)\)", report.PAGE.read_text(encoding="utf-8")):
        assert (report.PAGE.parent / picture).is_file()
