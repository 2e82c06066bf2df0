"""`make bench`: options that choose what is measured, the lines, the table and the result file."""

from pathlib import Path
from typing import Any

import pytest

from bench import ceilings, results
from bench.operators.plan import Job, jobs
from bench.operators.table import line, show

JOBS = pytest.StashKey[list[Job]]()
RESULTS = pytest.StashKey[list[dict[str, Any]]]()
CEILINGS = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("fedspa's benches")
    add = group.addoption
    add("--operator", action="append", default=[], help="measure this operator; repeatable")
    add("--shape", action="append", default=[], help='a name, a size, or "all"; repeatable')
    add("--dtype", action="append", default=[], help="float32, bfloat16 or float16; repeatable")
    add("--clients", action="append", default=[], type=int, help="how many; repeatable")
    add("--budget", default=1.0, type=float, help="seconds to measure a case, about (default 1)")
    add(
        "--results",
        default=Path("build/bench/cpu.json"),
        type=Path,
        help="where the results go (default build/bench/cpu.json)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose what is measured, and start without any results."""
    asked = config.getoption
    if asked("--budget") <= 0 or min(asked("--clients"), default=1) < 1:
        raise pytest.UsageError("--budget takes seconds above 0, --clients a number of at least 1")
    choice = {f"{name}s": asked(f"--{name}") for name in ("operator", "shape", "dtype")}
    try:
        config.stash[JOBS] = jobs("cpu", **choice, clients=asked("--clients"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[RESULTS] = []
    # Its table would repeat ours, which has the rates and the ratios; a comparison is its own.
    if not asked("--benchmark-compare"):
        config.option.benchmark_quiet = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case at each of its sizes."""
    if "job" in metafunc.fixturenames:
        todo = metafunc.config.stash[JOBS]
        metafunc.parametrize("job", todo, ids=[job.name for job in todo])


def pytest_sessionstart(session: pytest.Session) -> None:
    """Leave the file's name away, which pytest would print before every line."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        terminal.showfspath = False


@pytest.fixture(scope="session")
def rates(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The ceilings, measured once in a run."""
    request.config.stash[CEILINGS] = ceilings.measure("cpu")
    return request.config.stash[CEILINGS]


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Any:
    """Take a result into the file and the table, and print its line."""

    def keep(result: dict[str, Any]) -> None:
        found = request.config.stash[RESULTS]
        found.append(result)
        plugins = request.config.pluginmanager
        terminal: Any = plugins.get_plugin("terminalreporter")
        capture: Any = plugins.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled():
            terminal.write_line(
                f"[{len(found)}/{request.session.testscollected}] "
                f"{request.node.callspec.id}: {line(result)}"
            )

    return keep


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Print no dot where a line is printed."""
    return ("passed", "", "") if report.when == "call" and report.passed else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was measured, also where the run was interrupted."""
    found = session.config.stash[RESULTS]
    if found:
        path = session.config.getoption("--results")
        results.write(path, results.new("operators", "cpu", found, session.config.stash[CEILINGS]))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table."""
    found = config.stash[RESULTS]
    if found:
        measured: dict[str, Any] = config.stash[CEILINGS]
        show(found, measured)
        terminalreporter.write_line(f"{len(found)} results in {config.getoption('--results')}")
