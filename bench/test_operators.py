"""Every operator at every chosen size, under pytest-benchmark; `make bench` runs this file.

pytest-benchmark times ours. The setup of each of its rounds, which it does not time, runs and times
the others, so that all are interleaved in one process.
"""

import gc

import torch

from bench import protocol
from bench.operators.measure import OURS, prepare, record
from bench.operators.plan import Job

CPU = torch.device("cpu")
# Calls of a sample go up until they move about so many bytes, so that a clock's grain is nothing.
# It follows from the sizes, not from a time, and so is the same in the runs that are compared.
SAMPLE_BYTES, MOST_CALLS = 2**20, 200


def calls_per_sample(job: Job) -> int:
    """Return how many calls of ours make one of pytest-benchmark's rounds."""
    least = job.case.least_bytes(job.sizes, job.dtype.itemsize)
    work = least + job.case.operations(job.sizes) / 8
    return max(1, min(MOST_CALLS, int(SAMPLE_BYTES / work)))


def test_operator(job, benchmark, rates, keep, request):
    budget = request.config.getoption("--budget")
    entrants = prepare(job.case, job.sizes, job.dtype, CPU)
    runs = protocol.plan(entrants.estimates, budget)
    calls, rounds = calls_per_sample(job), []

    def others():
        """Time every other contender, and hand over the inputs of ours."""
        number = len(rounds)
        rounds.append({})
        names = [name for name in runs if name != OURS]
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            if protocol.takes_part(number, runs[name], runs[OURS]):
                taken, run = entrants.estimates[name], entrants.runs[name]
                rounds[-1][name] = protocol.sample(run, entrants.sets, number, taken, CPU)()
        taken = entrants.estimates[OURS]
        protocol.settle(entrants.runs[OURS], entrants.sets, number, taken, CPU)
        return (number,), {}

    def ours(number):
        for call in range(calls):
            entrants.runs[OURS](entrants.sets[(number + call) % len(entrants.sets)])

    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(ours, setup=others, rounds=runs[OURS])
    finally:
        gc.enable()
    if benchmark.disabled:
        return
    # A setup goes with one iteration alone, so that the calls of a sample are divided here.
    samples = benchmark.stats.stats.data
    samples[:] = [taken / calls for taken in samples]
    benchmark.stats.iterations = calls
    for row, taken in zip(rounds, samples, strict=True):
        row[OURS] = taken
    result = record(job.case, job.shape, job.sizes, job.dtype, entrants, rounds, rates)
    benchmark.extra_info.update(result)
    keep(result)
