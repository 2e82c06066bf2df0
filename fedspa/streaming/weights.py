"""The tensors of a model on the meta device: read, put in place by name, and taken away again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedspa.streaming.architecture import Source
from fedspa.streaming.checkpoint import read_into


class Weights:
    """Which tensors of a streamed model are there, and where in the model each belongs.

    Names are those of the model, not of the checkpoint; a tied weight has one.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        """device: where tensors are put. The model's buffers, which are real, go there now."""
        self._source = source
        self._device = device
        self._owners = _owners(source.model)
        for module in source.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def inside(self, prefix: str) -> list[str]:
        """Those of a block."""
        return [name for name in self._source.places if name.startswith(f"{prefix}.")]

    def outside(self, prefixes: Iterable[str], *, head: bool) -> list[str]:
        """Those outside all blocks, with or without what only the head uses."""
        blocks = tuple(f"{prefix}." for prefix in prefixes)
        names = [name for name in self._source.places if not name.startswith(blocks)]
        last = self._source.model.get_output_embeddings()
        return [n for n in names if head or any(o is not last for o, _ in self._owners[n])]

    def ask(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Main memory for tensors, as they are stored; pinned where a GPU will fetch them."""
        pinned = self._device.type == "cuda"
        stored = {
            name: self._source.checkpoint.tensors[self._source.places[name]] for name in names
        }
        return {
            name: torch.empty(place.shape, dtype=place.dtype, pin_memory=pinned)
            for name, place in stored.items()
        }

    def fill(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Read tensors from the checkpoint into what `ask` returned."""
        for name, buffer in buffers.items():
            read_into(self._source.checkpoint, self._source.places[name], buffer)
        return buffers

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as they are stored, in main memory."""
        return self.fill(self.ask(names))

    def moved(self, tensor: Tensor) -> Tensor:
        """A tensor as the model has it: on the device, in the run's dtype."""
        dtype = self._source.dtype if tensor.dtype.is_floating_point else tensor.dtype
        return tensor.to(self._device, non_blocking=True).to(dtype)

    def place(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors into the model, and drop them from the argument one by one."""
        for name in list(tensors):
            tensor = self.moved(tensors.pop(name))
            self._set(name, tensor)

    def free(self, names: Iterable[str]) -> None:
        """Leave parameters on the meta device; buffers are small and stay."""
        for name in names:
            owner, short = self._owners[name][0]
            parameter = owner._parameters.get(short)
            if parameter is not None:
                self._set(name, parameter.detach().to("meta"))

    def _set(self, name: str, tensor: Tensor) -> None:
        first, short = self._owners[name][0]
        if short in first._buffers:
            first._buffers[short] = tensor
            return
        # One object for all owners of a tied weight.
        parameter = nn.Parameter(tensor, requires_grad=False)
        for owner, attribute in self._owners[name]:
            owner._parameters[attribute] = parameter


def _owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """For the first name of every parameter and buffer all modules that hold it, and as what."""
    names: dict[int, str] = {}
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for short, tensor in held.items():
                if tensor is not None:
                    name = names.setdefault(id(tensor), f"{prefix}.{short}" if prefix else short)
                    owners.setdefault(name, []).append((module, short))
    return owners
