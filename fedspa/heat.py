"""Shares by layer and decoder block, as a grid of tiles: where clients agree, and where not."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from fedspa.charts import GLYPH, HEAT_STEPS, ROLES, bare, shortened
from fedspa.report import LayerResult

MOST_NUMBERED = 12
MOST_LAYER_NAMES = 16


@dataclass(frozen=True)
class Heat:
    """Shares by layer name (rows) and decoder block (columns); nan where there is no layer."""

    names: tuple[str, ...]
    blocks: tuple[int, ...]
    shares: tuple[tuple[float, ...], ...]

    @property
    def known(self) -> list[float]:
        """The shares that are numbers."""
        return [share for row in self.shares for share in row if not math.isnan(share)]

    @property
    def low(self) -> float:
        """The least share."""
        return min(self.known)

    @property
    def high(self) -> float:
        """The largest share."""
        return max(self.known)

    def step(self, share: float) -> int:
        """Which of the HEAT_STEPS equal steps between low and high a share falls in."""
        if self.high - self.low < 1e-12:
            return HEAT_STEPS // 2
        return min(int((share - self.low) / (self.high - self.low) * HEAT_STEPS), HEAT_STEPS - 1)


def heat(layers: Sequence[LayerResult], what: str) -> Heat:
    """Lay out one property of the layers ("intersection", "agreement" or "sparsity") on a grid.

    Where a block has more than 16 names, as with experts, numbers within a name become * and the
    layers of one name are averaged by size.
    """
    plain = dict.fromkeys(layer.layer for layer in layers)
    folded = len(plain) > MOST_LAYER_NAMES
    sums: dict[tuple[str, int], tuple[float, int]] = {}
    for layer in layers:
        name = re.sub(r"\d+", "*", layer.layer) if folded else layer.layer
        total, size = sums.get((name, layer.block), (0.0, 0))
        sums[name, layer.block] = (
            total + getattr(layer, what) * layer.size,
            size + layer.size,
        )
    names = tuple(dict.fromkeys(name for name, _ in sums))
    blocks = tuple(sorted({block for _, block in sums}))
    return Heat(
        names,
        blocks,
        tuple(
            tuple(
                sums[name, block][0] / sums[name, block][1] if (name, block) in sums else math.nan
                for block in blocks
            )
            for name in names
        ),
    )


def heat_figure(grid: Heat) -> Figure:
    """Draw a tile a layer, darker for more; with the number in it where there are few blocks."""
    rows, cols = len(grid.names), len(grid.blocks)
    names = [shortened(name) for name in grid.names]
    left = max(map(len, names)) * GLYPH + 0.2
    wide, high = min(9.4 - left, 0.85 * cols), 0.26 * rows
    width, height = left + wide + 0.2, high + 0.5
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, 0.48 / height, wide / width, high / height))
    for row, shares in enumerate(grid.shares):
        for col, share in enumerate(shares):
            role = "absent" if math.isnan(share) else f"heat{grid.step(share)}"
            axes.broken_barh([(col - 0.47, 0.94)], (row - 0.46, 0.92), color=ROLES[role], lw=0)
            if cols <= MOST_NUMBERED and not math.isnan(share):
                ink = ROLES[f"on-heat{grid.step(share)}"]
                number = f"{100 * share:.1f}"
                axes.text(col, row, number, ha="center", va="center", color=ink, fontsize=8)
    every = math.ceil(cols / 20)
    axes.set_xticks(range(0, cols, every), [str(block) for block in grid.blocks[::every]])
    axes.set_yticks(range(rows), names)
    axes.set_xlim(-0.5, cols - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlabel("decoder block")
    bare(axes)
    return figure
