"""Looks at what `flwr run` will be given, and prints the folder of the Flower app.

    app=$(python -m fedspa.flower run.toml) && flwr run "$app" --stream --run-config run.toml

Flower itself names neither an unknown key of the run-config nor a certificate that is not good.
"""

from __future__ import annotations

import click

from fedspa.flower.beforehand import APP, check_connection, check_run_config


@click.command()
@click.argument("run_config", nargs=-1)
@click.option("--superlink", metavar="NAME", help="Also try this connection of Flower's config.")
def main(run_config: tuple[str, ...], superlink: str | None) -> None:
    """Check RUN_CONFIG, a TOML file or what --run-config takes; print the app's folder."""
    try:
        if run_config:
            check_run_config(run_config)
        if superlink is not None:
            check_connection(superlink)
    except (ValueError, RuntimeError) as error:
        click.echo(f"fedspa: {error}", err=True)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
    click.echo(APP)


if __name__ == "__main__":
    main(prog_name="python -m fedspa.flower")
