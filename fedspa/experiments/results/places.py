"""Where rows belong in tables and pictures: their places, their order, and which stand together."""

from collections.abc import Collection, Iterable, Sequence

from fedspa.experiments.results.summary import STANDALONE, Place, Row, Target
from fedspa.settings import Settings

# What comes first where no order of methods is given.
KINDS = ("dense", "standalone", "federated", "centralised")
PARTITIONS = ("domain", "iid")
# At which tables of one target are shown, where it was measured.
USUAL_TARGET = 0.6


def places(rows: Iterable[Row]) -> list[Place]:
    """Every place of the rows, by model, partition, and number of clients."""
    found = dict.fromkeys(row.place for row in rows if row.clients is not None)
    models = list(dict.fromkeys(place.model for place in found))
    return sorted(
        found,
        key=lambda place: (
            models.index(place.model),
            _partition_rank(place.partition),
            place.clients or 0,
            place.capacities or (),
        ),
    )


def at(rows: Iterable[Row], place: Place) -> list[Row]:
    """The rows that compete at a place, dense and centralised among them."""
    return [
        row
        for row in rows
        if row.model == place.model and (row.clients is None or row.place == place)
    ]


def targets(rows: Iterable[Row]) -> list[float | str]:
    """Every target of the rows: sparsities, then patterns."""
    found = {row.target for row in rows if row.target is not None}
    return sorted(found, key=lambda target: (isinstance(target, str), target))


def methods(rows: Iterable[Row], order: Sequence[str] = ()) -> list[str]:
    """The methods of the rows in the order of the experiment file, what it lacks by kind."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row.method, row)

    def rank(method: str) -> tuple[int, int, int]:
        row = found[method]
        given = list(order).index(row.named) if row.named in order else len(order)
        part = method.removeprefix(f"{row.named}, ")
        return given, KINDS.index(row.kind), STANDALONE.index(part) if part in STANDALONE else 0

    return sorted(found, key=rank)


def families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The plain rows by pruner; what stands in each of them needs no data, or sends masks alone.

    Masks are FedPrLLM, which is compared with the others whatever its clients prune with.
    """
    plain = [row for row in rows if row.plain]
    shared = [row for row in plain if row.kind == "dense" or row.pruner == "magnitude"]
    pruners = dict.fromkeys(row.pruner for row in plain if row not in shared)
    names = sorted(pruners, key=lambda name: (name != Settings.pruner, name))
    if not names and shared:
        return {"magnitude": shared}
    everywhere = [row for row in plain if row in shared or row.aggregation == "mask"]
    return {
        name: [row for row in plain if row.pruner == name or row in everywhere] for name in names
    }


def grid_and_world(rows: Iterable[Row]) -> tuple[list[Place], list[Place]]:
    """The places with several targets, and those that were measured at a single one.

    Where no place has several targets, all of them are the grid.
    """
    competing = [row for row in rows if row.plain and row.clients is not None]
    found = places(competing)
    several = [
        place for place in found if len(targets(row for row in competing if row.place == place)) > 1
    ]
    return (several, [place for place in found if place not in several]) if several else (found, [])


def usual_target(rows: Iterable[Row]) -> Target:
    """The target that tables of one target are made at: USUAL_TARGET, or else the middle one."""
    found = targets(rows)
    if USUAL_TARGET in found or not found:
        return USUAL_TARGET if found else None
    return found[(len(found) - 1) // 2]


def competitions(
    rows: Sequence[Row], pruners: Collection[str] | None = None
) -> list[tuple[str, Place, list[Row]]]:
    """Every place of the grid with the rows that compete there, pruner by pruner.

    pruners: of these alone; None: of all
    """
    grid = grid_and_world(rows)[0]
    return [
        (pruner, place, at(family, place))
        for pruner, family in families(rows).items()
        if pruners is None or pruner in pruners
        for place in grid
        if any(row.place == place for row in family)
    ]


def find(rows: Iterable[Row], method: str, target: Target) -> Row | None:
    """The row of a method at a target, or at any where the method is dense."""
    for row in rows:
        if row.method == method and (row.target == target or row.kind == "dense"):
            return row
    return None


def reference(row: Row) -> bool:
    """Whether it is shown for comparison, and no federation that could be best."""
    return row.kind != "federated"


def _partition_rank(partition: str | None) -> tuple[int, str, float]:
    """As PARTITIONS has it; others by name, and by number where they have one."""
    text = partition or ""
    name, _, parameter = text.partition(":")
    first = PARTITIONS.index(text) if text in PARTITIONS else len(PARTITIONS)
    try:
        return first, name, float(parameter or 0)
    except ValueError:
        return first, text, 0.0
