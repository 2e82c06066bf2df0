"""Hidden states on their way through the decoder blocks, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedspa.model import device_of
from fedspa.streaming.activations import Hidden

# What a block is called with beside its hidden states: positional and named arguments.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Stream:
    """Hidden states on their way through the blocks, in batches, with the blocks' other inputs.

    hidden: tensors (batch, length, width) in order, the input of the next block: a list, or what
        places them elsewhere (`streaming.activations`).
    arguments: for every batch size, for every block, its remaining positional and named
        arguments (attention mask, rotary embedding, ...); windows carry no padding, so that
        these depend on the batch's shape alone.
    """

    hidden: list[Tensor] | Hidden
    arguments: dict[int, list[Call]]
    marked: list[Tensor] | None = None

    def inputs(self, block_index: int) -> Iterator[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
        """Every batch as the three arguments of `run_block`."""
        for hidden in self.hidden:
            args, kwargs = self.arguments[hidden.shape[0]][block_index]
            yield hidden, args, kwargs

    def advance(self, following: Iterator[Tensor]) -> None:
        """Replace the hidden states, each by the next of an iterator that may read them."""
        if isinstance(self.hidden, list):
            for index, hidden in enumerate(following):
                self.hidden[index] = hidden
        else:
            self.hidden.replace(following)

    def mark(self) -> None:
        """Keep the hidden states as they are now, until `rewind` makes them these again."""
        if isinstance(self.hidden, list):
            self.marked = list(self.hidden)
        else:
            self.hidden.mark()

    def trim(self) -> None:
        """Remove files of hidden states that are neither these nor were marked last."""
        if not isinstance(self.hidden, list):
            self.hidden.trim()

    def rewind(self) -> None:
        """Go back to the hidden states that were marked, and keep them no longer."""
        if isinstance(self.hidden, list):
            assert self.marked is not None
            self.hidden, self.marked = self.marked, None
        else:
            self.hidden.rewind()


@torch.no_grad()
def embed(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: Tensor,
    batch_size: int,
    *,
    device: torch.device | None = None,
    stream: Stream | None = None,
) -> Stream:
    """Token windows as the input of the first block.

    tokens: (windows, length) int64. The model's own forward runs with every block replaced by
    a recorder, so that each architecture prepares its masks and positions as it always does.
    device: where the embedding lies; None: where the model's first parameter does.
    stream: takes them, in place of what it held; None: a new one.
    """
    if stream is None:
        stream = Stream([], {})
    stream.hidden.clear()
    stream.arguments.clear()
    if device is None:
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
def _recorders(blocks: nn.ModuleList, firsts: list[Tensor] | Hidden) -> Iterator[list[Call]]:
    """Let every block note its arguments and hand its input on, the first one also its input.

    The first block really runs, once, to show how this architecture returns its output.
    """
    first_forward, last = blocks[0].forward, len(blocks) - 1
    calls: list[Call] = []
    # What follows the hidden states in a block's output: nothing, where it is a tensor.
    rest: list[tuple[Any, ...] | None] = []

    def recorder(index: int) -> Any:
        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if index == 0:
                if hidden_states.ndim != 3:
                    raise ValueError(
                        f"{type(blocks[0]).__name__} takes inputs of shape "
                        f"{tuple(hidden_states.shape)}; fedspa walks blocks that take (batch, "
                        f"length, width)"
                    )
                firsts.append(hidden_states)
            if index == last:
                raise _LastBlockReached
            if not rest:
                output = first_forward(hidden_states, *args, **kwargs)
                rest.append(output[1:] if isinstance(output, tuple) else None)
            return hidden_states if rest[0] is None else (hidden_states, *rest[0])

        return record

    with replaced_forwards(blocks, [recorder(index) for index in range(len(blocks))]):
        yield calls


@contextmanager
def replaced_forwards(blocks: nn.ModuleList, forwards: Sequence[Any]) -> Iterator[None]:
    """Let every block do something else where the model calls it, one function for each."""
    kept = [block.__dict__.get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
