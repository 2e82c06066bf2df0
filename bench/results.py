"""The file that a bench leaves: one JSON with results, machine, versions and commit."""

import functools
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

FORMAT, VERSION = "fedspa-bench", 1
KINDS = ("operators", "model", "growth", "network")
ROOT = Path(__file__).parents[1]


def new(
    kind: str, device: str, results: list[dict[str, Any]], ceilings: dict[str, Any]
) -> dict[str, Any]:
    """Return what a result file holds.

    kind:     "operators", "model", "growth" or "network"
    device:   "cpu" or "cuda"
    results:  one entry each, as the kind has them
    ceilings: what `bench.ceilings.measure` returned in this run
    """
    # Imported here, since `fedspa` takes seconds, and reading a file does not need it.
    from fedspa.machine import machine, versions

    if kind not in KINDS:
        raise ValueError(f"kind of results {kind!r} is not known; choose from {', '.join(KINDS)}")
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command(),
        "device": device,
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "ceilings": ceilings,
        "results": results,
    }


def write(path: Path | str, content: dict[str, Any]) -> None:
    """Write a result file as a whole: a run that is ended leaves the last complete one.

    Every result is a line, so that two files differ in the lines that differ.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    head = {key: value for key, value in content.items() if key != "results"}
    lines = ",\n  ".join(json.dumps(result, allow_nan=False) for result in content["results"])
    text = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
    half.write_text(f'{text},\n "results": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    os.replace(half, path)


def read(path: Path | str) -> dict[str, Any]:
    """Read a result file.

    raises: ValueError where it is not there, cut off, or of another format or version
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; name a file that a bench wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no complete JSON ({error}); run the bench that wrote it again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a {FORMAT} file; name one that a bench wrote")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r} of the format, and this is version "
            f"{VERSION}; measure again, or read it with the version of FedSpa that wrote it"
        )
    if content.get("kind") not in KINDS or not isinstance(content.get("results"), list):
        raise ValueError(
            f"{path} has kind {content.get('kind')!r} and results that cannot be read; "
            f"the kinds are {', '.join(KINDS)}"
        )
    return content


@functools.cache
def commit() -> str:
    """Return the commit of this tree, with "-dirty" where it was changed, or "unknown"."""
    head = _git("rev-parse", "HEAD")
    if not head:
        return "unknown"
    return head + "-dirty" * bool(_git("status", "--porcelain", "--untracked-files=no"))


def command() -> list[str]:
    """Return the command as typed, with the folders of this machine left out."""
    first = Path(sys.argv[0])
    module = first.parent.name if first.name == "__main__.py" else first.name
    return [module, *(argument.replace(f"{ROOT}/", "") for argument in sys.argv[1:])]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except FileNotFoundError:  # a machine without git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
