"""The clock of a run's stages, on a CPU and with a GPU's events in its place."""

import time

import pytest
import torch

from fedspa.clock import StageClock


def test_stages_are_summed():
    clock = StageClock(torch.device("cpu"))
    for seconds in (0.02, 0.03):
        with clock.stage("prune"):
            time.sleep(seconds)
    with clock.stage("embed"):
        pass
    found = clock.seconds()
    assert list(found) == ["prune", "embed"]
    assert 0.05 <= found["prune"] < 1 and 0 <= found["embed"] < 0.05


def test_a_stage_that_fails_counts_for_nothing():
    clock = StageClock(torch.device("cpu"))
    with pytest.raises(ValueError, match="mine"), clock.stage("prune"):
        raise ValueError("mine")
    assert clock.seconds() == {}


class Stream:
    """A GPU's stream whose work takes 1 ms for every event that was recorded before."""

    def __init__(self):
        self.recorded = 0
        self.waited = 0


class Event:
    """An event as torch.cuda has it; it may only be read after the GPU was waited for."""

    stream = None

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        stream.recorded += 1
        self.stream, self.at = stream, stream.recorded

    def elapsed_time(self, end):
        assert self.stream.waited == 1
        return float(end.at - self.at)


def test_a_gpus_clock_waits_once_and_reads_events(monkeypatch):
    stream = Stream()

    def synchronize(device):
        stream.waited += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    clock = StageClock(torch.device("cuda"))
    for name in ("calibrate", "prune", "calibrate"):
        with clock.stage(name):
            assert stream.waited == 0
    assert clock.seconds() == {"calibrate": 0.002, "prune": 0.001}
    assert stream.waited == 1
