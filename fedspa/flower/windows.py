"""A client's windows on its own disk, and the word by which the server knows it again."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedspa.streaming.disk import write_whole

WORD, WINDOWS = "word", "windows"


class Stranger(ValueError):
    """This client does not have the windows with which it joined a run."""


def write(work: Path, tokens: Tensor, digest: str, model: str) -> None:
    """Keep windows, and the digest of the model that they were cut for, under their own digest.

    tokens: (samples, length) int64. Several runs may have windows of their own.
    """
    content = save({"tokens": tokens.contiguous()}, metadata={"model": model})
    # Of a name of its own: a process that was given up may still be writing the same.
    partial = _path(work, digest).with_suffix(f".{os.getpid()}")
    write_whole(partial, content)
    partial.rename(_path(work, digest))


def read(work: Path, digest: str) -> tuple[Tensor, str]:
    """Windows, and the digest of their model; raises Stranger where they are gone or damaged."""
    path = _path(work, digest)
    try:
        with safe_open(path, framework="pt") as file:
            found = file.get_tensor("tokens"), file.metadata()["model"]
    except (FileNotFoundError, SafetensorError) as error:
        raise Stranger(
            f"{path} cannot be read, which held this client's windows ({error}); it has to join "
            f"again"
        ) from None
    # Old ones are removed, and these are in use.
    path.touch()
    return found


def remove(work: Path, digest: str) -> None:
    """Remove the windows of a run that is over."""
    _path(work, digest).unlink(missing_ok=True)


def secret_word(work: Path) -> str:
    """64 hex digits that this client alone knows, and tells the server; made once."""
    path = work / WORD
    if not path.is_file():
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.touch(mode=0o600)
        partial.write_text(secrets.token_hex(32))
        partial.rename(path)
    return path.read_text()


def _path(work: Path, digest: str) -> Path:
    return work / f"{WINDOWS}-{digest[:16]}.safetensors"
