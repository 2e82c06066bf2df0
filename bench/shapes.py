"""Named real shapes: the linear layers of the OPT, LLaMA-2 and LLaMA-3 models."""

import re
from typing import NamedTuple

from fedspa.planning.known import MODELS, Model, find_model

__all__ = ["MODELS", "SHAPES", "Model", "Shape", "find_model", "find_shape", "layers"]


class Shape(NamedTuple):
    """A weight matrix (rows, cols); `model` and `layer` are "" for one that is only a size."""

    model: str
    layer: str
    rows: int
    cols: int

    @property
    def name(self) -> str:
        """Such as "llama-2-7b.q", or "4096x11008"."""
        return f"{self.model}.{self.layer}" if self.model else f"{self.rows}x{self.cols}"


def layers(model: Model) -> dict[str, Shape]:
    """Return the linear layers of one block of a model, by name."""
    hidden, ffn = model.hidden, model.ffn
    kv = hidden // model.heads * model.kv_heads
    sizes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    if model.family == "llama":
        sizes["gate"] = (ffn, hidden)
    sizes |= {"up": (ffn, hidden), "down": (hidden, ffn)}
    return {layer: Shape(model.name, layer, *size) for layer, size in sizes.items()}


SHAPES = {shape.name: shape for model in MODELS.values() for shape in layers(model).values()}


def find_shape(name: str) -> Shape:
    """Return a layer's shape by its name, such as "llama-2-7b.q", or a size, such as "4096x11008".

    raises: ValueError where it is neither
    """
    if name in SHAPES:
        return SHAPES[name]
    size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if size is None:
        families: dict[tuple[str, ...], list[str]] = {}
        for model in MODELS.values():
            families.setdefault(tuple(layers(model)), []).append(model.name)
        known = "; ".join(f"{', '.join(m)}: .{', .'.join(k)}" for k, m in families.items())
        raise ValueError(
            f"shape {name!r} is not known; pass ROWSxCOLS such as 4096x11008, or MODEL.LAYER, "
            f"from {known}"
        )
    return Shape("", "", int(size[1]), int(size[2]))
