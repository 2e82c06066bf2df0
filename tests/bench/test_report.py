"""docs/performance.md: numbers and sentences from made-up results, and the page that is stored."""

import json
import re

import pytest
from click.testing import CliRunner

from bench import report
from bench.__main__ import main
from bench.loaded import Machine, machines
from bench.tables import duration, number
from bench.targets import TARGETS, judge, verdicts

CPU = {"cpu": "made-up processor", "cores": "2", "platform": "Linux x86_64"}
GPU = CPU | {"gpu": "NVIDIA H200 (140 GiB)"}
CEILINGS = {"copy": 40e9, "matmul": {"float32": 2e11, "bfloat16": 4e11}}


def operator(name, variant="", rows=4096, cols=4096, seconds=0.01, operations=0, **more):
    least = 9 * rows * cols
    sizes = {"rows": rows, "cols": cols, "clients": more.pop("clients", None), "tokens": None}
    ratios = more.pop("ratios", {"pytorch": 30.0})
    times = {"median": seconds, "p20": 0.9 * seconds, "p80": 1.2 * seconds, "runs": 7}
    return {
        "operator": name,
        "variant": variant,
        "shape": f"{rows}x{cols}",
        "sizes": sizes,
        "dtype": "float32",
        "ours": "native",
        "check": f"mask equal to the reference's, {rows * cols:,} entries",
        "times": {"fedspa": times},
        "ratios": ratios,
        "peak_bytes": {"fedspa": 84_000_000},
        "least_bytes": least,
        "operations": operations,
        "bytes_per_s": least / seconds,
        "flop_per_s": operations / seconds,
        "of_copy": least / seconds / CEILINGS["copy"],
        "of_matmul": operations / seconds / 2e11 if operations else None,
        "skipped": {},
        **more,
    }


def model(pipeline, prune, **more):
    common = {"model": "llama-2-7b", "pruner": "sparsegpt", "sparsity": 0.5, "pattern": None}
    common |= {"clients": 1, "samples": 128, "seqlen": 2048, "dtype": "bfloat16"}
    extrapolated = {"seconds": 16 * prune + 64, "how": "as if every block took as long"}
    return {
        **common,
        "pipeline": pipeline,
        "blocks": 2,
        "of_blocks": 32,
        "check": "14 masks meet the target",
        "stages": {"calibrate": 4.0, "prune": prune, "build": 1000.0},
        "peak_bytes": {"host": 2_000_000_000, "device": None},
        "extrapolated": extrapolated,
        **more,
    }


def document(*results, kind="operators", device="cpu", **more):
    return {
        "format": "fedspa-bench",
        "version": 1,
        "kind": kind,
        "created": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef0123-dirty",
        "command": ["bench", kind, "--all"],
        "device": device,
        "machine": GPU if device == "cuda" else CPU,
        "versions": {"python": "3.12.1", "torch": "2.11.0"},
        "threads": 2,
        "ceilings": CEILINGS,
        "results": list(results),
        **more,
    }


@pytest.fixture
def written(tmp_path):
    """Write documents into a folder and the report beside it; return the page's text."""

    def write(*documents, analysis=None):
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        for index, content in enumerate(documents):
            (folder / f"{index}.json").write_text(json.dumps(content), encoding="utf-8")
        if analysis is not None:
            (tmp_path / "analysis.md").write_text(analysis, encoding="utf-8")
        report.write(folder, tmp_path / "page.md", tmp_path / "analysis.md")
        return (tmp_path / "page.md").read_text(encoding="utf-8")

    return write


def row(page, *cells):
    """Return the cells of the only line that has all of these."""
    (line,) = [x for x in page.splitlines() if x.startswith("|") and all(c in x for c in cells)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def target(device, subject, says):
    (found,) = [t for t in TARGETS if (t.device, t.subject) == (device, subject) and says in t.says]
    return found


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


def test_targets_are_reached_missed_or_not_measured(written):
    good = operator("wanda_prune", "row 50 %", ratios={"sorted": 31.0})
    poor = operator("wanda_prune", "2:4", ratios={"sorted": 29.0})
    floor = operator("obs_prune", "50 %", 768, 768, operations=10**9, ratios={"floor": 0.8})
    page = written(document(good, poor, floor))
    missed = row(page, "≥ 30× the sorted form")
    assert missed[2:] == ["29.0× to 31.0×", "2:4, 4096×4096, float32", "**missed** in 1 of 2"]
    # 1/0.8 = 1.25 times the floor, of at most 1.3.
    assert row(page, "≤ 1.3× one Cholesky")[2:] == ["1.25×", "50 %, 768×768, float32", "yes"]
    assert row(page, "≥ 60× the argsort form")[2:] == ["–", "–", "not measured"]
    assert "Not measured: no GPU result file yet." in page
    assert row(page, "whole model under 5 minutes")[-1] == "not measured"


@pytest.mark.parametrize(("clients", "cases"), [(16, 1), (8, 0)])
def test_a_target_takes_only_the_cases_that_it_names(clients, cases):
    machine = Machine("cpu", "m", operators=[operator("l0_average", "masks", clients=clients)])
    share = target("cpu", "l0_average", "copy bandwidth")
    assert len(judge(share, machine).cases) == cases


def test_never_slower_than_the_reference_is_of_every_operator_from_64_on():
    small = operator("pack_mask", rows=32, cols=512, ratios={"reference": 0.5})
    large = operator("pack_mask", rows=64, cols=64, ratios={"reference": 0.99})
    anything = target("cpu", "any", "never slower")
    assert judge(anything, Machine("cpu", "m", operators=[small])).reached is None
    assert judge(anything, Machine("cpu", "m", operators=[small, large])).reached is False


def test_whole_models_are_judged_by_the_peers_and_extrapolated_only_where_it_is_said(written):
    files = [document(model("fedspa", 4.0), model("peers", 124.0), kind="model", device="cuda")]
    page = written(*files)
    assert row(page, "SparseGPT's procedure")[2:] == ["16.0×", "sparsegpt, 1 clients", "yes"]
    headings = row(page, "all blocks, extrapolated")
    cells = dict(zip(headings, row(page, "| sparsegpt | peers |"), strict=True))
    assert (cells["sum"], cells["against fedspa"]) == ("2 min 8 s", "16.0×")
    assert cells["blocks measured"] == "2 of 32" and cells["peak GB"] == "2.00 host"
    assert "is extrapolated.\nExtrapolated as if every block took as long.\n" in page
    large = document(model("fedspa", 4.0, model="llama-2-70b"), kind="model", device="cuda")
    (machine,) = machines([("a", large)])
    seconds = target("cuda", "llama-2-70b", "under 5 minutes")
    assert judge(seconds, machine).cases[0].value == 128


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


def test_every_target_of_the_two_tables_is_data():
    assert {t.subject for t in TARGETS if t.device == "cuda"} == {
        "l0_average",
        "wanda_prune",
        "expand_mask",
        "accumulate_hessian_",
        "obs_prune",
        "llama-2-7b",
        "llama-2-70b",
    }
    assert len(verdicts(Machine("cpu", "m"))) == 9


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
