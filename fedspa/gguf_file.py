"""Models in .gguf files, as transformers dequantises them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

# Loads that overlap share the wrapped functions of `_read_once`, and the last one unwraps them.
_LOCK = threading.Lock()
_READING: list[None] = []
_PLAIN: dict[str, Any] = {}


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """The model of a .gguf file in that dtype, and its tokenizer.

    Raises ValueError where there is no such file, and RuntimeError where a package is missing.
    """
    if not path.is_file():
        raise ValueError(f"model: there is no file {path}")
    try:
        import accelerate  # noqa: F401  (transformers loads GGUF through it)
        import gguf  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"model: reading {path.name} needs the package {error.name}; "
            f"run: pip install 'fedspa[gguf]'"
        ) from error
    folder, name = str(path.parent), path.name
    with _read_once():
        quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # transformers 5.23 marks the dequantised model as quantised and then refuses to save it.
    config = quantised.config
    del config.quantization_config
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.config._name_or_path = path.stem
    return model, tokenizer


@contextmanager
def _read_once() -> Iterator[None]:
    """Let transformers walk through a .gguf file once.

    transformers 5.23 does for the configuration, the weights and the tokenizer, with a vocabulary
    in Python each time, and maps all names anew for every module. For SmolLM2-135M this takes the
    loading from 15 seconds to 6.
    """
    import gguf

    with _LOCK:
        if not _READING:
            for name in ("GGUFReader", "get_tensor_name_map"):
                _PLAIN[name] = getattr(gguf, name)
                setattr(gguf, name, functools.cache(_PLAIN[name]))
        _READING.append(None)
    try:
        yield
    finally:
        with _LOCK:
            _READING.pop()
            if not _READING:
                for name, function in _PLAIN.items():
                    setattr(gguf, name, function)
