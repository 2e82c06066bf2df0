"""Where a model comes from: a checkpoint folder, a .gguf file, or a Hugging Face id."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fedspa.gguf_file import read_gguf
from fedspa.model import vocabulary_size
from fedspa.streaming.architecture import Source, open_source

DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Loaded:
    """A model with the tokenizer it came with (None where a folder holds none)."""

    model: PreTrainedModel
    tokenizer: Any
    name: str


def open_model(
    source: str | Path, *, dtype: str = "auto", device: str = "cpu", say: Any = None
) -> Loaded | Source:
    """A model to prune: streamed from its checkpoint where that can be, else loaded as a whole.

    say: is told, in a sentence, why a model is loaded as a whole.
    raises: ValueError and RuntimeError as `load`, and ValueError where a shard is damaged.
    """
    check_dtype(dtype)
    check_device(device)
    path = Path(source)
    if path.suffix == ".gguf":
        return load(source, dtype=dtype, device=device)
    read_configuration(source)
    folder = path if path.is_dir() else _fetched(source)
    opened = open_source(folder, dtype, _tokenizer(folder), str(source))
    if isinstance(opened, Source):
        return opened
    if say is not None:
        say(f"{opened}, so the model is loaded as a whole")
    return load(source, dtype=dtype, device=device)


def load(source: str | Path, *, dtype: str = "auto", device: str = "cpu") -> Loaded:
    """Load a causal language model: a checkpoint folder, a .gguf file, or a Hugging Face id.

    dtype "auto" keeps the checkpoint's own; a .gguf file is dequantised to float32.
    Raises ValueError where the folder is not a checkpoint, or holds quantised weights that
    cannot be pruned; RuntimeError where the device or a package is missing.
    """
    check_dtype(dtype)
    check_device(device)
    path = Path(source)
    if path.suffix == ".gguf":
        wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        model, tokenizer = read_gguf(path, wanted)
        return Loaded(model.to(device).eval(), tokenizer, path.stem)
    read_configuration(source)
    return Loaded(_read_weights(source, dtype).to(device).eval(), _tokenizer(source), str(source))


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless models can be loaded in that dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"model: dtype {dtype!r} is unknown; choose one of {list(DTYPES)}")


def _fetched(source: str | Path) -> Path:
    """The folder of a model of the Hugging Face hub, in its cache."""
    kinds = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*"]
    # Some repositories hold the same weights a second time in the authors' own format.
    other = ["consolidated*", "*/*"]
    return Path(snapshot_download(str(source), allow_patterns=kinds, ignore_patterns=other))


def read_configuration(source: str | Path) -> Any:
    """The configuration of a checkpoint folder or of a model of the hub.

    Raises ValueError where it is broken, or not of a model that can be pruned; RuntimeError where
    it cannot be fetched.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"model: {path} holds no config.json, so it is not a Hugging Face checkpoint; name "
            f"the folder that save_pretrained wrote, or a .gguf file"
        )
    if not path.exists() and str(source).startswith((".", "/", "~")):
        raise ValueError(f"model: there is no folder or file {path}")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if Path(source).exists():
            raise ValueError(f"model: the configuration in {source} is broken: {reason}") from error
        raise RuntimeError(
            f"model: {source} is neither a folder here nor a model that could be fetched "
            f"({reason}); give the folder of a checkpoint"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"model: {source} holds quantised weights, which cannot be pruned as they are; use "
            f"the checkpoint that it was quantised from"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"model: {source} is of type {config.model_type!r}, which is no causal language model"
        )
    return config


def _read_weights(source: str | Path, dtype: str) -> PreTrainedModel:
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model: the weights of {source} cannot be read ({reason}); copy them again"
        ) from error
    # transformers fills what is missing with random numbers, and only warns.
    missing = sorted({*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"model: {source} lacks {len(missing)} weights or has them in another shape, "
            f"{missing[0]} among them; copy the whole checkpoint"
        )
    return model


def check_device(device: str) -> None:
    """Raise unless torch can put tensors on `device`."""
    local = os.environ.get("LOCAL_RANK")
    # Of several ranks each has a GPU of its own, and must not touch the first one's.
    place = f"cuda:{local}" if device == "cuda" and local is not None else device
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"device {device!r} cannot be used here: {reason}") from error


def _tokenizer(source: str | Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return None


def need_tokenizer(loaded: Loaded | Source) -> Any:
    """The model's tokenizer; raises ValueError where there is none, or it is another model's."""
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"{loaded.name} holds no tokenizer, so text cannot be read for it; save the model's "
            f"tokenizer in the same folder"
        )
    rows = vocabulary_size(loaded.model)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    # Embeddings are padded to a multiple of 64 or so, never to twice the tokenizer's vocabulary.
    if highest >= rows or rows > 2 * (highest + 1):
        raise ValueError(
            f"{loaded.name}: its tokenizer does not belong to the model: its highest token id is "
            f"{highest}, and the model's embedding has {rows} rows; save the model's own tokenizer "
            f"in the same folder"
        )
    return tokenizer
