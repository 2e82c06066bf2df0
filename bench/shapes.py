"""Named real shapes: the linear layers of the OPT, LLaMA-2 and LLaMA-3 models."""

import re
from typing import NamedTuple


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


def find_model(name: str) -> Model:
    """Return a model by its name.

    raises: ValueError where it is not known
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is not known; choose from {', '.join(MODELS)}")
    return MODELS[name]


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
