"""The output folder: complete under its final name, or absent."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedspa.messages import LayerMessage
from fedspa.report import Report, write_html
from fedspa_kernels import unpack_mask

MASKS_FILE = "masks.safetensors"
REPORT_BYTES = 4_000_000


def check_output(
    path: str | Path, needed: int | None = None, source: str | Path | None = None
) -> None:
    """Raise before any work where `path` is taken, cannot be written, or the disk is too small.

    needed: bytes that will be written. source: the folder of the model, which `path` must not be.
    Raises ValueError for a folder that is not empty, RuntimeError for the disk.
    """
    path = Path(path)
    if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
        raise ValueError(
            f"output {path} is the folder of the model itself, which stays as it is; choose "
            f"another folder"
        )
    if path.is_symlink():
        raise ValueError(
            f"output {path} is a link to {path.resolve()}; name that folder itself, since a link "
            f"cannot be put in place as a whole"
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"output {path} exists and is not empty; nothing is overwritten: choose another "
            f"folder or remove it"
        )
    home = next(p for p in path.absolute().parents if p.exists())
    if not home.is_dir():
        raise ValueError(f"output {path} cannot be made: {home} is a file; choose another folder")
    if os.path.ismount(path):
        raise ValueError(
            f"output {path} is the root of a mounted disk, which cannot be put in place as a "
            f"whole; choose a folder in it, such as {path / 'pruned'}"
        )
    if not os.access(home, os.W_OK):
        raise RuntimeError(f"output {path} cannot be made: {home} is not writable")
    if needed is not None:
        _check_space(path, home, needed)


def _check_space(path: Path, home: Path, needed: int) -> None:
    free = shutil.disk_usage(home).free
    if free < needed:
        raise RuntimeError(
            f"output {path} needs about {needed / 1e6:.0f} MB, but {home} has {free / 1e6:.0f} MB "
            f"free; free some space or choose a folder on another disk"
        )


def result_bytes(model: nn.Module) -> int:
    """About how many bytes the result of a model in memory takes: weights, masks and report."""
    weights = {id(p): p.nbytes + p.numel() // 8 for p in model.parameters()}
    return sum(weights.values()) + REPORT_BYTES


@contextmanager
def complete_folder(path: str | Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path` that takes its name at the end, if nothing went wrong.

    Raises RuntimeError with a way out where the disk is full; whatever fails or kills the run,
    there is no folder under the final name.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield partial
        publish(partial)
        partial.rename(path)
    except Exception as error:
        if is_full(error):
            raise RuntimeError(
                f"no space left on the disk of {path.parent}; nothing was written to {path}: "
                f"free some space or choose a folder on another disk"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full."""
    # safetensors wraps the system's error and leaves only its text.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def publish(folder: Path) -> None:
    """Bring every file to the disk before the rename makes it count, with the usual permissions.

    mkdtemp and safetensors make what they write readable by its owner alone.
    """
    allowed = ~_umask()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & allowed)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    folder.chmod(0o777 & allowed)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_result(folder: Path, model: Any, tokenizer: Any, report: Report) -> None:
    """Write checkpoint, tokenizer, masks, report.json and report.html into a folder."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    widths = {name: str(layer.shape[1]) for name, layer in report.masks.items()}
    packed = {name: layer.bits.contiguous().cpu() for name, layer in report.masks.items()}
    save_file(packed, folder / MASKS_FILE, metadata=widths)
    write_report(folder, report)


def write_report(folder: Path, report: Report) -> None:
    """Write report.json and report.html into a folder."""
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    write_html(report, folder / "report.html")


class StoredMasks(Mapping[str, LayerMessage]):
    """The masks of an output folder, each read when it is asked for: they may be gigabytes."""

    def __init__(self, folder: str | Path) -> None:
        self._file = Path(folder) / MASKS_FILE

    def __getitem__(self, name: str) -> LayerMessage:
        """The mask of a layer by its full name."""
        with safe_open(self._file, framework="pt") as stored:
            widths = stored.metadata()
            if name not in widths:
                raise KeyError(name)
            bits = stored.get_tensor(name)
        return LayerMessage((bits.shape[0], int(widths[name])), bits, None)

    def __iter__(self) -> Iterator[str]:
        with safe_open(self._file, framework="pt") as stored:
            return iter(list(stored.keys()))

    def __len__(self) -> int:
        return len(list(iter(self)))


def load_masks(folder: str | Path) -> dict[str, Tensor]:
    """The masks of an output folder: for every pruned layer (outputs, inputs) bool, True = kept.

    Raises ValueError where the folder holds no masks.
    """
    file = Path(folder) / MASKS_FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {MASKS_FILE}; name a folder that fedspa wrote")
    with safe_open(file, framework="pt") as stored:
        widths = stored.metadata()
        return {
            name: unpack_mask(stored.get_tensor(name), int(widths[name]))
            for name in stored.keys()  # noqa: SIM118  (a safe_open is not a dict)
        }


def free_name(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist yet."""
    names = chain([path.name], (f"{path.name}-{number}" for number in count(2)))
    return next(free for name in names if not (free := path.with_name(name)).exists())
