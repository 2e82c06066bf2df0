"""Certificates, made as a user makes them, by openssl."""

import shlex
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

# What docs/deployment.md tells the SuperLink's operator to run, in the folder of the certificates.
# Whoever connects must find the name that it uses, and the SuperLink's own apps 127.0.0.1.
AUTHORITY = """openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365
 -subj "/CN=Our federation" -addext "keyUsage=critical,keyCertSign,cRLSign"
 -keyout ca.key -out ca.pem"""
SERVER = """openssl req -x509 -CA ca.pem -CAkey ca.key -newkey ec -pkeyopt ec_paramgen_curve:P-256
 -nodes -days 365 -subj "/CN=superlink" -addext "basicConstraints=critical,CA:FALSE"
 -addext "subjectAltName=DNS:localhost,IP:127.0.0.1" -keyout server.key -out server.pem"""


@dataclass(frozen=True)
class Certificates:
    """Files of a certificate authority and of a server on loopback that it vouches for (PEM)."""

    authority: Path
    server: Path
    server_key: Path


def make_certificates(folder: Path) -> Certificates:
    """An authority and its server certificate, in a new folder."""
    folder.mkdir(parents=True)
    _execute(AUTHORITY, folder)
    _execute(SERVER, folder)
    return Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")


def expired(certificates: Certificates) -> Certificates:
    """The same authority and key, with a server certificate whose time ended yesterday."""
    folder = certificates.server.parent
    folder.joinpath("names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    _execute("openssl req -new -key server.key -subj /CN=superlink -out old.csr", folder)
    _execute(
        "openssl x509 -req -in old.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days -1 "
        "-extfile names -out old.pem",
        folder,
    )
    return replace(certificates, server=folder / "old.pem")


def _execute(command: str, folder: Path) -> None:
    done = subprocess.run(shlex.split(command), cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} ended with code {done.returncode}: {done.stderr}")
