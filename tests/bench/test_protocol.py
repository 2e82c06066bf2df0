"""How times become figures. The clock is a fake one wherever a number is checked."""

import pytest
import torch

from bench import ceilings, memory, protocol

CPU = torch.device("cpu")


class Clock:
    """A clock that moves only when a contender says so."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def perf_counter(self):
        return self.now

    def contender(self, name, seconds):
        taken = iter(seconds) if isinstance(seconds, list) else None

        def run(inputs):
            self.now += next(taken) if taken else seconds
            self.log.append((name, inputs))

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(protocol.time, "perf_counter", clock.perf_counter)
    return clock


def test_contenders_take_turns_on_inputs_in_rotation(clock):
    runs = {name: clock.contender(name, 0.01) for name in ("fedspa", "pytorch", "floor")}
    estimates = dict.fromkeys(runs, 0.01)
    rounds = protocol.race(runs, [0, 1], CPU, budget=0.3, estimates=estimates)
    assert len(rounds) == 5
    assert all(set(row) == set(runs) for row in rounds)
    timed = clock.log[1::2]  # before each, the same contender has settled on the other inputs
    assert [name for name, _ in timed][::3] == ["fedspa", "pytorch", "floor", "fedspa", "pytorch"]
    assert [inputs for _, inputs in timed][::3] == [0, 1, 0, 1, 0]
    assert clock.log[::2] == [(name, 1 - inputs) for name, inputs in timed]


def test_a_ratio_is_the_median_of_the_rounds_own(clock):
    """A machine that slows down by the round changes both sides, and no ratio."""
    slower = [9.0, 1.0, 9.0, 2.0, 9.0, 4.0, 9.0, 8.0, 9.0, 16.0]  # every other one settles
    runs = {
        "fedspa": clock.contender("fedspa", slower),
        "pytorch": clock.contender("pytorch", [3 * taken for taken in slower]),
    }
    estimates = {"fedspa": 1.0, "pytorch": 1.0}
    rounds = protocol.race(runs, [None], CPU, budget=10, estimates=estimates)
    assert protocol.ratios(rounds) == {"pytorch": pytest.approx(3)}


def test_a_round_in_which_one_side_sat_out_is_in_no_ratio():
    rounds = [{"fedspa": 1.0, "pytorch": 2.0}, {"fedspa": 50.0}, {"pytorch": 90.0}]
    assert protocol.ratios(rounds) == {"pytorch": 2.0}


def test_slow_contenders_run_less_often_and_spread_over_the_rounds():
    plan = protocol.plan({"fedspa": 0.001, "pytorch": 0.08, "sorted": 0.4, "argsort": 30}, 1.0)
    assert plan == {"fedspa": 50, "pytorch": 5, "sorted": 3, "argsort": 1}
    taken = [number for number in range(50) if protocol.takes_part(number, 5, 50)]
    assert taken == [9, 19, 29, 39, 49]
    assert protocol.plan({"fedspa": 1.0}, 0.1) == {"fedspa": 5}
    assert protocol.plan({"fedspa": 6.0}, 0.1) == {"fedspa": 3}


def test_small_calls_share_a_sample(clock):
    runs = {"fedspa": clock.contender("fedspa", 1e-5)}
    estimates = {"fedspa": protocol.estimate(runs["fedspa"], 0, CPU)}
    assert estimates == {"fedspa": pytest.approx(1e-5)}
    rounds = protocol.race(runs, [0, 1, 2], CPU, budget=0.001, estimates=estimates)
    assert [row["fedspa"] for row in rounds] == pytest.approx([1e-5] * len(rounds))
    sets = [inputs for _, inputs in clock.log[-100:]]  # the last sample
    assert {sets.count(number) for number in range(3)} <= {33, 34}, "sets rotate within a sample"
    assert protocol.calls_per_sample(1e-5, CPU) == 100
    assert protocol.calls_per_sample(2e-4, CPU) == 1
    assert protocol.calls_per_sample(0, CPU) == 1000


class Gpu:
    """A GPU with a clock of its own: what is queued runs when someone waits, and events tell when.

    A kernel takes 2 s, to empty the cache 100 s.
    """

    def __init__(self):
        self.queue, self.now = [], 0.0

    def launch(self, seconds):
        self.queue.append(lambda: setattr(self, "now", self.now + seconds))

    def synchronize(self):
        while self.queue:
            self.queue.pop(0)()

    def event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, gpu):
        self.gpu, self.at = gpu, None

    def record(self):
        self.gpu.queue.append(lambda: setattr(self, "at", self.gpu.now))

    def elapsed_time(self, end):
        assert self.at is not None and end.at is not None, "read before it was waited for"
        return 1e3 * (end.at - self.at)


def test_on_a_gpu_events_time_what_runs_there_without_the_flush_and_are_read_at_the_end(
    monkeypatch,
):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(protocol, "_flush_cache", lambda device: gpu.launch(100))
    runs = {
        "fedspa": lambda inputs: gpu.launch(2),
        "pytorch": lambda inputs: [gpu.launch(2) for _ in range(3)],
    }
    estimates = {"fedspa": 25e-6, "pytorch": 1.0}  # the first is small, 8 calls make a sample
    rounds = protocol.race(runs, [0, 1], "cuda", budget=1, estimates=estimates)
    assert rounds[-1] == {"fedspa": pytest.approx(2), "pytorch": pytest.approx(6)}
    assert protocol.ratios(rounds) == {"pytorch": pytest.approx(3)}
    assert len(rounds) == protocol.MOST_ROUNDS and not gpu.queue


def test_input_sets_are_more_than_the_cache_holds():
    made = []

    def make(seed):
        made.append(seed)
        return {"weight": torch.empty(2**22), "masks": [torch.empty(2**22, dtype=torch.bool)]}

    sets = protocol.input_sets(make, CPU)
    assert made == [0, 1, 2, 3]
    assert protocol.size_of(sets) >= protocol.CACHE["cpu"]
    assert len(protocol.input_sets(lambda seed: torch.empty(4), CPU)) == protocol.MOST_SETS["cpu"]
    assert len(protocol.input_sets(lambda seed: torch.empty(2**25), CPU)) == 1


def test_summary_has_the_median_and_its_percentiles():
    assert protocol.summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {
        "median": 3.5,
        "p20": 2.0,
        "p80": 5.0,
        "runs": 6,
    }
    assert protocol.summary([2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0, "runs": 1}


def test_peak_counts_what_was_freed_again():
    matrix = torch.ones(2**22)  # 16 MiB
    memory.peak(lambda: matrix + 1, "cpu")
    peak, total = memory.peak(lambda: (matrix + 1).sum(), "cpu")
    if peak is None:
        pytest.skip("the peak of the resident memory cannot be reset here")
    assert float(total) == 2**23
    assert 0.9 * matrix.nbytes < peak < 1.5 * matrix.nbytes


def test_ceilings_are_rates(monkeypatch):
    monkeypatch.setitem(ceilings.COPIED, "cpu", 2**20)
    monkeypatch.setitem(ceilings.SIZES, "cpu", (64,))
    measured = ceilings.measure("cpu")
    assert set(measured["matmul"]) == {"float32", "bfloat16", "float16"}
    assert 1e8 < measured["copy"] < 1e13
    assert all(1e6 < rate < 1e15 for rate in measured["matmul"].values())


def test_ceilings_count_what_is_read_and_written_and_two_for_a_multiply_add(monkeypatch):
    monkeypatch.setattr(ceilings, "seconds", lambda run, device: 2.0)
    monkeypatch.setitem(ceilings.SIZES, "cpu", (64,))
    assert ceilings.copy_rate(CPU, size=4096) == 4096
    assert ceilings.matmul_rate(CPU, torch.float32) == 64**3
