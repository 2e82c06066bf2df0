"""Checks that several operators share at their doors; each raises a sentence with the values."""

import math
import re

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_floats(operator: str, **tensors: Tensor) -> None:
    """Raise ValueError where a tensor is not of one of the four floating dtypes."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{operator}: {name} has dtype {tensor.dtype}; "
                "pass float32, float16, bfloat16 or float64"
            )


def check_mask(operator: str, mask: Tensor, shape: torch.Size) -> None:
    """Raise ValueError where a mask is not bool, or not of the weight's shape."""
    if mask.dtype != torch.bool:
        raise ValueError(f"{operator}: mask has dtype {mask.dtype}; pass bool, True = kept")
    if mask.shape != shape:
        raise ValueError(
            f"{operator}: mask has shape {tuple(mask.shape)} and weight {tuple(shape)}; "
            "pass one mask entry for each weight"
        )


def check_devices(operator: str, **tensors: Tensor | None) -> None:
    """Raise ValueError where tensors lie on different devices."""
    if len({tensor.device for tensor in tensors.values() if tensor is not None}) > 1:
        there = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
        listed = ", ".join(f"{name} on {tensor.device}" for name, tensor in there)
        raise ValueError(f"{operator}: {listed}; move them to one device")


def check_one_of(operator: str, **choices: object) -> None:
    """Raise ValueError unless exactly one of the choices is given."""
    given = [name for name, value in choices.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise ValueError(f"{operator}: got {got}; pass exactly one of {', '.join(choices)}")


def check_sparsity(operator: str, sparsity: float) -> None:
    """Raise ValueError where a sparsity is outside [0, 1); NaN is outside."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"{operator}: sparsity is {sparsity}; pass a number in [0, 1)")


def check_not_negative(operator: str, name: str, value: float) -> None:
    """Raise ValueError where a number is negative or not finite."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{operator}: {name} is {value}; pass a finite number >= 0")


def parse_pattern(operator: str, pattern: str, width: int) -> tuple[int, int]:
    """Return (n, m) of a pattern "n:m": keep n of every m neighbours along a last axis of `width`.

    n = m would prune nothing and n = 0 everything; both are mistakes rather than patterns.
    """
    match = re.fullmatch(r"([0-9]+):([0-9]+)", pattern)
    if match is None:
        raise ValueError(f"{operator}: pattern is {pattern!r}; write it as kept:group, like '2:4'")
    n, m = int(match[1]), int(match[2])
    if not 1 <= n < m:
        raise ValueError(f"{operator}: pattern {pattern!r} keeps {n} of {m}; keep 1 to m - 1 of m")
    if width % m:
        raise ValueError(
            f"{operator}: pattern {pattern!r} does not divide the width {width}; "
            f"pass a width that is a multiple of {m}"
        )
    return n, m
