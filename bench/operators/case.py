"""What a bench knows of an operator: inputs, contenders, check, and the least that it has to do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Inputs = dict[str, Any]


class Sizes(NamedTuple):
    """A weight matrix (rows, cols), how many clients have one, and the calibration tokens."""

    rows: int
    cols: int
    clients: int = 8
    tokens: int = 2048


@dataclass(frozen=True)
class Baseline:
    """What an operator is measured against.

    run:     called with the inputs
    why_not: a sentence where it is not here, such as a package that is not installed; else ""
    copies:  how many times the bytes of the inputs it allocates; it is left out where they are more
             than there are, since a CPU's memory ends a process and not a call
    seconds: about how long a call takes, from the sizes and the device type; one that would take
             longer than the bench allows is left out
    """

    run: Callable[[Inputs], Any]
    why_not: Callable[[], str] = lambda: ""
    copies: float = 0
    seconds: Callable[[Sizes, str], float] = lambda sizes, device: 0


@dataclass(frozen=True)
class Case:
    """One way of calling one public operator.

    operator:    its public name
    variant:     what of its arguments matters, such as "row 50 %"
    inputs:      from sizes, dtype and a generator, on whose device they are made
    run:         the operator, with the inputs and a backend (None: the preferred one)
    check:       compares a result with the reference's; returns a sentence on what agrees, or
                 raises WrongResult
    least_bytes: what every implementation reads and writes, from sizes and bytes of an element
    operations:  what every implementation computes, 2 for each multiply-add; 0 where memory bounds
    baselines:   besides the reference backend, which every operator has
    uses:        "clients" and "tokens", where the case depends on them
    writes:      inputs that a call changes: every contender has its own
    rate:        the dtype of the matrix rate that it is compared with; None: that of the inputs
    multiple:    cols must be a multiple of it
    half:        False where nothing depends on the dtype, and float32 stands for all
    door:        the name under which `fedspa_kernels.dispatch` knows it, if not `operator`
    """

    operator: str
    variant: str
    inputs: Callable[[Sizes, torch.dtype, torch.Generator], Inputs]
    run: Callable[[Inputs, str | None], Any]
    check: Callable[[Inputs, Any, Any], str]
    least_bytes: Callable[[Sizes, int], float]
    operations: Callable[[Sizes], float] = lambda sizes: 0
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    rate: torch.dtype | None = None
    multiple: int = 1
    half: bool = True
    door: str = ""

    @property
    def name(self) -> str:
        """Such as "wanda_prune row 50 %"."""
        return f"{self.operator} {self.variant}".strip()
