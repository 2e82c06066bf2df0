"""One frozen dataclass holds everything that a run can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from fedspa_kernels.arguments import parse_pattern

AGGREGATIONS = ("l0", "mean", "mask", "statistics")
SCHEDULES = ("one-shot", "synchronous")
EXPANSIONS = ("layer", "row", "column")
WEIGHTINGS = ("uniform", "samples")
RAMPS = ("constant", "linear", "cubic")
MESSAGE_DTYPES = ("float32", "float16", "bfloat16")
STATISTICS_DTYPES = ("float32", "bfloat16", "int64")
PRUNERS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class Settings:
    """What is pruned, how clients agree, and how often; checked when it is made.

    pruner: "magnitude", "wanda", "sparsegpt", or an object of your own (docs/pruners.md).
    sparsity: share of every weight matrix to prune, in [0, 1); exclusive with `pattern`.
    pattern: "n:m" keeps n of every m weights along the input dimension, as in "2:4".
    aggregation: "l0" averages only the weights that clients kept (FedSpaLLM, eq. 4); "mean"
        divides by all clients, zeros included; "mask" uploads the masks alone and prunes the
        pretrained weights by their votes (FedPrLLM); "statistics" adds up what the pruner gathers
        from the layers' inputs, and the server prunes once with the sums.
    schedule: "one-shot" lets each client walk the whole model on its own and upload once a
        round; "synchronous" agrees on each block before the next one is calibrated on it. None:
        "synchronous" for statistics, which then equal pooled data, and "one-shot" for the others.
    synchronize_every: decoder blocks between two exchanges of a synchronous schedule; None: 1.
    rounds: how many times layers are sampled, pruned and averaged.
    ramp: how the sparsity grows over the rounds: "constant" prunes to the target in the first
        round that a block is drawn, "linear" and "cubic" (Zhu and Gupta 2017) in steps.
    layers_per_client: decoder blocks that a client of capacity 1.0 prunes in a round; None: all.
        A client prunes max(1, round(capacity * layers_per_client)) of them.
    every_block: deal the blocks so that each is drawn by at least one client a round.
    expansion: group within which the mask is expanded to the exact target: "layer" (a whole
        weight matrix), "row" or "column".
    scaling: multiply the kept weights by the share of clients that kept them (FedPrLLM); with
        aggregation "mask" only.
    weighting: "uniform", or "samples" to weigh clients by their calibration samples. None:
        "samples" for statistics, whose sums weigh every token alike, and "uniform" for the others.
    participation: share of the clients that take part in a round, in (0, 1]; at least one does.
    dropout: probability, in [0, 1), that a client leaves a round before a block that is drawn
        uniformly; what was exchanged until then counts, and in the next round it is back.
    message_dtype: dtype of the weights in messages; None keeps the model's own.
    statistics_dtype: dtype of the sums that clients send: "float32", "bfloat16", or "int64" for
        fixed point, whose sums are exact: the model is then that of pooled data to the bit, whoever
        holds which window.
    block_size, damping: SparseGPT's columns a block and share of the mean diagonal added to it.
    batch_size: calibration windows in one forward pass; None: by the device (`batches.py`), and 1
        with statistics of int64, which then do not depend on how windows meet in batches.
    seed: of layer sampling; the same seed gives the same bits.

    Raises ValueError with the values and the choices where a setting is impossible.
    """

    pruner: Any = "sparsegpt"
    sparsity: float | None = None
    pattern: str | None = None
    aggregation: str = "l0"
    schedule: str | None = None
    synchronize_every: int | None = None
    rounds: int = 1
    ramp: str = "constant"
    layers_per_client: int | None = None
    every_block: bool = False
    expansion: str = "layer"
    scaling: bool = False
    weighting: str | None = None
    participation: float = 1.0
    dropout: float = 0.0
    message_dtype: str | None = None
    statistics_dtype: str = "float32"
    block_size: int = 128
    damping: float = 0.01
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_target(self.sparsity, self.pattern)
        if isinstance(self.pruner, str):
            _check_choice("pruner", self.pruner, PRUNERS)
        _check_choice("aggregation", self.aggregation, AGGREGATIONS)
        if self.schedule is not None:
            _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("expansion", self.expansion, EXPANSIONS)
        if self.weighting is not None:
            _check_choice("weighting", self.weighting, WEIGHTINGS)
        _check_choice("ramp", self.ramp, RAMPS)
        if self.message_dtype is not None:
            _check_choice("message_dtype", self.message_dtype, MESSAGE_DTYPES)
        _check_choice("statistics_dtype", self.statistics_dtype, STATISTICS_DTYPES)
        for name in ("rounds", "block_size"):
            _check_positive_int(name, getattr(self, name))
        for name in ("batch_size", "layers_per_client", "synchronize_every"):
            if getattr(self, name) is not None:
                _check_positive_int(name, getattr(self, name))
        if not is_number(self.damping) or not 0 <= self.damping < math.inf:
            raise ValueError(f"settings: damping must be 0 or more, not {self.damping!r}")
        if not isinstance(self.seed, int):
            raise ValueError(f"settings: seed must be a whole number, not {self.seed!r}")
        _check_shares(self)
        _check_pattern(self)
        _check_aggregation(self)

    @property
    def walking(self) -> str:
        """The schedule, "one-shot" or "synchronous", also where it was left to the aggregation."""
        return self.schedule or ("synchronous" if self.aggregation == "statistics" else "one-shot")

    @property
    def weighed(self) -> str:
        """The weighting, "uniform" or "samples", also where it was left to the aggregation."""
        return self.weighting or ("samples" if self.aggregation == "statistics" else "uniform")

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain values, for reports; a pruner object by its description.

        What was left to the aggregation has the value that it comes to.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"schedule": self.walking, "weighting": self.weighed}
        if not isinstance(self.pruner, str):
            values["pruner"] = repr(self.pruner)
        return values


def _check_target(sparsity: float | None, pattern: str | None) -> None:
    if (sparsity is None) == (pattern is None):
        raise ValueError(
            f"settings: give exactly one of sparsity and pattern, "
            f"not sparsity={sparsity} and pattern={pattern!r}"
        )
    if sparsity is not None:
        check_sparsity("settings", sparsity)
    if pattern is not None:
        if not isinstance(pattern, str):
            raise ValueError(f"settings: pattern must be a text such as '2:4', not {pattern!r}")
        parse_pattern("settings", pattern, width=0)


def check_sparsity(who: str, sparsity: float) -> None:
    """Raise ValueError unless `sparsity` is a number in [0, 1)."""
    if not is_number(sparsity) or not 0 <= sparsity < 1:
        raise ValueError(
            f"{who}: sparsity {sparsity!r} is outside [0, 1): it is the share of weights to "
            f"prune, such as 0.6 for 60 %"
        )


def is_number(value: object) -> bool:
    """Whether a value is a number, which True and False are not here."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_shares(settings: Settings) -> None:
    share, leaving = settings.participation, settings.dropout
    if not is_number(share) or not 0 < share <= 1:
        raise ValueError(
            f"settings: participation {share!r} is outside (0, 1]; it is the share of clients "
            f"that take part in a round"
        )
    if not is_number(leaving) or not 0 <= leaving < 1:
        raise ValueError(
            f"settings: dropout {leaving!r} is outside [0, 1); it is the probability that a "
            f"client leaves during a round"
        )
    if leaving and settings.every_block:
        raise ValueError(
            f"settings: every_block cannot promise a client for each block while clients leave "
            f"with dropout {leaving}; remove one of the two"
        )


