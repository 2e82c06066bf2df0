"""Processes that run jobs, one at a time each; one that dies is recorded and replaced."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from fedspa.experiments.cases import Case
from fedspa.experiments.experiment_file import Experiment
from fedspa.experiments.jobs import Job, deal_jobs, failure, run_job
from fedspa.experiments.store import RESULTS_FILE, Record, appending, read_records, succeeded
from fedspa.experiments.workbench import Workbench
from fedspa.machine import keep_freed_memory, return_freed_memory

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Bars of packages that workers call would be drawn over each other.
QUIET = {"TQDM_DISABLE": "1"}
# Seconds that an ended worker has to go before it is killed.
PATIENCE = 5.0


def run_experiment(
    experiment: Experiment,
    out: str | Path,
    *,
    workers: int = 1,
    device: str = "cpu",
    done: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Run what an experiment's folder holds no result of yet, and append each as it comes.

    out: the folder; results are lines of JSON in it, and a run that ended early goes on there.
    workers: processes, which share the cores; 1: this one.
    device: where models are.
    done: is given every new record.
    returns: the last record of every case, in the file's order, failures among them.
    raises: ValueError where the results cannot be read, RuntimeError where another run writes
        them; a case that fails raises nothing.
    """
    if workers < 1:
        raise ValueError(f"experiment: workers is {workers}; at least 1 process has to work")
    path = Path(out) / RESULTS_FILE
    with appending(path) as append:
        missing = pending(experiment.cases, read_records(path))
        for record in run_jobs(deal_jobs(missing), workers, device):
            append(record)
            if done is not None:
                done(record)
    records = read_records(path)
    return [records[case.key] for case in experiment.cases]


def pending(cases: Sequence[Case], records: Mapping[str, Record]) -> list[Case]:
    """The cases that have no result: those never run, and those that failed."""
    return [c for c in cases if c.key not in records or not succeeded(records[c.key])]


def run_jobs(jobs: Sequence[Job], workers: int, device: str = "cpu") -> Iterator[Record]:
    """A record for every case of every job, in the order in which they are done."""
    if not jobs:
        return
    if workers == 1:
        bench = Workbench(device)
        for job in jobs:
            yield from run_job(bench, job)
            return_freed_memory()
        return
    queue = deque(jobs)
    count = min(workers, len(jobs))
    crew = [_Worker(_threads(workers), device) for _ in range(count)]
    try:
        for worker in crew:
            worker.begin(queue.popleft())
        while any(worker.job for worker in crew):
            busy = {worker.link: worker for worker in crew if worker.job}
            for link in connection.wait(list(busy)):
                worker = busy[link]  # type: ignore[index]
                message = worker.receive()
                if isinstance(message, dict):
                    worker.recorded.add(message["key"])
                    yield message
                    continue
                yield from worker.unrecorded(message)
                if message is not None:
                    crew[crew.index(worker)] = worker = worker.replaced()
                worker.job = None
                if queue:
                    worker.begin(queue.popleft())
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    """A process with the link to it, and the job that it is at."""

    def __init__(self, threads: int, device: str) -> None:
        self._arguments = (threads, device)
        context = get_context("spawn")
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, threads, device), daemon=True)
        with _environment({**dict.fromkeys(THREAD_VARIABLES, str(threads)), **QUIET}):
            self.process.start()
        # The last copy but the worker's own: the link then ends when the worker does.
        theirs.close()
        self.job: Job | None = None
        self.recorded: set[str] = set()

    def begin(self, job: Job) -> None:
        """Give it a job."""
        self.job = job
        self.recorded = set()
        # A worker that is already dead is noticed when it is heard.
        with suppress(OSError):
            self.link.send(job)

    def receive(self) -> Record | str | None:
        """A record; None where its job is done; a sentence where it died."""
        try:
            message: Record | None = self.link.recv()
            return message
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return (
                f"the worker process {how} during this job (killed, or out of memory?); run the "
                f"same command again, with fewer --workers where memory is short"
            )

    def unrecorded(self, why: str | None) -> Iterator[Record]:
        """A failure for each case of its job of which no record came."""
        assert self.job is not None
        for case in self.job.cases:
            if case.key not in self.recorded:
                yield failure(case, why or "the worker process left this case out")

    def replaced(self) -> _Worker:
        """A new one in its place."""
        self.end()
        return _Worker(*self._arguments)

    def end(self) -> None:
        """End the process: by its own will where it waits for a job, else whatever it is doing."""
        self.link.close()
        if self.job is None:
            self.process.join(PATIENCE)
        self.process.terminate()
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


def _work(link: Connection, threads: int, device: str) -> None:
    """A worker's life: a job comes in, its records go out, then None."""
    # Of Ctrl-C, which every process of a terminal gets, the parent takes care.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    torch.set_num_threads(threads)
    _silence()
    bench = Workbench(device)
    with suppress(EOFError, OSError):  # The parent is gone.
        while True:
            job: Job = link.recv()
            for record in run_job(bench, job):
                link.send(record)
            return_freed_memory()
            link.send(None)


def _end_with_parent() -> None:
    """End this process when its parent does, which may be killed without a word."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _silence() -> None:
    """Keep the bars of transformers off a terminal that the parent writes to."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _threads(workers: int) -> int:
    """Cores of each worker."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)) // workers)
    return max(1, (os.cpu_count() or 1) // workers)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """What a process that is started meanwhile finds before it imports anything."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
