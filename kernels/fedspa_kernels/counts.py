"""How many weights a sparsity means: exactly, as the decimal number that was written."""

import math
from collections.abc import Callable
from fractions import Fraction


def at_most(n: int, sparsity: float) -> int:
    """Return the largest whole number of at most n·sparsity, what a local pruner takes.

    0.29 of 100 are 29, although 0.29 * 100 is 28.999… in binary floating point.
    """
    return math.floor(n * Fraction(repr(float(sparsity))))


def of_group(
    n: int,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    rounded: Callable[[int, float], int],
) -> tuple[int, int]:
    """Return the size of a group and how many of it go: of n by sparsity, or m - n of a pattern."""
    if pattern is not None:
        return pattern[1], pattern[1] - pattern[0]
    assert sparsity is not None, "the door lets no call without a sparsity or a pattern through"
    return n, rounded(n, sparsity)


def at_least(n: int, sparsity: float) -> int:
    """Return the smallest whole number of at least n·sparsity, what the expansion takes."""
    return math.ceil(n * Fraction(repr(float(sparsity))))
