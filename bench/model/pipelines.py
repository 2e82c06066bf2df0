"""The same rounds twice: through fedspa, and made of the steps that its peers publish."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.model.drawn import DrawnBlocks, draw_model
from bench.peers import aggregation, sparsegpt, wanda
from bench.shapes import Model
from fedspa.client import propagate
from fedspa.clock import StageClock
from fedspa.data import Client
from fedspa.events import BlockProgress, Event
from fedspa.members import Member, Run
from fedspa.model import layer_weights, linear_layers, set_weights, weight_of
from fedspa.progress import Advance
from fedspa.pruners import make_pruner
from fedspa.rounds import run_round
from fedspa.settings import Settings
from fedspa.walk import Stream, embed, run_block
from fedspa_kernels import pack_mask
from fedspa_kernels.arguments import parse_pattern

# Where a layer stands: its block's index and its name within the block.
Place = tuple[int, str]


@dataclass(frozen=True)
class Job:
    """What both pipelines do: a shape, how many of its blocks, and where."""

    shape: Model
    blocks: int
    settings: Settings
    dtype: torch.dtype
    device: torch.device
    seqlen: int

    def draw(self) -> tuple[nn.Module, DrawnBlocks]:
        """The model, with the weights of its first block."""
        model, blocks = draw_model(
            self.shape, self.blocks, self.seqlen, self.dtype, self.device, self.settings.seed
        )
        blocks[0]
        return model, blocks


@dataclass(frozen=True)
class Outcome:
    """Seconds by stage, and what the checks need.

    bits: of every pruned layer its mask, packed, with how many columns it has; output: what the
    last block as pruned makes of the first batch.
    """

    stages: dict[str, float]
    bits: dict[Place, tuple[Tensor, int]]
    output: Tensor


def fedspa(job: Job, tokens: Sequence[Tensor], advance: Advance) -> Outcome:
    """One round of fedspa as `federate` runs it."""
    model, blocks = job.draw()
    members = [
        Member(Client(windows), f"client {index + 1}") for index, windows in enumerate(tokens)
    ]
    # Every client prunes every block, which the caller counts.
    progress = BlockProgress(job.blocks, 1, {}, tell=lambda event: _count(event, advance))
    run = Run(
        model=model,
        blocks=blocks,
        settings=job.settings,
        pruner=make_pruner(job.settings),
        members=members,
        order=members,
        observe=None,
        clock=StageClock(job.device),
        progress=progress,
        walked=members,
    )
    stages = _timed(lambda: run_round(run, 0), run.clock, blocks)
    bits = {
        (index, name): (layer.bits, layer.shape[1])
        for index in run.agreed
        for name, layer in blocks.masks(index).items()
    }
    return Outcome(stages, bits, _last_output(blocks, members[0].stream))


def _count(event: Event, advance: Advance) -> None:
    if event["event"] == "stage" and event["stage"] == "prune":
        advance(f"block {event['block'] + 1}, {event['client']}")


def peers(job: Job, tokens: Sequence[Tensor], advance: Advance) -> Outcome:
    """The authors' own procedure for every client, then the mean and the expansion as written.

    A window at a time goes through a block whose every linear layer accumulates a statistic of its
    own in float32; the layers are pruned one by one; a second pass makes the next block's inputs.
    """
    model, blocks = job.draw()
    clock = StageClock(job.device)
    streams: list[Stream] = []
    bits: dict[Place, tuple[Tensor, int]] = {}

    def walk() -> None:
        with clock.stage("embed"):
            streams.extend(embed(model, blocks.modules, mine, 1) for mine in tokens)
        for index in range(job.blocks):
            bits.update(_walk_block(job, clock, blocks[index], index, streams, advance))

    stages = _timed(walk, clock, blocks)
    return Outcome(stages, bits, _last_output(blocks, streams[0]))


def _walk_block(
    job: Job,
    clock: StageClock,
    block: nn.Module,
    index: int,
    streams: list[Stream],
    advance: Advance,
) -> dict[Place, tuple[Tensor, int]]:
    """Prune a block for every client, aggregate what they have, and leave that in the block."""
    dense, results = layer_weights(block), []
    for client, stream in enumerate(streams):
        advance(f"block {index + 1}, client {client + 1}, peers")
        with clock.stage("calibrate"):
            statistics = _calibrate(job, block, stream, index)
        with clock.stage("prune"):
            pruned = _prune(job, block, statistics)
            set_weights(block, pruned)
        del statistics
        results.append(pruned)
        if index + 1 < job.blocks:
            with clock.stage("propagate"):
                propagate(block, stream, index)
        if len(streams) > 1:
            set_weights(block, dense)
    with clock.stage("aggregate"):
        agreed = {name: _aggregate(job, [mine[name] for mine in results]) for name in dense}
        set_weights(block, {name: weight for name, (weight, _) in agreed.items()})
    return {(index, name): (pack_mask(mask), mask.shape[1]) for name, (_, mask) in agreed.items()}


@torch.no_grad()
def _calibrate(job: Job, block: nn.Module, stream: Stream, index: int) -> dict[str, Tensor]:
    """Every linear layer's statistic by the authors' running mean, from one pass."""
    step = wanda.add_batch if job.settings.pruner == "wanda" else sparsegpt.add_batch
    axes = 1 if job.settings.pruner == "wanda" else 2
    statistics, handles = {}, []
    for name, layer in linear_layers(block).items():
        cols = weight_of(layer).shape[1]
        statistics[name] = torch.zeros([cols] * axes, device=job.device)
        handles.append(layer.register_forward_hook(_adding(step, statistics[name])))
    for inputs in stream.inputs(index):
        run_block(block, *inputs)
    for handle in handles:
        handle.remove()
    return statistics


def _adding(step: Callable[[Tensor, int, Tensor], int], statistic: Tensor) -> Callable[..., None]:
    samples = 0

    def add(_layer: nn.Module, args: tuple[Any, ...], _output: Tensor) -> None:
        nonlocal samples
        samples = step(statistic, samples, args[0])

    return add


def _prune(job: Job, block: nn.Module, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    sparsity, pattern = job.settings.sparsity, _pattern(job.settings)
    pruned = {}
    for name, weight in layer_weights(block).items():
        statistic = statistics[name]
        if job.settings.pruner == "wanda":
            pruned[name] = wanda.prune(weight, statistic.sqrt(), sparsity, pattern)
        else:
            pruned[name] = sparsegpt.prune(weight, statistic, sparsity, pattern)
    return pruned


def _aggregate(job: Job, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The clients' mean and its mask; one client's weight is what it is."""
    masks = [weight != 0 for weight in weights]
    if len(weights) == 1:
        return weights[0], masks[0]
    mean, votes = aggregation.l0_mean_stacked(weights, masks)
    mask = aggregation.expand_argsort(
        votes, mean.abs(), len(weights), job.settings.sparsity, _pattern(job.settings)
    )
    return mean.masked_fill(~mask, 0), mask


def _pattern(settings: Settings) -> tuple[int, int] | None:
    if settings.pattern is None:
        return None
    return parse_pattern("model bench", settings.pattern, width=0)


def _timed(walk: Callable[[], Any], clock: StageClock, blocks: DrawnBlocks) -> dict[str, float]:
    """Walk, and return the seconds of every stage, of what is between them, and of drawing."""
    before, start = blocks.seconds, time.perf_counter()
    walk()
    stages = clock.seconds()  # waits for a GPU
    whole = time.perf_counter() - start - (blocks.seconds - before)
    stages["other"] = max(0.0, whole - sum(stages.values()))
    return stages | {"build": blocks.seconds}


@torch.no_grad()
def _last_output(blocks: DrawnBlocks, stream: Stream) -> Tensor:
    last = len(blocks) - 1
    return run_block(blocks[last], *next(stream.inputs(last)))


PIPELINES = {"fedspa": fedspa, "peers": peers}
