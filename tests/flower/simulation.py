"""A run on Flower's simulation: nodes in Ray's processes, behind a SuperLink that Flower starts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from command_line import CommandLine, Run
from ports import free_ports


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
    """
    with free_ports(2) as (port, control):
        environment = {
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        user = CommandLine(folder, modules, environment)
        user.connect(":local-in-memory:")
        config = f"num-supernodes={nodes} client-resources-num-cpus=1"
        user.run_options = ["--federation-config", config]
        try:
            return user.run(app, run_config, timeout)
        finally:
            user.kill("flwr")
