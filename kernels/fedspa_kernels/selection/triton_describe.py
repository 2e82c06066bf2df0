"""Every shipped configuration of the selection kernels, described."""

from itertools import product
from typing import Any, NamedTuple

from fedspa_kernels.launch import VECTOR, Compilation, describe
from fedspa_kernels.selection import triton_groups, triton_radix, triton_rows
from fedspa_kernels.selection.triton_keys import (
    MANY_WRAPS,
    NUM_STAGES,
    ONE_ROW,
    ONE_WRAP,
    WIDE_ROWS,
    num_warps,
)

# Kernels of long groups, their threads and, where norms are met, their bound on registers.
ROWS = [(triton_rows.select_rows, triton_rows.THREADS, None)]
RADIX = [
    (triton_radix.count_digits, triton_radix.THREADS, None),
    (triton_radix.count_ties, triton_radix.THREADS, triton_radix.TIES_REGISTERS),
    (triton_radix.mark, triton_radix.THREADS, triton_radix.MARK_REGISTERS),
]


class Way(NamedTuple):
    """How groups lie in the rows of the norms, and how much of it is described.

    common: with sizes that VECTOR divides too, which need less, and every size of a group; else
            every other size
    """

    name: str
    wrap: Any
    norms_of_rows: bool = False
    common: bool = True


# The ways of many wraps and of wide rows hold less without the norms of rows.
NORMS = (
    Way("rows", ONE_ROW),
    Way("columns", ONE_ROW, True, common=False),
    Way("one wrap", ONE_WRAP),
    Way("one wrap in columns", ONE_WRAP, True, common=False),
    Way("many wraps", MANY_WRAPS, True, common=False),
    Way("wide rows", WIDE_ROWS, True, common=False),
)


def describe_selection(
    variant: str,
    *,
    kept: bool,
    values: str | None = None,
    norms: str | None = None,
    votes: str | None = None,
    pruned: str | None = None,
    common: bool = True,
) -> list[Compilation]:
    """Describe the kernels that `select` can launch on entries of these types.

    common: as of Way, for entries without norms
    """
    pointers = {"values": values, "norms": norms, "votes": votes, "pruned": pruned}
    types = {name: pointer for name, pointer in pointers.items() if pointer}
    types |= {"mask": "*i1", "invalid": "*i32"}
    types |= dict.fromkeys(("counts", "state", "ties", "ties_before"), "*i64")
    types |= dict.fromkeys(("groups", "chunks", "n", "k", "width", "clients"), "i32")
    types |= dict.fromkeys(("level", "bits_before", "shift", "bits"), "i32")
    unused: dict[str, Any] = {name: None for name, pointer in pointers.items() if pointer is None}
    described = []
    for way in NORMS if norms else [Way("", ONE_ROW, common=common)]:
        name = f"{variant}, {way.name}" if way.name else variant
        constants = {"WRAP": way.wrap.value, "NORMS_OF_ROWS": way.norms_of_rows, "KEPT": kept}
        constants |= unused
        widths = types | ({"width": "i64"} if way.wrap is WIDE_ROWS else {})
        described += _describe_groups(way, name, widths, constants)
        described += _describe_long(way, bool(norms), name, widths, constants)
    return described


def _describe_groups(
    way: Way, variant: str, types: dict[str, str], constants: dict[str, Any]
) -> list[Compilation]:
    described = []
    for block, rows, threads in triton_groups.CONFIGURATIONS[:: 1 if way.common else 2]:
        name, warps = f"{variant}, {rows} × {block}", num_warps(threads)
        sizes = constants | {"ROWS": rows, "BLOCK": block}
        # VECTOR divides no size of a group that is smaller.
        for odd in (False, True) if way.common and block >= VECTOR else (True,):
            described.append(
                describe(
                    triton_groups.select_groups,
                    name,
                    types,
                    warps,
                    NUM_STAGES,
                    odd_sizes=odd,
                    **sizes,
                )
            )
    return described


def _describe_long(
    way: Way, has_norms: bool, variant: str, types: dict[str, str], constants: dict[str, Any]
) -> list[Compilation]:
    # With norms no group that is one row comes to the radix kernels.
    kernels = ROWS if has_norms and way.wrap is ONE_ROW else ROWS + RADIX
    described = []
    for (kernel, threads, registers), odd in product(kernels, (False, True)):
        if odd or way.common:
            own = {name: constants[name] for name in constants if name in kernel.arg_names}
            bound = registers if has_norms else None
            options = {"maxnreg": bound, "odd_sizes": odd}
            described.append(
                describe(kernel, variant, types, num_warps(threads), NUM_STAGES, **options, **own)
            )
    return described
