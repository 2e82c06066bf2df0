"""One configuration through one pipeline: its size beforehand, its checks, its result."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench import memory
from bench.model.drawn import draw_tokens
from bench.model.pipelines import PIPELINES, Job, Outcome
from bench.shapes import find_model, layers
from fedspa.batches import TOKENS
from fedspa.progress import Advance
from fedspa_kernels import unpack_mask
from fedspa_kernels.arguments import parse_pattern
from fedspa_kernels.counts import at_least

# SparseGPT's published threshold takes one weight more in every block of columns.
PEERS_TOLERANCE = 1e-3
# Stages that every block has, and the one that the last block of a model does without.
EVERY_BLOCK = ("calibrate", "prune", "aggregate", "other")
BUT_THE_LAST = "propagate"


def measure(
    pipeline: str, job: Job, samples: int, clients: int, advance: Advance
) -> tuple[dict[str, Any], Outcome]:
    """Run a pipeline, check what it made, and only then return its times, with its masks.

    raises: RuntimeError where what it made is wrong
    """
    tokens = draw_tokens(job.shape, samples, job.seqlen, clients, job.settings.seed)
    gc.collect()

    def run() -> tuple[int | None, Outcome]:
        if job.device.type != "cuda":
            return None, PIPELINES[pipeline](job, tokens, advance)
        torch.cuda.empty_cache()
        return memory.peak(lambda: PIPELINES[pipeline](job, tokens, advance), job.device)

    host, (on_device, outcome) = memory.peak(run, "cpu")
    result = {
        "model": job.shape.name,
        "pipeline": pipeline,
        "pruner": job.settings.pruner,
        "sparsity": job.settings.sparsity,
        "pattern": job.settings.pattern,
        "clients": clients,
        "samples": samples,
        "seqlen": job.seqlen,
        "batch_size": len(outcome.output),
        "dtype": str(job.dtype).removeprefix("torch."),
        "blocks": job.blocks,
        "of_blocks": job.shape.blocks,
        "check": check(pipeline, job, outcome),
        "stages": outcome.stages,
        "peak_bytes": {"host": host, "device": on_device},
        "extrapolated": extrapolate(outcome.stages, job.blocks, job.shape.blocks),
    }
    return result, outcome


def warm_up(pipelines: Sequence[str], job: Job) -> None:
    """On a GPU, compile our kernels at these shapes and let PyTorch load its libraries."""
    if job.device.type != "cuda":
        return
    for pipeline in pipelines:
        # The peers' kernels are PyTorch's, and their loop would take its full time again.
        shape = job.shape if pipeline == "fedspa" else find_model("opt-125m")
        small = replace(job, shape=shape, blocks=1)
        batch = job.settings.batch_size or max(1, TOKENS["cuda"] // job.seqlen)
        tokens = draw_tokens(shape, 2 * batch, job.seqlen, 2, seed=1)
        PIPELINES[pipeline](small, tokens, lambda text: None)


def check(pipeline: str, job: Job, outcome: Outcome) -> str:
    """Say what was checked; RuntimeError where a mask misses the target or an output is not finite.

    fedspa's masks meet the target exactly; the peers' do but for the published rounding.
    """
    if not bool(outcome.output.isfinite().all()):
        raise RuntimeError(f"{pipeline}: the last block's output is not finite; no time is stored")
    for (index, name), (bits, cols) in outcome.bits.items():
        wrong = _missed(pipeline, job, unpack_mask(bits, cols))
        if wrong:
            raise RuntimeError(f"{pipeline}, block {index + 1}, {name}: {wrong}; no time is stored")
    how = "exactly" if pipeline == "fedspa" else f"within {100 * PEERS_TOLERANCE:g} %"
    return f"{len(outcome.bits)} masks meet the target {how}; outputs are finite"


def _missed(pipeline: str, job: Job, mask: Tensor) -> str:
    """How a mask (rows, cols) misses its target, or nothing."""
    exactly = pipeline == "fedspa"
    if job.settings.pattern is not None:
        keep, of = parse_pattern("model bench", job.settings.pattern, mask.shape[1])
        kept = mask.view(-1, of).sum(1)
        good = kept == keep if exactly else kept <= keep
        return "" if bool(good.all()) else f"{int((~good).sum())} groups do not keep {keep} of {of}"
    assert job.settings.sparsity is not None
    pruned = mask.numel() - int(mask.sum())
    wanted = at_least(mask.numel(), job.settings.sparsity)
    room = 0 if exactly else PEERS_TOLERANCE * mask.numel()
    return "" if abs(pruned - wanted) <= room else f"{pruned} weights are pruned, not {wanted}"


def agreement(ours: Outcome, theirs: Outcome) -> tuple[float, float]:
    """Shares of weights that both keep or both prune: in the first block, and in all of them.

    The first block has the very same inputs in both pipelines; later ones what each made of them.
    """
    equal, total = {}, {}
    for place, (bits, cols) in ours.bits.items():
        same = unpack_mask(bits, cols) == unpack_mask(*theirs.bits[place])
        equal[place], total[place] = int(same.sum()), same.numel()
    first = [place for place in total if place[0] == 0]
    share = sum(equal[p] for p in first) / sum(total[p] for p in first)
    return share, sum(equal.values()) / sum(total.values())


def extrapolate(stages: dict[str, float], blocks: int, of_blocks: int) -> dict[str, Any] | None:
    """All blocks' seconds from some blocks'; None from one, which shows no propagation."""
    spent = {stage: seconds for stage, seconds in stages.items() if stage != "build"}
    if blocks == of_blocks:
        return {"seconds": sum(spent.values()), "how": f"measured: all {blocks} blocks"}
    if blocks == 1:
        return None
    times = dict.fromkeys(EVERY_BLOCK, of_blocks / blocks)
    times[BUT_THE_LAST] = (of_blocks - 1) / (blocks - 1)
    return {
        "seconds": sum(seconds * times.get(stage, 1) for stage, seconds in spent.items()),
        "how": f"from {blocks} of {of_blocks} blocks, as if every block took as long: embedding "
        f"once, propagation times {of_blocks - 1}/{blocks - 1}, the rest times "
        f"{of_blocks}/{blocks}; without loading or moving weights",
    }


def expected(job: Job, samples: int, clients: int, pipelines: Sequence[str]) -> tuple[float, float]:
    """Bytes that the larger pipeline will hold, and fedspa's operations (2 a multiply-add).

    The bytes are the embedding, the hidden states before and after a block, what a batch makes
    inside it, statistics, and a block's weights as the model, the clients and the sums hold them.
    """
    shape, each = job.shape, torch.finfo(job.dtype).bits // 8
    matrices = list(layers(shape).values())
    weights = [matrix.rows * matrix.cols for matrix in matrices]
    tokens, block = samples * job.seqlen, sum(weights)
    # Wanda's statistics are vectors, and its pruning is one pass over the weights.
    square = job.settings.pruner != "wanda"
    shared = square * (3 * shape.hidden**2 + shape.ffn**2)
    held = each * (shape.vocabulary * shape.hidden + 2 * tokens * shape.hidden)
    batch = max(job.seqlen * (job.settings.batch_size or 1), TOKENS[job.device.type])
    held += each * min(tokens, batch) * sum(matrix.rows + matrix.cols for matrix in matrices)
    ours = (5 * each + 14) * block + 4 * shared
    theirs = (2 + clients) * each * block + square * 4 * sum(m.cols**2 for m in matrices)
    theirs += max(weights) * (clients * (each + 10) + 32)
    operations = 2 * tokens * (2 * block + shared) * job.blocks
    operations += square * 2 * clients * sum(m.rows * m.cols**2 for m in matrices) * job.blocks
    return held + max(ours, theirs if "peers" in pipelines else 0), operations
