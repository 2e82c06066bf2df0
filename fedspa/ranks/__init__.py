"""Several processes that prune one model together, on one host or more.

    with join("samples", "cuda") as ranks:      # under torchrun; alone without it
        windows = ranks.mine(windows)           # this rank's part
        ranks.sum_(hessians)                    # the same bits on every rank

Each rank watches the others: where one dies, is killed or raises, all others end within a minute
with a sentence that names it, even out of a collective that hangs; a slow one is waited for.
"""

from fedspa.ranks.group import SPLITS, Ranks
from fedspa.ranks.start import alone, join

__all__ = ["SPLITS", "Ranks", "alone", "join"]
