"""How cost grows: fitted exponents, what is worse than the floor, and a run that can go on."""

import math

import pytest
from click.testing import CliRunner

from bench import results
from bench.__main__ import main
from bench.growth import points as plan
from bench.growth.fit import block_curves, curves, fit, floor_seconds, worse
from bench.growth.page import exponents, points, sentences
from bench.operators import Sizes

COPY, RATE = 40e9, 1e11


def result(operator, axis, size, seconds, peak=2**26, least=10**9, operations=0):
    sizes = {"rows": 1024, "cols": 1024, "clients": None, "tokens": None, axis: size}
    return {
        "operator": operator,
        "variant": "50 %",
        "axis": axis,
        "sizes": sizes,
        "dtype": "float32",
        "times": {"fedspa": {"median": seconds}},
        "peak_bytes": {"fedspa": peak},
        "least_bytes": least,
        "operations": operations,
        "flop_per_s": operations / seconds,
        "of_matmul": operations / seconds / RATE if operations else None,
        "ceilings": {"copy": COPY, "matmul": {"float32": RATE}},
    }


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.5])
def test_the_exponent_of_a_power_law_is_found(exponent):
    xs = [1024, 2048, 8192]
    found = fit(xs, [3e-7 * x**exponent for x in xs])
    assert found.exponent == pytest.approx(exponent, abs=1e-9)
    assert found.local == pytest.approx([exponent] * 2, abs=1e-9)


def test_a_bend_shows_in_the_exponents_between_neighbours():
    found = fit([1, 2, 4, 8], [1, 2, 4, 32])
    assert found.local == pytest.approx([1, 1, 3])
    # By hand: logarithms to base 2 are (0, 1, 2, 3) and (0, 1, 2, 5).
    assert found.exponent == pytest.approx(1.6)
    assert str(found) == "1.60 (1.00 to 3.00)"


def test_there_is_no_exponent_without_two_sizes_or_with_zeros():
    assert fit([4], [1.0]) is None
    assert fit([4, 4], [1.0, 2.0]) is None
    assert fit([1, 2], [0, 1]) is None


def test_the_floor_is_the_least_bytes_at_the_copy_and_the_operations_at_the_matrix_rate():
    assert floor_seconds(result("a", "cols", 8, 5.0, least=8 * 10**9)) == pytest.approx(0.2)
    both = result("a", "cols", 8, 5.0, least=8 * 10**9, operations=3 * 10**11)
    assert floor_seconds(both) == pytest.approx(3.2)


def test_what_grows_faster_than_the_floor_is_said_and_what_does_not_is_not():
    sizes = (1024, 2048, 4096)
    measured = [
        result(name, "cols", size, 1e-9 * size**exponent, 2**16 * size, 100 * size)
        for size in sizes
        for name, exponent in (("wanda_prune", 1.5), ("expand_mask", 1.05))
    ]
    slow, good = curves(measured)
    assert slow.worse_time and not good.worse_time
    (sentence,) = sentences([slow, good])
    assert "`wanda_prune`: its time grows with cols^1.50" in sentence
    assert "worse than the floor's cols^1.00" in sentence
    assert sentences([good]) == ["Nothing measured grows faster than its floor."]
    assert "**1.50 (1.50 to 1.50)**" in "\n".join(exponents([slow]))
    assert not worse(fit([1, 2], [1, 2**1.09]), fit([1, 2], [1, 2]))
    assert worse(fit([1, 2], [1, 2**1.11]), fit([1, 2], [1, 2]))


