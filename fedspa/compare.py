"""What federation bought: a federated run beside the baselines that every comparison shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from statistics import mean
from time import perf_counter
from typing import Any

from torch import Tensor, nn

from fedspa.data import Client, pool
from fedspa.evaluate import check_windows, domain_perplexity
from fedspa.messages import BlockMessage, LayerMessage
from fedspa.model import decoder_blocks, layer_weights, set_weights
from fedspa.progress import progress_bar
from fedspa.report import Method, Report, peak_gpu_memory, peak_memory
from fedspa.run import federate
from fedspa.schedule import round_target
from fedspa.server import BlockAggregation, pack_block
from fedspa.settings import Settings

METHODS = {
    "l0": "FedSpaLLM",
    "mean": "plain mean + expansion",
    "mask": "FedPrLLM",
    "statistics": "statistics",
}
# What a client would upload if its tokens could leave it: 32 bits hold every vocabulary.
BYTES_PER_TOKEN = 4
Weights = list[dict[str, Tensor]]


def compare(
    model: nn.Module,
    clients: Sequence[Client],
    settings: Settings,
    heldout: Mapping[str, Tensor],
    *,
    baselines: bool = True,
    progress: bool | None = None,
) -> Report:
    """Run a federation and measure its perplexity; the model ends as the federation pruned it.

    heldout: for every domain its evaluation windows, (windows, length) int64.
    baselines: beside the dense model and the federation's also every client's own model, the
        plain mean + expansion of these, and all calibration data in one place. The first two
        are of one one-shot round, which is run besides where the federation is something else.
    returns: the federation's report, with one `Method` for each of these.
    raises: ValueError as `federate` does, and for evaluation windows that the model cannot read.
    """
    check_windows(model, heldout)
    everything = pool(clients, name="centralised") if baselines else None
    blocks = decoder_blocks(model)
    dense: Weights = [layer_weights(block) for block in blocks]
    messages: list[Any] = []
    alone = replace(
        settings,
        aggregation="l0",
        schedule="one-shot",
        synchronize_every=None,
        rounds=1,
        ramp="constant",
        participation=1.0,
        dropout=0.0,
        scaling=False,
        weighting=None if settings.aggregation == "statistics" else settings.weighting,
        statistics_dtype="float32",
    )
    # These send the same messages; all else is pruned once more for the baselines.
    plain = replace(alone, aggregation="mean")
    shared = settings.to_dict() in (alone.to_dict(), plain.to_dict())
    observe = messages.append if baselines and shared else None
    report = federate(model, clients, settings, progress=progress, observe=observe)
    federated: Weights = [layer_weights(block) for block in blocks]
    start = perf_counter()
    trials = [_Trial("dense", lambda: dense, 0.0)]
    result = _Trial(
        method_name(settings),
        lambda: federated,
        pruned_share(report),
        round(mean(client.bytes_up for client in report.clients)),
        round(mean(client.bytes_down for client in report.clients)),
    )
    if everything is None:
        trials.append(result)
    else:
        _write(blocks, dense)
        if observe is None:
            federate(model, clients, alone, progress=progress, observe=messages.append)
            _write(blocks, dense)
        centralised = _centralised(model, everything, alone, len(clients), progress)
        trials += [_alone(client.name, dense, messages) for client in report.clients]
        if settings.to_dict() != plain.to_dict():
            trials.append(_plain_mean(dense, messages, plain, len(clients)))
        trials += [result, centralised]
    pruned = perf_counter()
    methods = _evaluate(model, trials, heldout, progress)
    _write(blocks, federated)
    seconds = {"baselines": pruned - start, "evaluate": perf_counter() - pruned}
    return replace(
        report,
        methods=methods,
        result=result.name,
        seconds=report.seconds | seconds,
        peak_memory=peak_memory(),
        peak_gpu_memory=peak_gpu_memory(),
    )


@dataclass(frozen=True)
class _Trial:
    """Weights to evaluate, their sparsity, and the bytes that a client sent and got.

    weights: makes them when their turn comes, so that few models are in memory at a time.
    """

    name: str
    weights: Callable[[], Weights]
    sparsity: float
    up: int = 0
    down: int = 0


def _evaluate(
    model: nn.Module, trials: list[_Trial], heldout: Mapping[str, Tensor], progress: bool | None
) -> tuple[Method, ...]:
    """Measure one after the other; the model is left with the last one's weights."""
    windows = sum(len(cut) for cut in heldout.values())
    methods = []
    with progress_bar("evaluating", windows * len(trials), progress) as advance:
        for trial in trials:
            _write(decoder_blocks(model), trial.weights())
            found = domain_perplexity(model, heldout, advance=partial(advance, trial.name))
            methods.append(Method(trial.name, found, trial.sparsity, trial.up, trial.down))
    return tuple(methods)


