"""What federation bought: a federated run beside the baselines that every comparison shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from time import perf_counter

from torch import Tensor, nn

from fedspa.data import Client, pool
from fedspa.evaluate import check_windows, domain_perplexity
from fedspa.messages import BlockMessage, LayerMessage
from fedspa.model import decoder_blocks, layer_weights, set_weights
from fedspa.progress import progress_bar
from fedspa.report import Method, Report, peak_gpu_memory, peak_memory
from fedspa.run import federate
from fedspa.server import BlockAggregation, pack_block
from fedspa.settings import Settings, round_target

METHODS = {"l0": "FedSpaLLM", "mean": "plain mean + expansion", "mask": "FedPrLLM"}
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
    messages: list[BlockMessage] = []
    alone = replace(settings, schedule="one-shot", rounds=1, ramp="constant", aggregation="l0")
    # These send the same messages; all else is pruned once more for the baselines.
    shared = settings in (alone, replace(alone, aggregation="mean"))
    observe = messages.append if baselines and shared else None
    report = federate(model, clients, settings, progress=progress, observe=observe)
    federated: Weights = [layer_weights(block) for block in blocks]
    start = perf_counter()
    trials = [_Trial("dense", lambda: dense, 0.0)]
    result = _Trial(
        method_name(settings),
        lambda: federated,
        _share(report),
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
        plain_mean = _plain_mean(dense, messages, alone, len(clients))
        if result.name != plain_mean.name:
            trials.append(plain_mean)
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
    name = METHODS[settings.aggregation]
    if settings.schedule != "one-shot":
        name += f", {settings.schedule}"
    return name if settings.rounds == 1 else f"{name}, {settings.rounds} rounds"


def _write(blocks: nn.ModuleList, weights: Weights) -> None:
    for block, layers in zip(blocks, weights, strict=True):
        set_weights(block, layers)


def _alone(client: str, dense: Weights, messages: Sequence[BlockMessage]) -> _Trial:
    """A client's own model, with the pretrained weights in blocks that it did not draw."""
    mine = [message for message in messages if message.sender == client]
    layers = [layer for message in mine for layer in message.layers.values()]
    share = _pruned(layers) / _size(dense)
    return _Trial(f"{client} alone", partial(_unpack, dense, mine), share)


def _plain_mean(
    dense: Weights, messages: Sequence[BlockMessage], settings: Settings, clients: int
) -> _Trial:
    """The same messages averaged with their zeros, then expanded."""
    settings = replace(settings, aggregation="mean")
    broadcasts: list[BlockMessage] = []
    returned = 0
    for index, before in enumerate(dense):
        senders = [message for message in messages if message.block == index]
        if senders:
            sums = BlockAggregation(before, settings)
            for message in senders:
                sums.add(message)
            agreed = sums.agree(round_target(settings, 0))
            broadcasts.append(pack_block(agreed, 0, index, settings))
            returned += broadcasts[-1].nbytes * len(senders)
    layers = [layer for message in broadcasts for layer in message.layers.values()]
    share = _pruned(layers) / _size(dense)
    weights = partial(_unpack, dense, broadcasts)
    up = round(sum(message.nbytes for message in messages) / clients)
    return _Trial(METHODS["mean"], weights, share, up, round(returned / clients))


def _centralised(
    model: nn.Module, everything: Client, settings: Settings, clients: int, progress: bool | None
) -> _Trial:
    """All calibration data in one place; a client's upload is then its tokens."""
    settings = replace(settings, layers_per_client=None)
    report = federate(model, [everything], settings, progress=progress)
    weights: Weights = [layer_weights(block) for block in decoder_blocks(model)]
    up = round(everything.tokens.numel() * BYTES_PER_TOKEN / clients)
    return _Trial("centralised", lambda: weights, _share(report), up, report.clients[0].bytes_down)


def _unpack(dense: Weights, messages: Sequence[BlockMessage]) -> Weights:
    """The weights that messages hold, and the dense ones of blocks without a message."""
    sent = {m.block: {name: layer.weight() for name, layer in m.layers.items()} for m in messages}
    return [sent.get(index, before) for index, before in enumerate(dense)]


def _share(report: Report) -> float:
    """The share of all prunable weights that a run pruned, blocks that nobody drew included."""
    return _pruned(report.masks.values()) / int(report.model["prunable"])


def _pruned(layers: Iterable[LayerMessage]) -> int:
    return sum(layer.pruned for layer in layers)


def _size(weights: Weights) -> int:
    return sum(layer.numel() for block in weights for layer in block.values())
