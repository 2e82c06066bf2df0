"""Hidden states on their way through the decoder blocks, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Stream:
    """Hidden states on their way through the blocks, in batches, with the blocks' other inputs.

    hidden: a list of tensors (batch, length, width), the input of the next block.
    arguments: for every batch size, for every block, its remaining positional and named
        arguments (attention mask, rotary embedding, ...); windows carry no padding, so that
        these depend on the batch's shape alone.
    """

    hidden: list[Tensor]
    arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]]

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
    device = next(model.parameters()).device
    for batch in tokens.split(batch_size):
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        with _recorders(blocks, calls, stream.hidden), suppress(_LastBlockReached):
            model(input_ids=batch.to(device), use_cache=False)
        if stream.hidden[-1].ndim != 3:
            raise ValueError(
                f"{type(model).__name__}: its blocks take inputs of shape "
                f"{tuple(stream.hidden[-1].shape)}; fedspa walks blocks that take "
                f"(batch, length, width)"
            )
        known = stream.arguments.setdefault(batch.shape[0], calls)
        if known is not calls and not _same(known, calls):
            raise ValueError(
                f"{type(model).__name__}: its blocks take arguments that depend on the tokens "
                f"beside their hidden states; fedspa cannot walk such blocks one by one"
            )
    return stream


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
def _recorders(blocks: nn.ModuleList, calls: list[Any], firsts: list[Tensor]) -> Iterator[None]:
    """Let every block note its arguments and hand its input on, the first one also its input.

    The first block really runs, once a batch, to show how this architecture returns its output.
    """
    kept = [block.__dict__.get("forward") for block in blocks]
    first_forward, last = blocks[0].forward, len(blocks) - 1
    rest: list[Any] = []

    def recorder(index: int) -> Any:
        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if index == 0:
                firsts.append(hidden_states)
            if index == last:
                raise _LastBlockReached
            if index == 0:
                output = first_forward(hidden_states, *args, **kwargs)
                rest[:] = [output[1:]] if isinstance(output, tuple) else []
            return (hidden_states, *rest[0]) if rest else hidden_states

        return record

    for index, block in enumerate(blocks):
        block.forward = recorder(index)
    try:
        yield
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
