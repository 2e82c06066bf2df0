"""What `fedspa prune` does: a federation, streamed or held, and what it did to perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fedspa.compare import compare
from fedspa.data import Client
from fedspa.loading import Loaded
from fedspa.output import check_output, complete_folder, result_bytes, write_result
from fedspa.ranks import join
from fedspa.report import Report
from fedspa.run import Surroundings, federate
from fedspa.settings import Settings
from fedspa.streaming.architecture import Source
from fedspa.streaming.federation import federate_streamed


def prune_into(
    out: Path,
    opened: Loaded | Source,
    clients: Sequence[Client],
    settings: Settings,
    around: Surroundings,
    heldout: Mapping[str, Tensor],
    *,
    baselines: bool,
) -> Report | None:
    """Prune an opened model into a new folder; returns the report on the first rank, else None.

    heldout: for every text its evaluation windows (windows, length) int64.
    baselines: measure those of `compare` as well, which needs a model that is held.
    raises: as `run.federate`
    """
    if isinstance(opened, Source):
        with join(around.split, around.device) as ranks:
            report = federate_streamed(
                opened, clients, settings, out, around, ranks, heldout=heldout
            )
            return report if ranks.first else None
    if not heldout:
        with join(around.split, around.device) as ranks:
            report = federate(opened, clients, settings, out=out, surroundings=around, ranks=ranks)
            return report if ranks.first else None
    if around.split is not None:
        raise ValueError(
            "prune: --eval measures a model that is loaded as a whole on one process; leave "
            "--split away, or measure afterwards with fedspa eval"
        )
    check_output(out, result_bytes(opened.model))
    report = compare(
        opened.model, clients, settings, heldout, baselines=baselines, progress=around.progress
    )
    with complete_folder(out) as folder:
        write_result(folder, opened.model, opened.tokenizer, report)
    return report
