"""What was agreed on, block by block, on the disk: whole files under names that say the round."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedspa.messages import LayerMessage

MASKS, WEIGHTS = "masks", "weights"


def write(
    folder: Path,
    index: int,
    round_index: int,
    masks: Mapping[str, LayerMessage],
    weights: Mapping[str, Tensor],
) -> None:
    """Write a block's masks, and its weights (outputs, inputs) where later rounds read them.

    Both by the layers' full names.
    """
    widths = {name: str(layer.shape[1]) for name, layer in masks.items()}
    bits = {name: layer.bits.contiguous().cpu() for name, layer in masks.items()}
    _save(bits, path(folder, index, round_index, MASKS), widths)
    if weights:
        held = {name: weight.contiguous().cpu() for name, weight in weights.items()}
        _save(held, path(folder, index, round_index, WEIGHTS), {})


def read_masks(folder: Path, index: int, round_index: int) -> dict[str, LayerMessage]:
    """A block's masks, without their values."""
    with safe_open(path(folder, index, round_index, MASKS), framework="pt") as file:
        widths = file.metadata()
        bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {
        name: LayerMessage((packed.shape[0], int(widths[name])), packed, None)
        for name, packed in bits.items()
    }


def read_weights(folder: Path, index: int, round_index: int) -> dict[str, Tensor]:
    """A block's weights (outputs, inputs), by layer."""
    with safe_open(path(folder, index, round_index, WEIGHTS), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def forget(folder: Path, versions: Mapping[int, int]) -> None:
    """Remove what a later round has replaced, and what a round that was killed had begun."""
    wanted = {
        path(folder, index, version, kind)
        for index, version in versions.items()
        for kind in (MASKS, WEIGHTS)
    }
    for file in _files(folder):
        if file not in wanted:
            file.unlink()


def path(folder: Path, index: int, round_index: int, kind: str) -> Path:
    """Where a block's masks or weights of a round are."""
    return folder / f"block-{index:05}.round-{round_index}.{kind}.safetensors"


def _files(folder: Path) -> Iterator[Path]:
    return folder.glob("block-*.safetensors*")


def _save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a file that is whole under its name or absent, whatever kills the process."""
    partial = file.with_name(f"{file.name}.partial")
    save_file(tensors, partial, metadata=metadata)
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    partial.rename(file)