def test_memory_that_grows_faster_than_the_least_bytes_is_said_but_not_when_it_is_tiny():
    sizes = (1024, 2048, 4096)
    grows = [result("a", "cols", s, 1e-9 * s, peak=8 * s**2, least=100 * s) for s in sizes]
    assert "peak memory grows with cols^2.00" in sentences(curves(grows))[0]
    tiny = [result("a", "cols", s, 1e-9 * s, peak=s**2 // 100, least=100 * s) for s in sizes]
    assert curves(tiny)[0].peak is None
    assert sentences(curves(tiny)) == ["Nothing measured grows faster than its floor."]


def test_peaks_below_a_mebibyte_are_left_out_of_the_fit():
    peaks = {1024: 5000, 2048: 2**21, 4096: 2**23}
    (curve,) = curves([result("a", "cols", s, 1e-9 * s, p, 100 * s) for s, p in peaks.items()])
    assert curve.peak.exponent == pytest.approx(2) and curve.peak.sizes == (2048, 4096)
    assert curve.least.sizes == (2048, 4096)
    assert "steepest from 2,048 to 4,096, 2.00" in sentences([curve])[0]


def test_results_that_differ_in_more_than_the_axis_are_curves_of_their_own():
    measured = [result("a", "rows", size, size) for size in (2, 8, 4)]
    measured += [{**result("a", "rows", size, size), "dtype": "bfloat16"} for size in (2, 4)]
    one, other = curves(measured)
    assert (one.sizes, one.seconds) == ([2, 4, 8], [2, 4, 8])
    assert one.what == "50 %, 1,024 cols, float32" and other.sizes == [2, 4]
    assert points([one, other], "rows")[2].endswith(
        "2.00 s, 67.1 MB | 4.00 s, 67.1 MB | 8.00 s, 67.1 MB |"
    )


def test_blocks_grow_as_their_number_where_each_costs_what_the_first_did():
    def model(blocks, seconds):
        common = {"model": "m", "pipeline": "fedspa", "pruner": "wanda", "sparsity": 0.5}
        common |= {"pattern": None, "dtype": "float32", "clients": 1, "samples": 8, "seqlen": 64}
        stages = {"prune": seconds, "build": 100.0}
        return {**common, "blocks": blocks, "stages": stages, "peak_bytes": {"host": 2**30}}

    (linear,) = block_curves([model(4, 8.0), model(1, 2.0), model(2, 4.0)])
    assert (linear.sizes, linear.seconds) == ([1, 2, 4], [2.0, 4.0, 8.0])
    assert linear.time.exponent == pytest.approx(1) and not linear.worse_time
    (square,) = block_curves([model(1, 1.0), model(4, 16.0)])
    assert "blocks^2.00" in sentences([square])[0]
    assert block_curves([model(1, 1.0)]) == []


@pytest.fixture
def tiny(monkeypatch):
    """An axis of two sizes that take no time."""
    cases = {"wanda_prune": ("row 50 %", Sizes(8, 0)), "obs_prune": ("50 %", Sizes(8, 0))}
    monkeypatch.setattr(plan, "AXES", {"cols": ((16, 32), cases)})
    monkeypatch.setattr(plan, "BUDGET", 0.01)
    ceilings = {"copy": COPY, "matmul": {"float32": RATE}}
    monkeypatch.setattr("bench.growth.cli.ceilings.measure", lambda place: ceilings)


def run(*options):
    return CliRunner().invoke(main, ["growth", "--device", "cpu", *map(str, options)])


def test_every_point_is_stored_and_a_second_run_completes_the_first(tiny, tmp_path):
    out = tmp_path / "growth.json"
    first = run("--axis", "cols", "--operator", "wanda_prune", "--out", out)
    assert first.exit_code == 0, first.output
    assert [r["sizes"]["cols"] for r in results.read(out)["results"]] == [16, 32]
    second = run("--axis", "cols", "--out", out)
    assert "has 2 of 4 points already" in second.output and "obs_prune along cols" in second.output
    stored = results.read(out)
    assert stored["kind"] == "growth" and len(stored["results"]) == 4
    for found in stored["results"]:
        assert found["axis"] == "cols" and "reference" in found["check"]
        assert math.isfinite(found["times"]["fedspa"]["median"])


def test_out_of_time_the_rest_is_left_for_the_next_run(tiny, tmp_path):
    found = run("--axis", "cols", "--minutes", "0", "--out", tmp_path / "growth.json")
    assert found.exit_code == 0 and "4 points are left" in found.output


def test_large_sizes_are_not_checked_and_say_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MOST_CHECKED", 5000)
    out = tmp_path / "growth.json"
    found = run("--axis", "cols", "--operator", "obs_prune", "--out", out)
    assert found.exit_code == 0, found.output
    small, large = results.read(out)["results"]
    assert "loss within" in small["check"]
    assert "would take too long" in large["check"] and large["times"]["fedspa"]["runs"] >= 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--axis", "depth"), "axis 'depth' is not known; choose from cols"),
        (("--operator", "sort"), "operator 'sort' is not known; choose from obs_prune"),
        (("--axis", "tokens", "--operator", "obs_prune"), "tokens has accumulate_hessian_"),
    ],
)
def test_unknown_axes_and_operators_are_refused_with_the_known(options, sentence, tmp_path):
    found = run(*options, "--out", tmp_path / "growth.json")
    assert found.exit_code == 2 and sentence in found.output


def test_a_file_of_another_commit_is_not_added_to(tiny, tmp_path):
    out = tmp_path / "growth.json"
    ceilings = {"copy": COPY, "matmul": {}}
    results.write(out, {**results.new("growth", "cpu", [], ceilings), "commit": "0" * 40})
    found = run("--axis", "cols", "--out", out)
    assert found.exit_code == 2 and "has commit 000" in found.output
