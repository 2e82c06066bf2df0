"""How many windows go through a block at once, where the settings leave it to the machine."""

from __future__ import annotations

import torch
from torch import nn

from fedspa.model import decoder_blocks, device_of, linear_layers, weight_of

# Tokens at which the products of a block run at their full rate. On two CPU cores 512 tokens do,
# and more of them only leave the cache: 5 windows of 512 at once were no faster than one by one.
TOKENS = {"cpu": 512, "cuda": 16384}
# The share of a GPU's memory beside the model's weights that one batch in flight may take.
SHARE = 0.25


def choose_batch(
    model: nn.Module, length: int, *, logits: int = 0, device: torch.device | None = None
) -> int:
    """Windows in one forward pass, from the kind of device, its memory and the model's widths.

    Neither what else runs there nor a measurement decides, so that the same machine gives the
    same batches, and with them the same bits. A GPU that others fill needs a batch of its own.

    length: tokens of a window.
    logits: the vocabulary's size, where the pass ends in logits.
    device: where it is computed; None: where the model's first parameter lies.
    """
    if device is None:
        device = device_of(model)
    tokens = TOKENS.get(device.type, TOKENS["cpu"])
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        tokens = min(tokens, tokens_that_fit(model, length, logits, memory))
    return max(1, tokens // length)


def tokens_that_fit(model: nn.Module, length: int, logits: int, memory: int) -> int:
    """How many tokens a quarter of the memory holds that the weights leave of `memory` bytes.

    Counted are the inputs and outputs of all linear layers of the widest block as if none were
    freed, scores of attention where the model makes them as a matrix, and the logits with float32
    copies of them.
    """
    # Weights on the meta device take no memory: they are not there yet.
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
    size = max(p.element_size() for p in model.parameters())
    widths = [
        sum(sum(weight_of(layer).shape) for layer in linear_layers(block).values())
        for block in decoder_blocks(model)
    ]
    config = getattr(model, "config", None)
    scores = 0
    if getattr(config, "_attn_implementation", "eager") == "eager":
        # The scores, and their float32 softmax.
        scores = getattr(config, "num_attention_heads", 1) * length * (size + 4)
    bytes_per_token = max(widths) * size + scores + logits * (size + 8)
    return int(SHARE * max(memory - weights, 0)) // max(bytes_per_token, 1)
