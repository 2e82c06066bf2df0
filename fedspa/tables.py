"""A report's tables: rows of text, shown in a terminal through rich and in the HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from fedspa.report import ClientResult, Method

CLIENT_HEADINGS = (
    "client",
    "samples",
    "tokens each",
    "capacity",
    "blocks",
    "sparsity %",
    "MB up",
    "MB down",
    "pruning loss",
)


def method_headings(methods: Sequence[Method]) -> list[str]:
    """Name each column of `method_rows`."""
    return [
        "method",
        *domains(methods),
        "geometric mean",
        "sparsity %",
        "MB up",
        "MB down",
    ]


def method_rows(methods: Sequence[Method]) -> list[list[str]]:
    """Make a row a method: name, perplexities and their mean, sparsity, MB a client."""
    return [
        [
            method.name,
            *(perplexity_text(method.perplexity.get(domain)) for domain in domains(methods)),
            perplexity_text(method.geometric_mean),
            f"{100 * method.sparsity:.4f}",
            megabytes(method.bytes_up),
            megabytes(method.bytes_down),
        ]
        for method in methods
    ]


def client_rows(clients: Sequence[ClientResult]) -> list[list[str]]:
    """Make a row a client, under CLIENT_HEADINGS."""
    return [
        [
            client.name,
            f"{client.samples:,}",
            f"{client.seqlen:,}",
            f"{client.capacity:g}",
            blocks_text(client.blocks),
            "–" if math.isnan(client.sparsity) else f"{100 * client.sparsity:.4f}",
            megabytes(client.bytes_up),
            megabytes(client.bytes_down),
            loss_text(client.loss),
        ]
        for client in clients
    ]


def method_table(methods: Sequence[Method], title: str | None = None) -> Table:
    """Show the comparison: perplexity by domain, exact sparsity, MB (10^6 bytes) of a client."""
    return text_table(method_headings(methods), method_rows(methods), title)


def client_table(clients: Sequence[ClientResult], title: str | None = None) -> Table:
    """Show what each client held, pruned and sent."""
    return text_table(CLIENT_HEADINGS, client_rows(clients), title)


def domains(methods: Sequence[Method]) -> list[str]:
    """Every domain that some method was measured on, in the order of their first appearance."""
    return list(dict.fromkeys(domain for method in methods for domain in method.perplexity))


def perplexity_text(perplexity: float | None) -> str:
    """Two decimals up to a thousand, none above; a dash where it was not measured."""
    if perplexity is None or math.isnan(perplexity):
        return "–"
    if math.isinf(perplexity):
        return "∞"
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:,.0f}"


def megabytes(count: int) -> str:
    """Megabytes of 10^6 bytes, with two decimals, or three digits where that is little."""
    size = count / 1e6
    return f"{size:.3g}" if 0 < size < 0.1 else f"{size:,.2f}"


def loss_text(loss: float) -> str:
    """Four digits, grouped where the number is large; a dash where the pruner has no loss."""
    if loss == 0:
        return "–"
    return f"{loss:,.0f}" if 1000 <= loss < 1e9 else f"{loss:.4g}"


def blocks_text(rounds: Sequence[Sequence[int]]) -> str:
    """Spell the blocks by round as ranges, "0–4, 7; 1–5", or count them where that is long."""
    spelled = "; ".join(", ".join(_ranges(sorted(blocks))) or "none" for blocks in rounds)
    if len(spelled) <= 24:
        return spelled
    counts = [len(blocks) for blocks in rounds]
    if len(set(counts)) == 1:
        return f"{counts[0]} a round" if len(counts) > 1 else f"{counts[0]} blocks"
    return f"{min(counts)} to {max(counts)} a round"


def _ranges(blocks: Sequence[int]) -> list[str]:
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return [f"{first}" if first == last else f"{first}–{last}" for first, last in runs]


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str | None) -> Table:
    """Show rows of text under headings: the first column to the left, the others to the right."""
    from rich.table import Table
    from rich.text import Text

    # Narrow enough for 80 columns: headings may break at spaces, and no number is cut short.
    table = Table(
        title=None if title is None else Text(title),
        box=None,
        header_style="bold underline",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for index, heading in enumerate(headings):
        first = index == 0
        text = Text(heading)
        table.add_column(text, justify="left" if first else "right", overflow="fold")
    for row in rows:
        # Text, not str: a client's name may look like rich's markup.
        table.add_row(*map(Text, row))
    return table