def _check_aggregation(settings: Settings) -> None:
    if settings.synchronize_every is not None and settings.walking == "one-shot":
        raise ValueError(
            f"settings: synchronize_every {settings.synchronize_every} needs schedule "
            f"'synchronous'; 'one-shot' exchanges all blocks at once"
        )
    if not isinstance(settings.scaling, bool):
        raise ValueError(f"settings: scaling must be true or false, not {settings.scaling!r}")
    if settings.scaling and settings.aggregation != "mask":
        raise ValueError(
            f"settings: scaling belongs to aggregation 'mask', not to {settings.aggregation!r}"
        )
    if settings.aggregation != "statistics":
        if settings.statistics_dtype != "float32":
            raise ValueError(
                f"settings: statistics_dtype {settings.statistics_dtype!r} needs aggregation "
                f"'statistics'; {settings.aggregation!r} sends none"
            )
        return
    if settings.pruner == "magnitude":
        raise ValueError(
            "settings: aggregation 'statistics' has nothing to add up for pruner 'magnitude', "
            "which needs no data and no exchange: prune the model once, with any aggregation and "
            "one client; or choose wanda or sparsegpt"
        )
    if settings.weighed != "samples":
        raise ValueError(
            f"settings: weighting {settings.weighting!r} has no meaning with aggregation "
            f"'statistics', whose sums weigh every token alike; leave it out"
        )
    if settings.expansion != "layer":
        raise ValueError(
            f"settings: expansion {settings.expansion!r} has no meaning with aggregation "
            f"'statistics', where nobody votes; leave it at 'layer'"
        )


def _check_pattern(settings: Settings) -> None:
    if settings.pattern is None:
        return
    group = parse_pattern("settings", settings.pattern, width=0)[1]
    if settings.block_size % group:
        raise ValueError(
            f"settings: block_size {settings.block_size} is not a multiple of the {group} of "
            f"pattern {settings.pattern!r}; choose a multiple such as {group * 32}"
        )
    if settings.ramp != "constant":
        raise ValueError(
            f"settings: ramp {settings.ramp!r} needs a sparsity that can grow; with pattern "
            f"{settings.pattern!r} use ramp 'constant'"
        )
    if settings.expansion != "layer":
        raise ValueError(
            f"settings: expansion {settings.expansion!r} has no meaning with pattern "
            f"{settings.pattern!r}, which decides within every {group}; leave it at 'layer'"
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"settings: {name} {value!r} is unknown; choose one of {list(choices)}")


def _check_positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"settings: {name} must be a whole number of at least 1, not {value!r}")
