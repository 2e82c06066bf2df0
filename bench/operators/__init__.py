"""What is measured: every public operator, in the ways in which it is called."""

from bench.operators import bitmask, expansion, hessian, l0, obs, obs_shared, selection, wanda
from bench.operators.case import Baseline, Case, Inputs, Sizes

__all__ = [
    "CASES",
    "OPERATORS",
    "Baseline",
    "Case",
    "Inputs",
    "Sizes",
    "find_operator",
]

CASES: tuple[Case, ...] = (
    *hessian.CASES,
    *obs.CASES,
    *obs_shared.CASES,
    *wanda.CASES,
    *l0.CASES,
    *expansion.CASES,
    *selection.CASES,
    *bitmask.CASES,
)
OPERATORS = tuple(dict.fromkeys(case.operator for case in CASES))


def find_operator(name: str) -> tuple[Case, ...]:
    """Return the cases of an operator.

    raises: ValueError where it is not known
    """
    if name not in OPERATORS:
        raise ValueError(f"operator {name!r} is not known; choose from {', '.join(OPERATORS)}")
    return tuple(case for case in CASES if case.operator == name)
