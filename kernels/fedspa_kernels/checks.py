"""Refusing values that only the device has seen: at once, or many operators' in one answer.

A kernel finds a NaN in its own pass and sets a flag. Reading the flag waits for the device, which
then stands idle until the host has sent it more work. Inside `together` nothing waits: the flags
are collected, and read in one transfer at the end of the block.

    with together():
        for name, weight in weights.items():
            with about(f"layer {name}: "):
                pruned[name] = wanda_prune(weight, norms[name], sparsity=0.5)
    # Only here are the results known to be good: nothing may be sent or saved before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


class _Refusal(NamedTuple):
    """A flag that was not read yet, what looks into it, and how its sentence begins."""

    flag: Tensor
    look: Callable[[], None]
    beginning: str


class _Block:
    """What a block of `together` has collected; once it has ended, it collects nothing."""

    def __init__(self) -> None:
        self.refusals: list[_Refusal] = []
        self.ended = False


# Context variables: threads and coroutines each collect their own; generators share their caller's.
_BLOCK: ContextVar[_Block | None] = ContextVar("_BLOCK", default=None)
_BEGINNING: ContextVar[str] = ContextVar("_BEGINNING", default="")


def refuse(flag: Tensor, explain: Callable[[], None]) -> bool:
    """Raise what `explain` raises where a flag is set: now, or at the end of `together`.

    flag:    of any shape and a dtype of integers or bool; set where any of it is not 0
    explain: looks at the values themselves and raises ValueError. It may run later, and then sees
             its tensors as they are then: leave the inputs of an operator alone inside `together`
    returns: whether the flag was read; if not, what follows must bear a value that is refused
    """
    return examine(flag, partial(_insist, explain))


def examine(flag: Tensor, look: Callable[[], None]) -> bool:
    """As `refuse`, for a flag that may be set where nothing is wrong: `look` need not raise."""
    block = _BLOCK.get()
    # Blocks of generators may end out of order, and leave one that has ended.
    if block is not None and not block.ended:
        block.refusals.append(_Refusal(flag, look, _BEGINNING.get()))
        return False
    # Most flags are one number, and of these any() would be one more kernel.
    if (flag if flag.numel() == 1 else flag.any()).item():
        look()
    return True


@contextmanager
def together() -> Iterator[None]:
    """Read all flags of the block in one transfer at its end, one from each device.

    The first refused value in the order of the calls raises the ValueError that it would have
    raised at once. Of a block that ends with an exception of its own nothing is read: that
    exception goes on as it is. A block inside a block reads its own flags at its own end, so that
    what follows it can rely on its results, whoever called it. Do not yield inside of a block: what
    the caller of a generator does meanwhile would be collected there too.
    """
    block = _Block()
    # Sentences begun outside of the block are completed there, as the exception passes.
    tokens = _BLOCK.set(block), _BEGINNING.set("")
    try:
        yield
    finally:
        block.ended = True
        _BLOCK.reset(tokens[0])
        _BEGINNING.reset(tokens[1])
    flags = [refusal.flag for refusal in block.refusals]
    for refusal, is_set in zip(block.refusals, _read(flags), strict=True):
        if is_set:
            with about(refusal.beginning):
                refusal.look()


@contextmanager
def about(beginning: str) -> Iterator[None]:
    """Let every ValueError of the block begin with these words, also one that `together` raises."""
    token = _BEGINNING.set(_BEGINNING.get() + beginning)
    try:
        yield
    except ValueError as error:
        if not beginning:
            raise
        raise ValueError(f"{beginning}{error}") from error
    finally:
        _BEGINNING.reset(token)


def _insist(explain: Callable[[], None]) -> None:
    explain()
    raise ValueError(
        "an operator refused a value that is not there any more; leave its inputs as they are "
        "until the results were checked"
    )


def _read(flags: list[Tensor]) -> list[bool]:
    """Whether each flag is set; a transfer from each device."""
    places: dict[torch.device, list[int]] = {}
    for place, flag in enumerate(flags):
        places.setdefault(flag.device, []).append(place)
    found = [False] * len(flags)
    for here in places.values():
        # One kernel for all: a flag that is not one number is rare.
        words = [flags[i] if flags[i].numel() == 1 else flags[i].any() for i in here]
        joined = torch.cat([word.reshape(1).to(torch.int32) for word in words])
        for place, word in zip(here, joined.tolist(), strict=True):
            found[place] = bool(word)
    return found
