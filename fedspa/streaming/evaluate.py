"""Perplexity of a model that is never whole in memory: one walk through its blocks for all text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedspa.batches import choose_batch
from fedspa.blocks import Blocks
from fedspa.client import propagate
from fedspa.evaluate import add_losses_, check_windows, mean_perplexity
from fedspa.model import vocabulary_size
from fedspa.streaming.activations import Hidden
from fedspa.walk import Stream, embed, replaced_forwards

# What follows the hidden states in a block's output: None, where it is a tensor alone.
Rest = tuple[Any, ...] | None


@torch.no_grad()
def streamed_perplexity(
    model: nn.Module,
    blocks: Blocks,
    windows: Mapping[str, Tensor],
    *,
    batch_size: int | None = None,
    streams: Mapping[str, Stream] | None = None,
    advance: Callable[[], None] | None = None,
) -> dict[str, float]:
    """`evaluate.domain_perplexity`, for which every block is opened once; the same bits.

    windows: of every text (windows, length) int64, length >= 2.
    batch_size: windows in one forward pass; None: by the device (`batches.py`).
    streams: of every text what takes its hidden states, and is empty again in the end: those of
        all texts are held at a time; None: where the blocks are computed.
    advance: is called once a block, and once at the end.
    raises: ValueError where there is nothing to predict, or the model cannot read the windows.
    """
    check_windows(model, windows)
    if streams is None:
        streams = {name: Stream([], {}) for name in windows}
    batches = _embed(model, blocks, windows, batch_size, streams)
    rest: Rest = None
    for index in range(len(blocks)):
        with blocks.open(index) as block:
            rest = _pass(block, streams, index)
        if advance is not None:
            advance()
    found = {}
    with blocks.head():
        for name, mine in windows.items():
            hidden = streams[name].hidden
            total = torch.zeros((), dtype=torch.float64, device=blocks.device)
            for batch, last in zip(mine.split(batches[name]), hidden, strict=True):
                tokens = batch.to(blocks.device)
                add_losses_(total, _logits(model, blocks.modules, tokens, last, rest), tokens)
            found[name] = mean_perplexity(total, mine)
            hidden.clear()
    if advance is not None:
        advance()
    return found


def _embed(
    model: nn.Module,
    blocks: Blocks,
    windows: Mapping[str, Tensor],
    batch_size: int | None,
    streams: Mapping[str, Stream],
) -> dict[str, int]:
    """Fill the streams with the input of the first block; returns each text's windows a batch."""
    batches = {}
    with blocks.embedding():
        for name, mine in windows.items():
            batches[name] = batch_size or choose_batch(
                model, mine.shape[1], logits=vocabulary_size(model), device=blocks.device
            )
            stream = streams[name]
            embed(model, blocks.modules, mine, batches[name], device=blocks.device, stream=stream)
    return batches


def _pass(block: nn.Module, streams: Mapping[str, Stream], index: int) -> Rest:
    """Move all hidden states past a block; returns what it gives out beside them."""
    seen: list[Rest] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        if not seen:
            seen.append(output[1:] if isinstance(output, tuple) else None)

    handle = block.register_forward_hook(note)
    try:
        for stream in streams.values():
            propagate(block, stream, index)
            if isinstance(stream.hidden, Hidden):
                # No run goes on from here: the file of the states before is of no more use.
                stream.hidden.settle()
    finally:
        handle.remove()
    return seen[0] if seen else None


def _logits(
    model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, last: Tensor, rest: Rest
) -> Tensor:
    """The logits that the model makes of its last hidden states, (batch, length, vocabulary).

    The model's own forward runs with every block replaced, so that each architecture's last norm,
    head and scaling of the logits are as they always are.

    last: (batch, length, width), what the last block gave out.
    """

    def hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if rest is None else (hidden_states, *rest)

    def end(*_: Any, **__: Any) -> Any:
        return hand_on(last)

    with replaced_forwards(blocks, [*[hand_on] * (len(blocks) - 1), end]):
        return model(input_ids=tokens, use_cache=False).logits
