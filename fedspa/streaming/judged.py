"""What pruning did to perplexity, of models that are never whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from time import perf_counter

import torch
from torch import Tensor

from fedspa.compare import method_name
from fedspa.progress import progress_bar
from fedspa.report import Method, Report
from fedspa.settings import Settings
from fedspa.streaming.activations import Hidden
from fedspa.streaming.architecture import Source, open_source
from fedspa.streaming.blocks import StreamedBlocks
from fedspa.streaming.evaluate import streamed_perplexity
from fedspa.streaming.folder import Folders
from fedspa.walk import Stream


def judge(
    report: Report,
    settings: Settings,
    source: Source,
    folders: Folders,
    heldout: Mapping[str, Tensor],
    device: torch.device,
    place: str,
    *,
    show: bool | None,
) -> Report:
    """The report with the perplexity of the dense model and of the pruned one.

    folders: the output's, whose shards are finished, and the state's, for hidden states.
    heldout: of every text (windows, length) int64. place: where hidden states lie.
    """
    start = perf_counter()
    result = open_source(
        folders.output, str(source.dtype).removeprefix("torch."), None, source.name
    )
    if not isinstance(result, Source):
        raise RuntimeError(f"the pruned model cannot be read again: {result}")
    final = report.final_layers
    share = sum(round(x.sparsity * x.size) for x in final) / int(report.model["prunable"])
    up = round(mean(client.bytes_up for client in report.clients))
    down = round(mean(client.bytes_down for client in report.clients))
    trials = {"dense": (source, 0.0, 0, 0), method_name(settings): (result, share, up, down)}
    methods = []
    steps = len(trials) * (int(report.model["blocks"]) + 1)
    with progress_bar("evaluating", steps, show) as advance:
        for name, (model, sparsity, sent, received) in trials.items():
            found = _perplexity(
                model, heldout, device, place, folders.state, lambda: advance("blocks")
            )
            methods.append(Method(name, found, sparsity, sent, received))
    seconds = report.seconds | {"evaluate": perf_counter() - start}
    return replace(report, methods=tuple(methods), result=methods[-1].name, seconds=seconds)


def _perplexity(
    source: Source,
    heldout: Mapping[str, Tensor],
    device: torch.device,
    place: str,
    folder: Path,
    advance: Callable[[], None],
) -> dict[str, float]:
    blocks = StreamedBlocks(source, device)
    # Only what lies on the disk has files: an evaluation that was killed begins again.
    home = folder if place == "disk" else None
    streams = {
        name: Stream(Hidden(device, place, home, f"judged-{index}"), {})
        for index, name in enumerate(heldout)
    }
    try:
        return streamed_perplexity(source.model, blocks, heldout, streams=streams, advance=advance)
    finally:
        blocks.close()
        for stream in streams.values():
            stream.hidden.clear()
