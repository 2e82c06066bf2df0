"""The text of headings and cells, and Markdown tables made of them."""

import math
from collections.abc import Iterable, Sequence

from fedspa.experiments.results.places import reference
from fedspa.experiments.results.summary import Place, Row, Target
from fedspa.tables import megabytes, perplexity_text

ABSENT = "–"
# MB are 10^6 bytes of one client over the run, seconds are of pruning.
COSTS = ("MB up", "MB down", "exchanges", "seconds")
PARTITION_NAMES = {"domain": "by domain", "iid": "IID"}


def target_text(target: Target) -> str:
    """60 % for 0.6, and a pattern as it is."""
    if target is None:
        return "dense"
    return target if isinstance(target, str) else f"{round(100 * target, 6):g} %"


def partition_text(partition: str | None) -> str:
    """Say who holds what: "IID", "Dirichlet(0.1)", "unequal sizes (1.0)"."""
    name, _, parameter = (partition or "").partition(":")
    if name == "dirichlet":
        return f"Dirichlet({parameter})"
    if name == "sizes":
        return f"unequal sizes ({parameter})"
    return PARTITION_NAMES.get(name, name)


def place_text(place: Place) -> str:
    """Say where: "8 clients, IID, capacities 1, 0.5"."""
    clients = f"{place.clients} client{'' if place.clients == 1 else 's'}"
    return ", ".join(filter(None, [clients, *federation_cells(place)[1:]]))


def federation_cells(place: Place) -> list[str]:
    """The number of clients, the partition, and the capacities where they are not all 1."""
    capacities = ", ".join(f"{capacity:g}" for capacity in place.capacities or ())
    return [
        str(place.clients),
        partition_text(place.partition),
        f"capacities {capacities}" if capacities else "",
    ]


def title(place: Place | None, model: str, *others: str) -> str:
    """A line in bold above a table: the model, where, and what else tells it from others."""
    where = [] if place is None else [place_text(place)]
    return f"**{', '.join(filter(None, [model, *where, *others]))}**"


def paragraphs(parts: Iterable[str]) -> str:
    """Text with one empty line between its parts; "" where all are empty."""
    text = "\n\n".join(part.strip("\n") for part in parts if part)
    return f"{text}\n" if text else ""


def perplexity_cell(row: Row | None) -> str:
    """The mean and its spread; a dash where there is no such case, "failed" where all failed."""
    if row is None:
        return ABSENT
    if not row.seeds:
        return "failed"
    text = value_text(row.mean)
    if math.isnan(row.spread):
        return text
    # As many decimals as the mean has.
    return f"{text} ± " + (f"{row.spread:.2f}" if row.mean < 1000 else f"{row.spread:,.0f}")


def value_text(perplexity: float | None) -> str:
    """A perplexity, where "nan" was measured and a dash was not."""
    if perplexity is not None and math.isnan(perplexity):
        return "nan"
    return perplexity_text(perplexity)


def megabytes_cell(count: float) -> str:
    """MB (10^6 bytes), a dash where nobody counted them."""
    return ABSENT if math.isnan(count) else "0" if count == 0 else megabytes(round(count))


def cost_cells(row: Row) -> list[str]:
    """What COSTS names; of centralised pruning no client sends anything that could be counted."""
    return [
        ABSENT if row.kind == "centralised" else megabytes_cell(row.bytes_up),
        megabytes_cell(row.bytes_down),
        count_cell(row.exchanges, decimals=1),
        count_cell(row.seconds, decimals=1),
    ]


def count_cell(count: float, decimals: int = 0) -> str:
    """A whole number as it is, a mean of several with decimals; a dash where it is not known."""
    if math.isnan(count):
        return ABSENT
    return f"{count:,.0f}" if count == round(count) else f"{count:,.{decimals}f}"


def percent_cell(percent: float, signed: bool = False) -> str:
    """A percentage with one decimal, with two where it is below 1; a dash where it is undefined."""
    if math.isnan(percent):
        return ABSENT
    decimals = 2 if abs(percent) < 1 else 1
    return f"{percent:+,.{decimals}f}" if signed else f"{percent:,.{decimals}f}"


def best_in_bold(rows: Sequence[Row | None]) -> list[str]:
    """Perplexity cells of one column, the least of the federated methods in bold."""
    candidates = [row.mean for row in rows if row is not None and not reference(row)]
    least = min(filter(math.isfinite, candidates), default=None)
    return [
        f"**{perplexity_cell(row)}**"
        if row is not None and not reference(row) and row.mean == least
        else perplexity_cell(row)
        for row in rows
    ]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table whose first `words` columns hold words, and the others numbers."""
    if any(len(row) != len(headings) for row in rows):
        raise ValueError(f"markdown: a row has not the {len(headings)} cells of {list(headings)}")
    ruler = [":--" if column < words else "--:" for column in range(len(headings))]
    lines = [headings, ruler, *rows]
    return "".join(f"| {' | '.join(map(_escaped, line))} |\n" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
