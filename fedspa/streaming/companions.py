"""What lies beside the weights in a checkpoint's folder, and goes into the output as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fedspa.streaming.checkpoint import Checkpoint
from fedspa.streaming.disk import write_whole

CONFIG = "config.json"
WEIGHTS = tuple(
    ".safetensors .bin .pt .pth .h5 .msgpack .gguf .onnx .onnx_data .ckpt .npz .ot .partial "
    ".index.json".split()
)


def copy_rest(checkpoint: Checkpoint, folder: str | Path, dtype: torch.dtype | None) -> None:
    """Copy configuration, tokenizer, licence, model card and code of a checkpoint to a folder.

    That is every file of the top folder which holds no weights and is not hidden.

    dtype: what the configuration will say of the weights; None leaves it as it is

    Raises ValueError where the configuration is no JSON object, OSError where the disk refuses.
    """
    folder = Path(folder)
    for file in sorted(checkpoint.folder.iterdir()):
        hidden = file.name.startswith(".")
        if hidden or not file.is_file() or file.name.lower().endswith(WEIGHTS):
            continue
        if file.name == CONFIG and dtype is not None:
            write_whole(folder / CONFIG, _config_in(file, str(dtype).removeprefix("torch.")))
        else:
            shutil.copyfile(file, folder / file.name)


def _config_in(file: Path, dtype: str) -> bytes:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); copy it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is no JSON object; copy it again")
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype
    changed = json.dumps(_with_dtype(config, dtype), indent=2, ensure_ascii=False)
    return changed.encode() + b"\n"


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration and those inside it, such as text_config, with their dtypes replaced."""
    changed = {}
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            value = _with_dtype(value, dtype)
        elif key in ("dtype", "torch_dtype"):
            value = dtype
        changed[key] = value
    return changed
