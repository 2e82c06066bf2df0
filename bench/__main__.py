"""`python -m bench`: measure, compare and report. `make bench` is the CPU's, with pytest.

Exit codes: 0 done; 2 the input cannot be used, or there is no GPU; 1 the machine could not do it;
130 interrupted.
"""

import importlib
from typing import Any

import click

# Where each command lives; a module is imported when its command runs.
COMMANDS = {
    "operators": "bench.operators.run",
    "gpu": "bench.gpu",
    "model": "bench.model",
    "growth": "bench.growth",
    "network": "bench.network.cli",
    "report": "bench.report",
    "compare": "bench.compare",
}


class Commands(click.Group):
    """Imports a command when it is needed, and turns errors into a sentence and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the module of a command."""
        if name not in COMMANDS:
            return None
        return importlib.import_module(COMMANDS[name]).command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (ValueError, RuntimeError, OSError) as error:
            # click's own exits are RuntimeErrors.
            if isinstance(error, click.exceptions.Exit | click.Abort):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2 if isinstance(error, ValueError) else 1)
        except KeyboardInterrupt:
            click.echo("interrupted; what was measured before is in the file", err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"show_default": True})
def main() -> None:
    """Measure FedSpa's kernels and pipelines, and report what was measured."""


if __name__ == "__main__":
    main(prog_name="python -m bench")
