"""What the network costs: the processes that are watched, growth along the bytes, and the page."""

import sys

import pytest
from click.testing import CliRunner
from made_up import document, row
from parties import Parties

from bench import report
from bench.__main__ import main
from bench.network.cases import CASES, GROUPS, choose
from bench.network.growth import steps
from bench.network.page import compose
from bench.network.watch import Watch, busy_seconds, now

MIB = 2**20
PROGRAMS = ("flwr-clientapp", "flwr-serverapp", "flower-superlink", "flower-supernode")
BUSY = "import time; end = time.process_time() + 0.5\nheld = b'x' * 50_000_000\n"
BUSY += "while time.process_time() < end: pass\ntime.sleep(0.5)\n"


def result(group, case, mib=1.0, clients=3, together=1, power=1.0, **more):
    """A run whose costs are a fixed part and what grows with the bytes to some power."""
    grown = mib**power
    count = round(mib * MIB)
    far = {
        "seconds": 30.0 + grown,
        "others": 0.02,
        "phases": {"start": 9.0, "join": 8.0, "work": 7.0 + grown, "finish": 5.0, "end": 1.0},
        "stages": {"wait": 12.0 + grown, "check": 0.01 * grown, "aggregate": 0.02 * mib, "save": 1},
        "messages": [{"seconds": 6.0, "process": 5.0, "cpu": 4.5, "peak": 500 * MIB}] * 3,
        "cpu": {program: 5.0 + 0.05 * mib for program in (*PROGRAMS, "flwr", "flower-superexec")},
        "peak_bytes": {program: 500 * MIB + 3 * count for program in PROGRAMS},
        "bytes": {
            **{"bytes_up": count, "bytes_down": 0, "wire_up": count + 800, "wire_down": 0},
            **{"sent": count + 90_000, "received": 10_000},
        },
    }
    near = {"seconds": 6.0, "stages": {"prune": 1.0}, "peak_bytes": 450 * MIB}
    config = {"samples": 8, "seqlen": 256, "sparsity": 0.6, "blocks-per-message": together}
    chosen = {"group": group, "case": case, "clients": clients, "blocks": 4, "config": config}
    chosen |= {"poll": 0.1, "check": "the same", "commit": 40 * "c"}
    return {**chosen, "far": far, "near": near, **more}


def along_bytes(power):
    return [result("bytes", f"{mib}", mib, power=power) for mib in (1, 10, 30, 100)]


def test_growth_is_that_above_the_fixed_cost():
    found = {step.name: step for step in steps(along_bytes(1.0))}
    waiting = found["all messages, until all have answered"]
    assert waiting.costs[0] == 8.0 and waiting.rate == pytest.approx(1.0)
    assert waiting.growth.exponent == pytest.approx(1.0) and not waiting.faster
    # What stays the same has no exponent, and is not called growth.
    assert found["saving"].growth is None and not found["saving"].faster
    assert found["peak of one `flwr-serverapp`"].rate == pytest.approx(3.0)


def test_what_grows_faster_than_the_bytes_is_named():
    found = {step.name: step for step in steps(along_bytes(1.5))}
    assert found["checks"].faster and found["checks"].last_rate > found["checks"].rate
    assert not found["aggregation"].faster
    page = compose([("a.json", document(*along_bytes(1.5), kind="network"))])
    assert "Faster than the bytes grow: all messages" in page and "checks (1." in page
    good = compose([("a.json", document(*along_bytes(1.0), kind="network"))])
    assert "No step grows faster than the bytes." in good


def test_the_page_has_a_row_for_every_run():
    perplexity = {kind: {"speeches": 20.0, "scripture": 45.0} for kind in ("dense", "pruned")}
    content = document(
        result("fixed", "polls of 0.1 s"),
        *(result("clients", f"{n} clients", clients=n) for n in (16, 2)),
        *along_bytes(1.0),
        result("smollm2", "one-shot l0", mib=98.0, perplexity=perplexity),
        kind="network",
    )
    page = compose([("a.json", content)])
    commits = "fixed ccccccc, clients ccccccc, bytes ccccccc, smollm2 ccccccc"
    assert f"Measured at the commits: {commits}." in page
    assert row(page, "| polls of 0.1 s |")[1:6] == [
        "9.00 s",
        "8.00 s",
        "8.00 s",
        "5.00 s",
        "1.00 s",
    ]
    assert "join 0.00; work 0.00" in page and row(page, "| 16 | 9.00 s |")[-4] == "10.1"
    assert row(page, "| 100 | 1 |")[4] == "107 s"
    assert row(page, "| perplexity, pruned, geometric mean |")[1] == "30.0"
    assert "in frames (800 of headers)" in page and "90,000" not in page
    assert row(page, "| a.json |")[1] == "network"


def test_a_process_is_watched_with_its_cpu_and_its_memory(tmp_path):
    script = tmp_path / "flwr-clientapp"
    script.write_text(BUSY)
    parties = Parties(tmp_path / "parties")
    begin, busy = now(), busy_seconds()
    try:
        with Watch(parties) as watch:
            process = parties.start("node-3", [sys.executable, str(script)])
            process.wait(30)
    finally:
        parties.end()
    (found,) = watch.processes("flwr-clientapp", "node-3")
    assert 0.4 <= found.cpu <= 1.5 and found.peak > 50_000_000
    assert begin - 0.1 <= found.began < found.seen <= now()
    assert watch.processes("flwr-clientapp", "node-4") == []
    assert busy_seconds() - busy >= 0.4


def test_cases_are_chosen_by_group_and_name():
    assert len({(case.group, case.name) for case in CASES}) == len(CASES)
    assert [case.clients for case in choose(["clients"], "")] == [2, 4, 8, 16]
    assert [case.hidden for case in choose(["bytes"], "1024, 2")] == [1024]
    for arguments, sentence in (
        (["--group", "colour"], f"choose from {', '.join(GROUPS)}"),
        (["--group", "fixed", "--case", "noon"], 'there are "Flower\'s own polls"'),
    ):
        found = CliRunner().invoke(main, ["network", *arguments])
        assert found.exit_code == 2 and sentence in found.output


def test_the_stored_page_is_what_the_stored_results_give(tmp_path):
    """The page is not written by hand: `python -m bench report` after a change of either."""
    again = tmp_path / report.COST.name
    assert report.write_cost(report.RESULTS, again) == [again]
    assert report.COST.read_text(encoding="utf-8") == again.read_text(encoding="utf-8")
