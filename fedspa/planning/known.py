"""Models that are known by name: what of their published configurations decides their shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import LlamaConfig, OPTConfig, PretrainedConfig


class Model(NamedTuple):
    """What of a model decides the shapes of its layers.

    family: "opt" (fc1 and fc2 are `up` and `down`) or "llama" (also a `gate`)
    hidden: width of the residual stream; ffn: width inside the feed-forward part
    """

    name: str
    family: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    blocks: int
    vocabulary: int


# From the models' published configurations. OPT-350m is left out: its residual stream is narrower
# than its embedding, so that its layers are not those of the family.
MODELS = {
    model.name: model
    for model in (
        Model("opt-125m", "opt", 768, 3072, 12, 12, 12, 50272),
        Model("opt-1.3b", "opt", 2048, 8192, 32, 32, 24, 50272),
        Model("opt-2.7b", "opt", 2560, 10240, 32, 32, 32, 50272),
        Model("opt-6.7b", "opt", 4096, 16384, 32, 32, 32, 50272),
        Model("opt-13b", "opt", 5120, 20480, 40, 40, 40, 50272),
        Model("opt-30b", "opt", 7168, 28672, 56, 56, 48, 50272),
        Model("opt-66b", "opt", 9216, 36864, 72, 72, 64, 50272),
        Model("llama-2-7b", "llama", 4096, 11008, 32, 32, 32, 32000),
        Model("llama-2-13b", "llama", 5120, 13824, 40, 40, 40, 32000),
        Model("llama-2-70b", "llama", 8192, 28672, 64, 8, 80, 32000),
        Model("llama-3-8b", "llama", 4096, 14336, 32, 8, 32, 128256),
        Model("llama-3-70b", "llama", 8192, 28672, 64, 8, 80, 128256),
    )
}
# Positions that a model was made for, by the beginning of its name.
POSITIONS = {"opt": 2048, "llama-2": 4096, "llama-3": 8192}


def find_model(name: str) -> Model:
    """Return a model by its name.

    raises: ValueError where it is not known
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is not known; choose from {', '.join(MODELS)}")
    return MODELS[name]


def configuration(model: Model) -> PretrainedConfig:
    """The configuration of a model, with the dtype in which it was published."""
    positions = next(n for start, n in POSITIONS.items() if model.name.startswith(start))
    sizes = {
        "hidden_size": model.hidden,
        "num_hidden_layers": model.blocks,
        "num_attention_heads": model.heads,
        "vocab_size": model.vocabulary,
        "max_position_embeddings": positions,
    }
    if model.family == "opt":
        width = {"ffn_dim": model.ffn, "word_embed_proj_dim": model.hidden}
        return OPTConfig(**sizes, **width, dtype=torch.float16)
    dtype = torch.bfloat16 if model.name.startswith("llama-3") else torch.float16
    return LlamaConfig(
        **sizes,
        intermediate_size=model.ffn,
        num_key_value_heads=model.kv_heads,
        tie_word_embeddings=False,
        dtype=dtype,
    )