def method_name(settings: Settings) -> str:
    """What the federation of these settings is called in a comparison."""
    parts = [METHODS[settings.aggregation]]
    usual = replace(settings, schedule=None, synchronize_every=None).walking
    if settings.synchronize_every not in (None, 1):
        parts.append(f"every {settings.synchronize_every} blocks")
    elif settings.walking != usual:
        parts.append(settings.walking)
    if settings.rounds > 1:
        parts.append(f"{settings.rounds} rounds")
    if settings.scaling:
        parts.append("scaled")
    if settings.participation < 1:
        parts.append(f"{settings.participation:.0%} present")
    if settings.dropout:
        parts.append(f"{settings.dropout:.0%} leaving")
    return ", ".join(parts)


def _write(blocks: nn.ModuleList, weights: Weights) -> None:
    for block, layers in zip(blocks, weights, strict=True):
        set_weights(block, layers)


def _alone(client: str, dense: Weights, messages: Sequence[BlockMessage]) -> _Trial:
    """A client's own model, with the pretrained weights in blocks that it did not draw."""
    mine = [message for message in messages if message.sender == client]
    layers = [layer for message in mine for layer in message.layers.values()]
    share = _pruned(layers) / _size(dense)
    return _Trial(f"{client} alone", partial(unpack, dense, mine), share)


def _plain_mean(
    dense: Weights, messages: Sequence[BlockMessage], settings: Settings, clients: int
) -> _Trial:
    """The same messages averaged with their zeros, then expanded."""
    broadcasts = aggregate_again(dense, messages, settings)
    layers = [layer for message in broadcasts for layer in message.layers.values()]
    share = _pruned(layers) / _size(dense)
    weights = partial(unpack, dense, broadcasts)
    up = round(sum(message.nbytes for message in messages) / clients)
    down = mean_download(messages, broadcasts, clients)
    return _Trial(METHODS["mean"], weights, share, up, down)


def mean_download(
    messages: Iterable[BlockMessage], broadcasts: Iterable[BlockMessage], clients: int
) -> int:
    """Bytes that a client gets in the mean: what was agreed goes to those who sent its block."""
    senders = Counter(message.block for message in messages)
    returned = sum(message.nbytes * senders[message.block] for message in broadcasts)
    return round(returned / clients)


def aggregate_again(
    dense: Weights, messages: Sequence[BlockMessage], settings: Settings
) -> list[BlockMessage]:
    """What the server would send back under other settings of its own.

    dense: for every block its weights before the round, by layer (rows, cols).
    messages: of one one-shot round, those of a block in the order of aggregation; with aggregation
        "mask" only their masks are read.
    settings: of which aggregation (but not "statistics"), expansion, scaling, weighting,
        message_dtype and the target count.
    returns: a message for every block that was sent, by block.
    """
    target = round_target(settings, 0)
    broadcasts = []
    # Sorting keeps the order within a block.
    for block, sent in groupby(sorted(messages, key=_block), key=_block):
        sums = BlockAggregation(dense[block], settings)
        for message in sent:
            sums.add(message)
        broadcasts.append(pack_block(sums.agree(target), 0, block, settings))
    return broadcasts


def _block(message: BlockMessage) -> int:
    return message.block


def _centralised(
    model: nn.Module, everything: Client, settings: Settings, clients: int, progress: bool | None
) -> _Trial:
    """All calibration data in one place; a client's upload is then its tokens."""
    # On the agreed block, as sums of statistics are: with one client nothing else is exchanged.
    settings = replace(settings, layers_per_client=None, schedule="synchronous")
    report = federate(model, [everything], settings, progress=progress)
    weights: Weights = [layer_weights(block) for block in decoder_blocks(model)]
    up = round(everything.tokens.numel() * BYTES_PER_TOKEN / clients)
    return _Trial(
        "centralised", lambda: weights, pruned_share(report), up, report.clients[0].bytes_down
    )


def unpack(dense: Weights, messages: Iterable[BlockMessage]) -> Weights:
    """The weights that messages hold, and the dense ones of blocks without a message.

    A mask alone keeps the dense weights.
    """
    sent = {
        message.block: {
            name: layer.received(dense[message.block][name])
            for name, layer in message.layers.items()
        }
        for message in messages
    }
    return [sent.get(index, before) for index, before in enumerate(dense)]


def pruned_share(report: Report) -> float:
    """The share of all prunable weights that a run pruned, blocks that nobody drew included."""
    return _pruned(report.masks.values()) / int(report.model["prunable"])


def _pruned(layers: Iterable[LayerMessage]) -> int:
    return sum(layer.pruned for layer in layers)


def _size(weights: Weights) -> int:
    return sum(layer.numel() for block in weights for layer in block.values())
