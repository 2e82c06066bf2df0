"""A checkpoint's architecture without its weights, and where those lie in its shards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedspa.streaming.checkpoint import Checkpoint, find_checkpoint, open_checkpoint


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be streamed.

    model: its architecture, every parameter on the meta device and every buffer real.
    places: for every parameter, and every buffer that is stored, its name in the checkpoint.
    dtype: of the weights in a run, and of those that it writes.
    tokenizer: None where the folder holds none. name: what the user calls it.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    checkpoint: Checkpoint
    places: dict[str, str]
    dtype: torch.dtype

    @property
    def written(self) -> dict[str, torch.dtype]:
        """The dtype of every tensor in the output, by its name in the checkpoint."""
        floating = {stored for stored in self.places.values() if self._is_floating(stored)}
        return {
            name: self.dtype if name in floating else tensor.dtype
            for name, tensor in self.checkpoint.tensors.items()
        }

    def _is_floating(self, name: str) -> bool:
        return self.checkpoint.tensors[name].dtype.is_floating_point


def open_source(folder: Path, dtype: str, tokenizer: Any, name: str) -> Source | str:
    """A checkpoint folder as a source, or the reason why it must be loaded as a whole.

    dtype: a name in `model.DTYPES`; "auto" keeps the checkpoint's own.
    raises: ValueError where the checkpoint is damaged or its shapes are not the model's.
    """
    if not find_checkpoint(folder):
        return f"{folder} holds no safetensors"
    checkpoint = open_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    wanted = _own_dtype(config, checkpoint) if dtype == "auto" else getattr(torch, dtype)
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=wanted).eval()
    model.config._name_or_path = name
    # transformers keeps some modules of some models in float32 whatever is asked for.
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or (
        wanted == torch.float16 and getattr(model, "_keep_in_fp32_modules", None)
    )
    if kept and wanted != torch.float32:
        return f"{type(model).__name__} keeps {', '.join(sorted(kept))} in float32"
    places = _places(model, checkpoint)
    missing = [name for name, _ in model.named_parameters() if name not in places]
    if missing:
        _check_complete(folder, missing, places)
        return (
            f"{folder} has no tensor named like {missing[0]}; {len(missing)} of the model's "
            f"weights are missing there or have other names"
        )
    _check_shapes(model, checkpoint, places)
    return Source(model, tokenizer, name, checkpoint, places, wanted)


def _own_dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the configuration names, else that of the first floating tensor."""
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    stored = [tensor.dtype for tensor in checkpoint.tensors.values()]
    return next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put every parameter that a module registers on the meta device, and leave buffers real.

    Buffers such as rotary frequencies are computed and never stored, so they must be there.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _places(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Names of the model's tensors and of the checkpoint's, which may lack the base's prefix."""
    prefix = f"{model.base_model_prefix}."
    places = {}
    for name in (*dict(model.named_parameters()), *_stored_buffers(model)):
        for stored in (name, name.removeprefix(prefix), prefix + name):
            if stored in checkpoint.tensors:
                places[name] = stored
                break
    return places


def _check_complete(folder: Path, missing: list[str], places: Mapping[str, str]) -> None:
    """Raise ValueError where a weight is missing that other blocks have."""
    known = {_numberless(name) for name in places}
    lost = [name for name in missing if _numberless(name) in known]
    if lost:
        raise ValueError(
            f"model: {folder} lacks {len(lost)} weights, {lost[0]} among them; copy the whole "
            f"checkpoint"
        )


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _stored_buffers(model: nn.Module) -> Mapping[str, Tensor]:
    """Buffers that a checkpoint may hold."""
    stored = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def _check_shapes(model: nn.Module, checkpoint: Checkpoint, places: Mapping[str, str]) -> None:
    for name, parameter in model.named_parameters():
        stored = checkpoint.tensors[places[name]]
        if stored.shape != tuple(parameter.shape):
            raise ValueError(
                f"model: {places[name]} in {checkpoint.folder / stored.file} has shape "
                f"{list(stored.shape)}, and config.json makes it {list(parameter.shape)}; the two "
                f"belong to different models: copy the checkpoint again"
            )
