"""What can be found wrong before a run is begun, on the machine that begins it."""

from __future__ import annotations

import socket
import ssl
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fedspa.flower.node_config import flower_home
from fedspa.flower.run_config import WHERE, read_run_config

APP = Path(__file__).resolve().parent / "app"
# Seconds that a SuperLink has to answer.
PATIENCE = 10.0


def check_run_config(given: Sequence[str]) -> None:
    """Raise ValueError unless a run-config, as `flwr run` takes it, is complete and possible."""
    read_run_config(_defaults() | _overrides(given))


def check_connection(name: str) -> None:
    """Raise unless the SuperLink of a connection answers, with a certificate that is trusted.

    Raises ValueError where Flower's config.toml has no such connection, and RuntimeError where
    nobody answers there, or not the right one.
    """
    path = flower_home() / "config.toml"
    connections = _read(path).get("superlink", {}) if path.is_file() else {}
    known = sorted(key for key, value in connections.items() if isinstance(value, dict))
    if name not in known:
        raise ValueError(f"{path} has no connection {name!r} but {known}; add [superlink.{name}]")
    connection = connections[name]
    address = str(connection.get("address", ""))
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{path}: the address {address!r} of {name!r} is not HOST:PORT")
    host = host.strip("[]")
    try:
        with socket.create_connection((host, int(port)), PATIENCE) as plain:
            if not connection.get("insecure", False):
                _trust(path, connection).wrap_socket(plain, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        raise RuntimeError(
            f"the certificate of the SuperLink at {address} is not good ({error.verify_message}); "
            f"renew it there, or give its authority as root-certificates in {path}"
        ) from error
    except ssl.SSLError as error:
        raise RuntimeError(
            f"the SuperLink at {address} does not speak TLS ({error.reason}); start it with its "
            f"certificate, or set insecure = true in {path} for a network of your own"
        ) from error
    except OSError as error:
        raise RuntimeError(
            f"the SuperLink at {address} cannot be reached ({error.strerror or error}); start it, "
            f"open its port, or correct the address in {path}"
        ) from error


def _trust(path: Path, connection: dict[str, Any]) -> ssl.SSLContext:
    authority = connection.get("root-certificates")
    if authority is None:
        return ssl.create_default_context()
    file = path.parent / Path(str(authority)).expanduser()
    try:
        return ssl.create_default_context(cafile=str(file))
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"{path}: root-certificates {file} cannot be read ({error})") from error


def _defaults() -> dict[str, Any]:
    config: dict[str, Any] = _read(APP / "pyproject.toml")["tool"]["flwr"]["app"]["config"]
    return config


def _overrides(given: Sequence[str]) -> dict[str, Any]:
    if len(given) == 1 and given[0].endswith(".toml"):
        return _read(Path(given[0]).expanduser())
    # Imported here: fedspa.flower's settings can be read where Flower is not installed.
    from flwr.common.config import parse_config_args

    try:
        return dict(parse_config_args(list(given)))
    except (ValueError, click.ClickException) as error:
        raise ValueError(f"{WHERE}: {' '.join(given)!r} cannot be read: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
