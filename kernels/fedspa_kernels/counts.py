"""How many weights a sparsity means: exactly, as the decimal number that was written."""

import math
from fractions import Fraction


def at_most(n: int, sparsity: float) -> int:
    """Return the largest whole number of at most n·sparsity, what a local pruner takes.

    0.29 of 100 are 29, although 0.29 * 100 is 28.999… in binary floating point.
    """
    return math.floor(n * Fraction(repr(float(sparsity))))


def at_least(n: int, sparsity: float) -> int:
    """Return the smallest whole number of at least n·sparsity, what the expansion takes."""
    return math.ceil(n * Fraction(repr(float(sparsity))))
