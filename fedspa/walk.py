"""Hidden states on their way through the decoder blocks, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedspa.model import device_of

# What a block is called with beside its hidden states: positional and named arguments.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Stream:
    """Hidden states on their way through the blocks, in batches, with the blocks' other inputs.

    hidden: a list of tensors (batch, length, width), the input of the next block.
    arguments: for every batch size, for every block, its remaining positional and named
        arguments (attention mask, rotary embedding, ...); windows carry no padding, so that
        these depend on the batch's shape alone.
    """

    hidden: list[Tensor]
    arguments: dict[int, list[Call]]

    def inputs(self, block_index: int) -> Iterator[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
        """Every batch as the three arguments of `run_block`."""
        for hidden in self.hidden:
            args, kwargs = self.arguments[hidden.shape[0]][block_index]
            yield hidden, args, kwargs


@torch.no_grad()
def embed(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, batch_size: int) -> Stream:
    """Token windows as the input of the first block.

    tokens: (windows, length) int64. The model's own forward runs with every block replaced by
    a recorder, so that each architecture prepares its masks and positions as it always does.
    """
    stream = Stream([], {})
    device = device_of(model)
    with _recorders(blocks, stream.hidden) as calls:
        for batch in tokens.split(batch_size):
            calls.clear()
            with suppress(_LastBlockReached):
                model(input_ids=batch.to(device), use_cache=False)
            _keep_arguments(stream, batch.shape[0], list(calls), type(model).__name__)
    return stream


def _keep_arguments(stream: Stream, batch_size: int, calls: list[Call], model: str) -> None:
    """Keep what the blocks were called with, or refuse blocks that cannot be walked with it."""
    if stream.hidden[-1].ndim != 3:
        raise ValueError(
            f"{model}: its blocks take inputs of shape {tuple(stream.hidden[-1].shape)}; fedspa "
            f"walks blocks that take (batch, length, width)"
        )
    known = stream.arguments.setdefault(batch_size, calls)
    if known is not calls and not _same(known, calls):
        raise ValueError(
            f"{model}: its blocks take arguments that depend on the tokens beside their hidden "
            f"states; fedspa cannot walk such blocks one by one"
        )


def _same(left: Any, right: Any) -> bool:
    """Whether two nested arguments of blocks hold the same tensors."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return True


def run_block(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    """The hidden states that a block makes of its input; some architectures return a tuple."""
    output = block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


class _LastBlockReached(Exception):
    """Ends a recorded forward pass before the final norm and the head."""


@contextmanager
def _recorders(blocks: nn.ModuleList, firsts: list[Tensor]) -> Iterator[list[Call]]:
    """Let every block note its arguments and hand its input on, the first one also its input.

    The first block really runs, once, to show how this architecture returns its output.
    """
    kept = [block.__dict__.get("forward") for block in blocks]
    first_forward, last = blocks[0].forward, len(blocks) - 1
    calls: list[Call] = []
    # What follows the hidden states in a block's output: nothing, where it is a tensor.
    rest: list[tuple[Any, ...] | None] = []

    def recorder(index: int) -> Any:
        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if index == 0:
                firsts.append(hidden_states)
            if index == last:
                raise _LastBlockReached
            if not rest:
                output = first_forward(hidden_states, *args, **kwargs)
                rest.append(output[1:] if isinstance(output, tuple) else None)
            return hidden_states if rest[0] is None else (hidden_states, *rest[0])

        return record

    for index, block in enumerate(blocks):
        block.forward = recorder(index)
    try:
        yield calls
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
