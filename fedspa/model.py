"""The model as pruning sees it: a list of decoder blocks, and the linear layers inside them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedspa_kernels.checks import refuse, together


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


def stored(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight (outputs, inputs) as a view of the shape that the layer stores it in."""
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


def check_model(
    model: nn.Module, blocks: nn.ModuleList, pattern_width: int | None, *, streamed: bool = False
) -> None:
    """Raise ValueError where a weight is shared, NaN or infinite, or not a multiple wide enough.

    pattern_width: the m of a pattern "n:m", which must divide every layer's inputs; or None.
    streamed: the values are not there yet; `check_values` looks at them block by block.
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
                _check_kind(name, weight_of(layer), pattern_width, streamed)
            if not streamed:
                check_values(prefix, block)


def check_values(name: str, block: nn.Module) -> None:
    """Raise ValueError where a weight of a block is NaN or infinite; name: the block's."""
    with together():
        for short, layer in linear_layers(block).items():
            weight = weight_of(layer)
            # NaN goes through both extremes, and nothing of the weight's size is written.
            finite = torch.stack(weight.aminmax()).isfinite()
            refuse(~finite, partial(_explain_weight, f"{name}.{short}", weight))


def _check_kind(name: str, weight: Tensor, pattern_width: int | None, streamed: bool) -> None:
    if weight.is_meta and not streamed:
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


def _explain_weight(name: str, weight: Tensor) -> None:
    raise ValueError(
        f"{name} holds {int((~weight.isfinite()).sum())} weights that are NaN or infinite; load "
        f"the checkpoint again or in another dtype"
    )
