"""How many bytes a computation would hold at its worst moment, found without computing."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

# What models ask of their tokens' masks. Windows carry no padding, so that "all" holds of every
# position, and "any" of none.
ANSWERS = {torch.ops.aten.all.default: True, torch.ops.aten.any.default: False}


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors on the meta device that live inside its `with`.

    live: of now. peak: the most so far. What was there before is to be named by `ignore`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: Any = WeakIdKeyDictionary()

    def ignore(self, tensors: Iterable[Any]) -> None:
        """Do not count these, nor views of them."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ANSWERS:
            return torch.tensor(ANSWERS[func])
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known or not tensor.is_meta:
            return
        self._known[storage] = True
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, nbytes: int) -> None:
        self.live -= nbytes


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels do it: on the meta device it would make the matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """A result laid out as the kernels lay it out, beside what they hold meanwhile."""
    batch, heads, length = query.shape[:3]
    # Sums in float32, and a mask of truth values becomes one of numbers.
    held = [query.new_empty(batch, heads, length, dtype=torch.float32)]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        held.append(query.new_empty(attn_mask.shape))
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


@contextmanager
def metered(there: Iterable[Any]) -> Iterator[Meter]:
    """Count what is made on the meta device inside; `there` are the tensors before it."""
    meter = Meter()
    meter.ignore(there)
    with _FusedAttention(), meter:
        yield meter
