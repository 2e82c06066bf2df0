"""A causal language model of a real shape, of whose blocks only one has weights at a time."""

from __future__ import annotations

import random
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from bench.shapes import Model
from fedspa.blocks import bits_only
from fedspa.messages import BlockMessage, LayerMessage
from fedspa.model import block_names, decoder_blocks, set_weights


class DrawnBlocks:
    """A store of blocks (`fedspa.blocks`), on the meta device but for the one asked for last.

    A block is drawn anew, with the same numbers, whenever it comes back: what was written into it
    is lost with it. `seconds` is the time that drawing took.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device, seed: int) -> None:
        self.modules = blocks
        self.names = [f"block {index + 1}" for index in range(len(blocks))]
        self.device = device
        self._seed = seed
        self._drawn: int | None = None
        self._masks: dict[int, dict[str, LayerMessage]] = {}
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self.modules)

    def embedding(self) -> AbstractContextManager[Any]:
        """The embedding is always there, and block 0 now."""
        return self.open(0)

    def head(self) -> AbstractContextManager[Any]:
        """The head is tied to the embedding."""
        return nullcontext()

    def open(self, index: int) -> AbstractContextManager[nn.Module]:
        """A block with its weights."""
        return nullcontext(self[index])

    def pretrained(self, index: int) -> dict[str, Tensor]:
        """Later rounds are not measured here."""
        raise NotImplementedError("a bench of one round asks for no earlier weights")

    def keep(self, index: int, weights: dict[str, Tensor], message: BlockMessage) -> None:
        """Write the agreed weights into the block, as long as it is there."""
        set_weights(self[index], weights)
        self._masks[index] = {
            name: replace(layer, bits=layer.bits.cpu(), kept=None)
            for name, layer in bits_only(message).items()
        }

    def masks(self, index: int) -> dict[str, LayerMessage]:
        """In main memory: those of a whole model would fill a GPU."""
        return self._masks.get(index, {})

    def __getitem__(self, index: int) -> nn.Module:
        """The block of that index with its weights, in the place of the one before it."""
        if index != self._drawn:
            start = time.perf_counter()
            if self._drawn is not None:
                self.modules[self._drawn].to("meta")
            self._drawn = index
            block = self.modules[index].to_empty(device=self.device)
            draw_weights(block, self.device, f"{self._seed}/{index}")
            _finish(self.device)
            self.seconds += time.perf_counter() - start
        return self.modules[index]


def draw_model(
    shape: Model, blocks: int, seqlen: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[nn.Module, DrawnBlocks]:
    """A model of a shape with that many blocks, its embedding on the device, and its blocks.

    The head is tied to the embedding: it costs nothing and is never run.
    """
    config = _config(shape, seqlen)
    with torch.device("meta"):
        config.num_hidden_layers = blocks
        whole = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config = _config(shape, seqlen)
    with torch.device(device):
        config.num_hidden_layers = 0
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    draw_weights(model, device, f"{seed}/embedding")
    parts = decoder_blocks(whole)
    place, _, name = block_names(whole, parts)[0].removesuffix(".0").rpartition(".")
    setattr(model.get_submodule(place), name, parts)
    model.config.num_hidden_layers = blocks
    model.eval()
    return model, DrawnBlocks(parts, device, seed)


def _config(shape: Model, seqlen: int) -> Any:
    common = {
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": max(2048, seqlen),
        "tie_word_embeddings": True,
        # The real models' special tokens may lie beyond a small vocabulary; none is used.
        "pad_token_id": None,
    }
    if shape.family == "opt":
        return OPTConfig(**common, ffn_dim=shape.ffn, word_embed_proj_dim=shape.hidden)
    return LlamaConfig(**common, intermediate_size=shape.ffn, num_key_value_heads=shape.kv_heads)


@torch.no_grad()
def draw_weights(module: nn.Module, device: torch.device, seed: str) -> None:
    """Fill matrices with normal numbers of variance 1/inputs, norms with 1 and biases with 0.

    A sum over the inputs then has their size, so that activations stay finite at any depth.
    """
    generator = torch.Generator(device).manual_seed(_number(seed))
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)


def draw_tokens(shape: Model, samples: int, seqlen: int, clients: int, seed: int) -> list[Tensor]:
    """Random windows (samples, seqlen), dealt out to the clients as evenly as it goes."""
    generator = torch.Generator().manual_seed(_number(f"{seed}/tokens"))
    tokens = torch.randint(shape.vocabulary, (samples, seqlen), generator=generator)
    return list(tokens.tensor_split(clients))


def _number(seed: str) -> int:
    return random.Random(seed).getrandbits(63)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
