"""Progress of a run: one line a block, JSON lines, a bar on a terminal; the clock is a list."""

import io
import json
import sys

import pytest

from fedspa.events import memory
from fedspa.machine import gpu_memory_now, memory_now, peak_memory
from fedspa.progress import block_progress, progress_bar

TOKENS = {"a": 3000, "b": 1000}


class Clock:
    """Stands still until a test moves it."""

    def __init__(self):
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def known_memory(monkeypatch):
    """1.8 GB now, 2.1 GB at most, no GPU."""
    known = {"memory_now": 1.8e9, "peak_memory": 2.1e9, "gpu_memory_now": 0, "peak_gpu_memory": 0}
    for name, size in known.items():
        monkeypatch.setattr(f"fedspa.events.{name}", lambda size=size: int(size))


def walk(progress, clock, seconds, rounds=1, first=(0, 0), clients=("a", "b")):
    """Let every block calibrate all clients; the next of `seconds` passes in each."""
    times = iter(seconds)
    for round_index in range(first[0], rounds):
        for index in range(first[1] if round_index == first[0] else 0, progress.blocks):
            for client in clients:
                progress.stage("calibrate", client)
                progress.stage("prune", client)
            clock.now += next(times)
            progress.block_done(round_index, index)


def events(capsys) -> list[dict]:
    """What went to stderr, a JSON object a line; nothing may go to stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_without_a_terminal_every_block_is_one_line_and_the_end_another(capsys):
    clock = Clock()
    with block_progress(3, 1, TOKENS, show=True, clock=clock) as progress:
        walk(progress, clock, [2.0, 4.0, 300.0])
    assert capsys.readouterr().err.splitlines() == [
        "block 1/3: 2.0 s, 2,000 tokens/s, 1.8 GB, 4.0 s left",
        "block 2/3: 4.0 s, 1,000 tokens/s, 1.8 GB, 3.0 s left",
        "block 3/3: 5 min 0 s, 13 tokens/s, 1.8 GB",
        "done: 3 blocks in 5 min 6 s, 39 tokens/s, 2.1 GB at most",
    ]


def test_rounds_are_named_where_there_are_several(capsys):
    clock = Clock()
    with block_progress(2, 2, TOKENS, show=True, clock=clock) as progress:
        walk(progress, clock, [1.0] * 4, rounds=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "round 1/2, block 1/2",
        "round 1/2, block 2/2",
        "round 2/2, block 1/2",
        "round 2/2, block 2/2",
        "done",
    ]
    assert [line.rsplit(", ", 1)[1] for line in lines[:3]] == [
        "3.0 s left",
        "2.0 s left",
        "1.0 s left",
    ]


def test_tokens_count_only_of_clients_that_the_block_took(capsys):
    clock = Clock()
    with block_progress(2, 1, TOKENS, show=True, clock=clock) as progress:
        walk(progress, clock, [1.0, 1.0], clients=("b",))
    assert "1,000 tokens/s" in capsys.readouterr().err.splitlines()[1]
    with block_progress(1, 1, TOKENS, show=True, clock=clock) as progress:
        clock.now += 1
        progress.block_done(0, 0)
    assert capsys.readouterr().err.splitlines() == [
        "block 1/1: 1.0 s, 1.8 GB",
        "done: 1 block in 1.0 s, 2.1 GB at most",
    ]


def test_events_are_json_lines_whatever_stderr_is(capsys):
    clock = Clock()
    with block_progress(2, 1, TOKENS, events=True, clock=clock) as progress:
        walk(progress, clock, [2.0, 2.0])
    told = events(capsys)
    kinds = [event["event"] for event in told]
    assert kinds == ["start", *["stage"] * 4, "block", *["stage"] * 4, "block", "done"]
    assert (told[0]["blocks"], told[0]["clients"], told[0]["tokens"]) == (2, 2, 4000)
    assert told[8] == {
        "event": "stage",
        "round": 0,
        "block": 1,
        "blocks": 2,
        "stage": "calibrate",
        "client": "b",
    }
    assert told[5] == {
        "event": "block",
        "round": 0,
        "block": 0,
        "blocks": 2,
        "rounds": 1,
        "seconds": 2.0,
        "tokens_per_second": 2000.0,
        "seconds_left": 2.0,
        "memory": 1_800_000_000,
        "gpu_memory": 0,
    }
    assert told[-1] == {
        "event": "done",
        "blocks": 2,
        "seconds": 4.0,
        "tokens_per_second": 2000.0,
        "peak_memory": 2_100_000_000,
        "peak_gpu_memory": 0,
    }


def test_a_resumed_run_starts_at_its_block_and_is_timed_by_its_own_blocks(capsys):
    clock = Clock()
    with block_progress(3, 2, TOKENS, first=(0, 2), events=True, clock=clock) as progress:
        walk(progress, clock, [5.0] * 4, rounds=2, first=(0, 2))
    told = [event for event in events(capsys) if event["event"] != "stage"]
    assert (told[0]["event"], told[0]["round"], told[0]["block"]) == ("resumed", 0, 2)
    blocks = [(event["round"], event["block"], event["seconds_left"]) for event in told[1:-1]]
    assert blocks == [(0, 2, 15.0), (1, 0, 10.0), (1, 1, 5.0), (1, 2, 0.0)]
    assert told[-1]["blocks"] == 4


def test_no_run_that_failed_is_said_to_be_done(capsys):
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        block_progress(2, 1, TOKENS, events=True) as progress,
    ):
        progress.block_done(0, 0)
        raise RuntimeError("out of memory")
    assert [event["event"] for event in events(capsys)] == ["start", "block"]


@pytest.mark.parametrize("options", [{"show": False}, {"show": False, "events": True}, {}])
def test_quiet_runs_write_nothing(capsys, options):
    clock = Clock()
    with block_progress(2, 1, TOKENS, clock=clock, **options) as progress:
        walk(progress, clock, [1.0, 1.0])
    assert capsys.readouterr() == ("", "")


def test_time_left_runs_down_between_blocks_and_stops_at_zero():
    clock = Clock()
    with block_progress(3, 1, TOKENS, show=False, clock=clock) as progress:
        assert progress.seconds_left() is None
        clock.now += 10
        progress.block_done(0, 0)
        assert progress.seconds_left() == 20.0
        clock.now += 5
        assert progress.seconds_left() == 15.0
        clock.now += 50
        assert progress.seconds_left() == 0.0


def test_a_terminal_shows_block_stage_client_rate_time_and_memory(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    clock = Clock()
    with block_progress(4, 1, TOKENS, clock=clock) as progress:
        for client in TOKENS:
            progress.stage("calibrate", client)
        assert progress.position == 0.5
        clock.now += 2
        progress.block_done(0, 0)
        progress.stage("prune", "[bold]a")
        clock.now += 1
    last = [line for line in terminal.getvalue().splitlines() if "block" in line][-1]
    for fact in ("block 2/4", "2,000 tokens/s", "5.0 s left", "1.8 GB", "prune, [bold]a"):
        assert fact in last


def test_a_simple_bar_counts_steps_in_lines(capsys):
    with progress_bar("evaluating", 3, show=True) as advance:
        for _ in range(3):
            advance("dense")
    assert capsys.readouterr().err.splitlines() == ["evaluating: 3/3, 0 s left, dense"]


def test_memory_is_read_of_this_process():
    held = memory_now()
    if sys.platform == "linux":
        # The kernel counts the two apart, and lags a little behind with each.
        assert 10_000_000 < held < 1.02 * peak_memory()
        more = bytearray(b"x") * 50_000_000
        assert memory_now() - held > 40_000_000
        del more
    assert gpu_memory_now() >= 0
    assert memory(1_800_000_000, 20_440_000_000) == "1.8 GB, 20.4 GB on the GPU"
    assert memory(0, 0) == ""
