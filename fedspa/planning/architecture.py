"""The shapes of a model, from its configuration alone: nothing is read or allocated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedspa.loading import read_configuration
from fedspa.model import decoder_blocks, linear_layers, weight_of
from fedspa.planning.known import MODELS, configuration, find_model


@dataclass(frozen=True)
class Layer:
    """A weight matrix (rows, cols); `turned` where it is stored as (cols, rows)."""

    name: str
    rows: int
    cols: int
    turned: bool = False

    @property
    def numel(self) -> int:
        """Its weights."""
        return self.rows * self.cols


@dataclass(frozen=True)
class Kind:
    """Blocks of one shape.

    first: the index of the first of them. count: how many there are. layers: those to prune.
    nbytes: of all parameters of one of them; largest: of its largest parameter.
    """

    first: int
    count: int
    layers: tuple[Layer, ...]
    nbytes: int
    largest: int

    @property
    def prunable(self) -> int:
        """The weights of its layers."""
        return sum(layer.numel for layer in self.layers)


@dataclass(frozen=True)
class Architecture:
    """A model on the meta device, and what of it counts.

    name: what the user called it. dtype: of the weights in a run.
    """

    model: nn.Module
    name: str
    dtype: torch.dtype

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return decoder_blocks(self.model)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The blocks by their shapes, in the order in which these come first."""
        found: dict[Any, list[int]] = {}
        for index, block in enumerate(self.blocks):
            shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
            # Blocks of one shape may attend differently.
            found.setdefault((shapes, _attention(self.model, index)), []).append(index)
        return tuple(_kind(self.blocks[where[0]], where) for where in found.values())

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return int(self._config.hidden_size)

    @property
    def block_count(self) -> int:
        """How many decoder blocks there are."""
        return len(self.blocks)

    @cached_property
    def nbytes(self) -> int:
        """Of all parameters, tied ones once."""
        return _nbytes(self.model.parameters())

    @cached_property
    def outside(self) -> tuple[int, int]:
        """Bytes of the parameters outside the blocks: before them, and of a head of its own."""
        inside = {id(parameter) for parameter in self.blocks.parameters()}
        rest = {id(p): p for p in self.model.parameters() if id(p) not in inside}
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        first = self.model.get_input_embeddings()  # type: ignore[operator]
        own = [] if head is None else [p for p in head.parameters() if id(p) in rest]
        tied = {id(parameter) for parameter in first.parameters()}
        head_bytes = _nbytes(p for p in own if id(p) not in tied)
        return _nbytes(rest.values()) - head_bytes, head_bytes

    @property
    def _config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]


def read_architecture(source: str, dtype: str = "auto") -> Architecture:
    """The architecture of a checkpoint folder, of a model known by name, or of one on the hub.

    dtype: "auto" takes the configuration's own, float32 where it names none.
    Raises ValueError where there is no configuration, or not of a model that can be pruned.
    """
    config = _configuration(source)
    own = getattr(config, "dtype", None)
    wanted = own if dtype == "auto" else getattr(torch, dtype)
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        wanted = torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted).eval()
    return Architecture(model, source, wanted)


def _configuration(source: str) -> Any:
    if source in MODELS:
        return configuration(find_model(source))
    try:
        return read_configuration(source)
    except RuntimeError as error:
        raise ValueError(f"{error}, or a name: {', '.join(MODELS)}") from error


def _attention(model: nn.Module, index: int) -> Any:
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None)  # type: ignore[operator,union-attr]
    return types[index] if types else None


def _kind(block: nn.Module, where: list[int]) -> Kind:
    layers = tuple(
        Layer(name, *_shape(layer), isinstance(layer, Conv1D))
        for name, layer in linear_layers(block).items()
    )
    largest = max(p.numel() * p.element_size() for p in block.parameters())
    return Kind(where[0], len(where), layers, _nbytes(block.parameters()), largest)


def _shape(layer: nn.Module) -> tuple[int, int]:
    rows, cols = weight_of(layer).shape
    return rows, cols


def _nbytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
