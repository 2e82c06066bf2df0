"""A Flower deployment on loopback: a SuperLink, SuperNodes, and a command line, each at home.

    with Deployment(tmp_path, nodes=[{"partition-id": 0}, {"partition-id": 1}]) as deployment:
        run = deployment.run(app, {"sparsity": 0.5}, timeout=60)
        assert run.status == "finished:completed", run.details

Parties are named "superlink", "node-0", "node-1", ... and "flwr" (the command line).
"""

import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from command_line import CommandLine, as_config
from ports import free_ports
from processes import tail, wait_for

MOST_NODES = 16


class Deployment(CommandLine):
    """Processes that run until the context ends; AssertionError where one outlives that.

    folder:        of this deployment alone
    nodes:         the --node-config of each SuperNode to start with
    database:      the SuperLink keeps its state in a file, and has it again after a restart
    modules, environment:  see Parties
    """

    def __init__(
        self,
        folder: Path,
        nodes: Sequence[Mapping[str, Any]] = (),
        *,
        database: bool = False,
        modules: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
    ):
        super().__init__(folder, modules, environment)
        self.nodes = nodes
        self.database = database
        self.claims = ExitStack()

    def __enter__(self) -> Self:
        self.port, *self.node_ports = self.claims.enter_context(free_ports(1 + MOST_NODES))
        try:
            self.connect(f"127.0.0.1:{self.port}", "insecure = true")
            self.start_superlink()
            for index, config in enumerate(self.nodes):
                self.start_node(index, config)
        except BaseException:
            self.end()
            self.claims.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        left = self.end()
        self.claims.close()
        if left and error is None:
            lines = "\n".join(f"{one.party}: {one.pid} {' '.join(one.command)}" for one in left)
            raise AssertionError(f"{len(left)} processes outlived their deployment:\n{lines}")

    def start_superlink(self) -> None:
        """Start it, or start it again, and wait until it answers."""
        command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--insecure", "--disable-runtime-dependency-installation"]
        if self.database:
            command += ["--database", str(self.folder / "superlink" / "state.db")]
        before = self.text("superlink").count("Uvicorn running")
        process = self.start("superlink", command)

        def answers() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"the SuperLink ended\n{tail(self.log('superlink'))}")
            return self.text("superlink").count("Uvicorn running") > before

        wait_for(answers, f"a SuperLink on port {self.port}", 60)

    def start_node(
        self, index: int, config: Mapping[str, Any], *, port: int | None = None
    ) -> subprocess.Popen[bytes]:
        """Start the SuperNode "node-{index}", or start it again; does not wait for it.

        port: where it looks for the SuperLink, in place of the SuperLink's: a proxy's
        """
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{port or self.port}"]
        command += ["--host", "127.0.0.1", "--port", str(self.node_ports[index])]
        command += ["--node-config", as_config(config), "--insecure"]
        return self.start(f"node-{index}", command)
