"""docs/deployment.md as what its readers do: each block is run by those it is for, in order."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from parties import PROGRAMS, Parties, read

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
BLOCK = re.compile(r"(?:<!-- (.*?) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
# Seconds that a command may take: others may work on the same cores.
PATIENCE = 300
# What begins a terminal on a machine where nothing of Flower was set.
UNSET = "FLWR_HOME FLWR_TELEMETRY_ENABLED FLWR_DISABLE_UPDATE_CHECK".split()


@dataclass(frozen=True)
class Block:
    """A fenced block. reader: what the comment above it says, such as "server: stays"."""

    reader: str
    language: str
    text: str


def read_page(page: Path = PAGE) -> list[Block]:
    """The blocks of a page, in order."""
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


class Readers(Parties):
    """People at machines of their own: each has a home folder, with what it made of the page.

    changes: what of the page must be another on this machine, for everybody: old text -> new
    """

    def __init__(self, folder: Path, changes: Mapping[str, str], environment: Mapping[str, str]):
        super().__init__(folder, environment=environment)
        self.changes = changes
        self.scripts = 0

    def arrive(self, party: str) -> Path:
        """Give somebody a home, where the packages are installed already; their folder in it."""
        programs = self.folder / party / "fedspa-env" / "bin"
        programs.mkdir(parents=True)
        programs.joinpath("activate").write_text(f'export PATH="{PROGRAMS}:$PATH"\n')
        return self.folder / party / "federation"

    def write(self, party: str, block: Block, changes: Mapping[str, str] | None = None) -> str:
        """Write the file that a TOML block names in its first line; its content."""
        text = self._changed(block, changes)
        name = re.match(r"# ~/(\S+)\n", text)
        assert block.language == "toml" and name is not None, block
        (self.folder / party / name[1]).write_text(text)
        return text

    def go(self, party: str, block: Block, changes: Mapping[str, str] | None = None) -> str:
        """Type a block into a new terminal, and wait until it is done; what it printed."""
        log = self.folder / party / f"terminal-{self.scripts}.log"
        process = self._terminal(party, block, changes, log)
        code = process.wait(PATIENCE)
        assert code == 0, f"{party}: {block.text}ended with code {code}:\n{read(log)}"
        return read(log)

    def stay(
        self, party: str, block: Block, changes: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Type a block that does not end by itself; it goes on in its terminal."""
        return self._terminal(party, block, changes, self.log(party))

    def _terminal(
        self, party: str, block: Block, changes: Mapping[str, str] | None, log: Path
    ) -> subprocess.Popen[bytes]:
        assert block.language == "bash", block
        home = self.folder / party
        script = home / f"terminal-{self.scripts}.sh"
        self.scripts += 1
        # As the page says of every new terminal; before it says so there is no such file.
        begin = ". ~/federation/begin\n" if (home / "federation" / "begin").exists() else "cd ~\n"
        script.write_text(begin + self._changed(block, changes))
        words = ["env", *(f"--unset={name}" for name in UNSET), f"HOME={home}"]
        return self.start(party, [*words, "bash", "-eu", str(script)], log)

    def _changed(self, block: Block, changes: Mapping[str, str] | None) -> str:
        text = block.text
        for old, new in {**(changes or {}), **self.changes}.items():
            text = text.replace(old, new)
        return text
