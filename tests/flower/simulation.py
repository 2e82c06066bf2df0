"""A run on Flower's simulation: nodes in Ray's processes, behind a SuperLink that Flower starts."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from command_line import CommandLine, Run
from ports import free_ports
from processes import Found, wait_for


def simulate(
    folder: Path,
    app: Path,
    run_config: Mapping[str, Any],
    nodes: int,
    *,
    modules: Sequence[Path] = (),
    timeout: float = 120,
) -> Run:
    """One run with `nodes` nodes, in a folder of its own.

    Flower's own SuperLink stays behind by design, for the next run; here it is ended.
    TimeoutError where anything else, such as Ray, stays behind too.
    """
    # Ray's sockets lie in its folder, and a socket's path has 107 bytes: too few for a test's.
    with free_ports(2) as (port, control), tempfile.TemporaryDirectory(prefix="ray") as scratch:
        environment = {
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": scratch,
        }
        user = CommandLine(folder, modules, environment)
        user.connect(":local-in-memory:")
        config = f"num-supernodes={nodes} client-resources-num-cpus=1"
        user.run_options = ["--federation-config", config]
        try:
            run = user.run(app, run_config, timeout)
            wait_for(lambda: all(map(_stays, user.processes())), "the end of Ray's processes", 20)
            return run
        finally:
            user.kill("flwr")


def _stays(process: Found) -> bool:
    return process.runs("flower-superlink") or process.runs("flower-superexec")
