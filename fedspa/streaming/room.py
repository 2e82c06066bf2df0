"""Where a streamed run has room: memory for its hidden states, and the disk for what it writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from fedspa.machine import memory_free
from fedspa.members import Run
from fedspa.model import linear_layers, weight_of
from fedspa.schedule import goes_back, opened_again
from fedspa.streaming.architecture import Source
from fedspa.streaming.placement import FILES, choose_placement
from fedspa.streaming.shards import output_bytes


def choose_place(wanted: str, run: Run, dtype: torch.dtype, folder: Path) -> str:
    """Where the hidden states of all members that this rank walks lie, see `choose_placement`.

    Raises RuntimeError where there is too little memory for the work on a block, or for them.
    """
    device = run.blocks.device
    work = block_work(run)
    gpu_free, host_free = 0, memory_free()
    if device.type == "cuda":
        gpu_free = _beside(work, torch.cuda.mem_get_info(device)[0], "GPU memory")
    elif host_free:
        host_free = _beside(work, host_free, "main memory")
    disk_free = shutil.disk_usage(folder).free
    hidden = held_versions(run) * hidden_bytes(run, dtype)
    return choose_placement(wanted, hidden, device, gpu_free, host_free, disk_free)


def _beside(work: int, free: int, what: str) -> int:
    """What is free beside the work on one block; raises RuntimeError where that does not fit."""
    if work > free:
        raise RuntimeError(
            f"one block of this model takes about {work / 1e9:.1f} GB of {what} to prune, and "
            f"{free / 1e9:.1f} GB are free; free some, take a larger machine, or ask fedspa plan "
            f"what fits, such as --pruner wanda"
        )
    return free - work


def hidden_bytes(run: Run, dtype: torch.dtype) -> int:
    """Bytes of the hidden states between two blocks, of all members that this rank walks."""
    if not run.pruner.needs_inputs:
        return 0
    config: Any = run.model.config
    width = config.get_text_config(decoder=True).hidden_size
    tokens = sum(member.windows.numel() for member in run.walked)
    return tokens * width * dtype.itemsize


def held_versions(run: Run) -> int:
    """Hidden states that are held at once: two where clients go back to walk blocks once more."""
    return 2 if goes_back(run.settings, len(run.blocks)) else 1


def block_work(run: Run) -> int:
    """About what one block takes where it is computed: weights, sums, statistics and factors."""
    blocks = [linear_layers(block).values() for block in run.blocks.modules]
    weights = max(sum(weight_of(layer).numel() for layer in layers) for layers in blocks)
    widest = max(weight_of(layer).shape[1] for layers in blocks for layer in layers)
    square = run.settings.pruner == "sparsegpt"
    statistics = 4 * 4
    if run.settings.aggregation == "statistics":
        # Triangles of the sum and of a message; in fixed point all of these take twice as much.
        statistics += 2 * 4
        if run.settings.statistics_dtype == "int64":
            statistics *= 2
    # Bytes a weight: itself, a client's and the message's, at most 4 each; the sum and the votes, 4
    # each; two masks. Of a statistic its matrix, the factor and what that is made with.
    return weights * (3 * 4 + 2 * 4 + 2) + square * statistics * widest**2


def disk_bytes(run: Run, source: Source) -> int:
    """Bytes that the output and the state take on the disk, hidden states of all ranks included."""
    layers = [weight_of(x) for block in run.blocks.modules for x in linear_layers(block).values()]
    masks = sum(weight.numel() for weight in layers) // 8
    journaled = 0
    if opened_again(run.settings, len(run.blocks)):
        journaled = sum(weight.numel() for weight in layers) * source.dtype.itemsize
    files = FILES + held_versions(run) - 1
    hidden = files * hidden_bytes(run, source.dtype) * run.ranks.size
    if run.remote is not None:
        # What is sent back, in two versions with several rounds, and what arrives of a block.
        weights = sum(weight.numel() for weight in layers) * source.dtype.itemsize
        journaled += run.remote.sends_back(run) * weights * min(2, run.settings.rounds)
        journaled += len(run.order) * weights // len(run.blocks)
    # The masks of single blocks are merged into one file at the end.
    return output_bytes(source.checkpoint, source.written) + 2 * masks + journaled + hidden
