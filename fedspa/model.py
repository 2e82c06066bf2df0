"""The model as pruning sees it: a list of decoder blocks, and the linear layers inside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedspa.gguf_file import read_gguf
from fedspa_kernels.checks import refuse, together

DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Loaded:
    """A model with the tokenizer it came with (None where a folder holds none)."""

    model: PreTrainedModel
    tokenizer: Any
    name: str


def load(source: str | Path, *, dtype: str = "auto", device: str = "cpu") -> Loaded:
    """Load a causal language model: a checkpoint folder, a .gguf file, or a Hugging Face id.

    dtype "auto" keeps the checkpoint's own; a .gguf file is dequantised to float32.
    Raises ValueError where the folder is not a checkpoint, or holds quantised weights that
    cannot be pruned; RuntimeError where the device or a package is missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"model: dtype {dtype!r} is unknown; choose one of {list(DTYPES)}")
    check_device(device)
    path = Path(source)
    if path.suffix == ".gguf":
        wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        model, tokenizer = read_gguf(path, wanted)
        return Loaded(model.to(device).eval(), tokenizer, path.stem)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"model: {path} holds no config.json, so it is not a Hugging Face checkpoint; name "
            f"the folder that save_pretrained wrote, or a .gguf file"
        )
    if not path.exists() and str(source).startswith((".", "/", "~")):
        raise ValueError(f"model: there is no folder or file {path}")
    _check_config(source)
    return Loaded(_read_weights(source, dtype).to(device).eval(), _tokenizer(source), str(source))


def _check_config(source: str | Path) -> None:
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
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"device {device!r} cannot be used here: {reason}") from error


def _tokenizer(source: str | Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return None


def need_tokenizer(loaded: Loaded) -> Any:
    """The model's tokenizer; raises ValueError where its folder holds none."""
    if loaded.tokenizer is None:
        raise ValueError(
            f"{loaded.name} holds no tokenizer, so text cannot be read for it; save the model's "
            f"tokenizer in the same folder"
        )
    return loaded.tokenizer


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's list of decoder blocks, found by its length in the configuration.

    Raises ValueError where no such list exists.
    """
    config = getattr(model, "config", None)
    text_config = config.get_text_config(decoder=True) if config is not None else None
    count = getattr(text_config, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    lists = [m for m in lists if any(linear_layers(block) for block in m)]
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers "
            f"(looked for a ModuleList of num_hidden_layers = {count}); "
            f"fedspa prunes causal language models that are a stack of such blocks"
        )
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """The layers of a block that are pruned, by their names within it, in the block's order."""
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as a view of shape (outputs, inputs), detached."""
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def layer_weights(block: nn.Module) -> dict[str, Tensor]:
    """A copy of every prunable weight of a block, each of shape (outputs, inputs)."""
    return {name: weight_of(layer).clone() for name, layer in linear_layers(block).items()}


@torch.no_grad()
def set_weights(block: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write weights of shape (outputs, inputs) into the layers of a block, in place."""
    layers = linear_layers(block)
    for name, weight in weights.items():
        weight_of(layers[name]).copy_(weight)


def block_names(model: nn.Module, blocks: nn.ModuleList) -> list[str]:
    """The full name of every block within the model, such as "model.layers.0"."""
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    return [f"{prefix}.{index}" for index in range(len(blocks))]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies, and so where its inputs must."""
    return next(model.parameters()).device


def vocabulary_size(model: nn.Module) -> int:
    """How many token ids the model's input embedding knows."""
    return int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]


def longest_window(model: nn.Module) -> int | None:
    """The positions that the model was made for, None where its configuration names none."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def unprunable_weights(model: nn.Module, blocks: nn.ModuleList) -> tuple[str, ...]:
    """Names of the matrices in the blocks that no linear layer holds, such as fused experts."""
    names = block_names(model, blocks)
    found = []
    for prefix, block in zip(names, blocks, strict=True):
        pruned = {id(layer.weight) for layer in linear_layers(block).values()}
        for name, parameter in block.named_parameters():
            if parameter.ndim >= 2 and id(parameter) not in pruned:
                found.append(f"{prefix}.{name}")
    return tuple(found)


def check_model(model: nn.Module, blocks: nn.ModuleList, pattern_width: int | None) -> None:
    """Raise ValueError where a weight is shared, NaN or infinite, or not a multiple wide enough.

    pattern_width: the m of a pattern "n:m", which must divide every layer's inputs; or None.
    """
    owners: dict[int, str] = {}
    with together():
        for prefix, block in zip(block_names(model, blocks), blocks, strict=True):
            for short, layer in linear_layers(block).items():
                name = f"{prefix}.{short}"
                other = owners.setdefault(id(layer.weight), name)
                if other != name:
                    raise ValueError(
                        f"{name} shares its weight with {other}; fedspa prunes blocks one by one, "
                        f"which would prune a shared weight twice"
                    )
                _check_weight(name, weight_of(layer), pattern_width)


def _check_weight(name: str, weight: Tensor, pattern_width: int | None) -> None:
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device; load the model's weights first")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name} is {weight.dtype}; load the model in float32, float16 or bfloat16"
        )
    if pattern_width is not None and weight.shape[1] % pattern_width:
        raise ValueError(
            f"{name} has {weight.shape[1]} inputs, which a pattern over every "
            f"{pattern_width} does not divide; choose another pattern, or a sparsity"
        )
    # NaN goes through both extremes, and nothing of the weight's size is written.
    refuse(~torch.stack(weight.aminmax()).isfinite(), partial(_explain_weight, name, weight))


def _explain_weight(name: str, weight: Tensor) -> None:
    raise ValueError(
        f"{name} holds {int((~weight.isfinite()).sum())} weights that are NaN or infinite; load "
        f"the checkpoint again or in another dtype"
    )
