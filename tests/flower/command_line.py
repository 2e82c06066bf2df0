"""The `flwr` command line: runs are started, awaited and asked after, as a user does it."""

import json
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parties import Parties, read
from processes import tail, wait_for


@dataclass(frozen=True)
class Launched:
    """A run that was started: its id, the process that streams its log, and that log's file."""

    id: str
    stream: subprocess.Popen[bytes]
    log: Path


@dataclass(frozen=True)
class Run:
    """A run that ended: "finished:completed", "...:failed" or "...:stopped", why, and its log."""

    id: str
    status: str
    details: str
    log: str


class CommandLine(Parties):
    """The party "flwr", with one connection in its config.toml.

    connection:   that connection's name
    run_options:  of every `flwr run`, besides --stream and --run-config
    """

    connection = "loopback"
    run_options: Sequence[str] = ()
    commands = 0

    def connect(self, address: str, *entries: str) -> None:
        """Write the connection into config.toml: its address, and lines of TOML."""
        lines = [
            "[superlink]",
            f'default = "{self.connection}"',
            "",
            f"[superlink.{self.connection}]",
        ]
        lines += [f'address = "{address}"', *entries]
        self.home("flwr").mkdir(parents=True, exist_ok=True)
        self.home("flwr").joinpath("config.toml").write_text("\n".join(lines) + "\n")

    def flwr(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself, such as ("ls", "loopback"); stdout has stderr in it."""
        self.commands += 1
        log = self.folder / "flwr" / f"command-{self.commands}.log"
        process = self.start("flwr", ["flwr", *arguments], log)
        return subprocess.CompletedProcess(process.args, process.wait(timeout), read(log))

    def launch(self, app: Path, run_config: Mapping[str, Any], timeout: float = 60) -> Launched:
        """Start a run and wait until it has an id; RuntimeError where it is refused."""
        self.commands += 1
        log = self.folder / "flwr" / f"run-{self.commands}.log"
        command = ["flwr", "run", str(app), self.connection, "--stream", *self.run_options]
        stream = self.start("flwr", [*command, "--run-config", as_config(run_config)], log)
        found: list[str] = []

        def has_id() -> bool:
            ended = stream.poll() is not None  # asked first: then the log is whole
            found[:] = re.findall(r"Successfully started run (\d+)", read(log))
            if ended and not found:
                raise RuntimeError(f"flwr run ended with code {stream.poll()}:\n{read(log)}")
            return bool(found)

        wait_for(has_id, f"the start of a run of {app}", timeout)
        return Launched(found[0], stream, log)

    def finish(self, launched: Launched, timeout: float = 120) -> Run:
        """Wait for a run's end; TimeoutError, with the end of every log, where it does not come."""
        end = time.monotonic() + timeout
        try:
            launched.stream.wait(timeout)
            while not (entry := self.listed(launched.id))["status"].startswith("finished"):
                if time.monotonic() > end:
                    raise TimeoutError(f"run {launched.id} is {entry['status']}")
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            logs = "\n\n".join(tail(log) for log in sorted(self.folder.glob("*/*.log")))
            raise TimeoutError(f"no end of run {launched.id} in {timeout} s\n{logs}") from error
        return Run(launched.id, entry["status"], entry["status-details"], read(launched.log))

    def listed(self, run: str) -> dict[str, Any]:
        """What `flwr ls` says of a run: status, status-details, network-traffic, ..."""
        found = self.flwr("ls", self.connection, "--run-id", run, "--format", "json").stdout
        try:
            return json.loads(found)["runs"][0]
        except (ValueError, KeyError) as error:
            raise RuntimeError(f"flwr ls said of run {run}: {found}") from error

    def run(self, app: Path, run_config: Mapping[str, Any], timeout: float = 120) -> Run:
        """`flwr run --stream`, to the run's end."""
        return self.finish(self.launch(app, run_config), timeout)


def as_config(entries: Mapping[str, Any]) -> str:
    """--run-config and --node-config: TOML's literals, separated by spaces.

    raises: ValueError for a double quote in a string, which Flower's reader takes for its end
    """
    for name, value in entries.items():
        if isinstance(value, str) and set(value) & set('"\\\n'):
            raise ValueError(f"Flower's command line cannot take {name}={value!r}")
    return " ".join(
        f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in entries.items()
    )
