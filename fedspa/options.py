"""Options that several commands have, and the settings that they come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from fedspa import config
from fedspa.settings import (
    AGGREGATIONS,
    EXPANSIONS,
    MESSAGE_DTYPES,
    PRUNERS,
    RAMPS,
    SCHEDULES,
    STATISTICS_DTYPES,
    WEIGHTINGS,
    Settings,
)

DEFAULT_SPARSITY = 0.5
DEMO_SPARSITY = 0.6
SEED = click.IntRange(0, 2**63 - 1)
COUNT = click.IntRange(1)


def all_of(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Several decorators as one, in the order in which they would stand above a command."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


common = all_of(
    click.option("--seed", type=SEED, default=0, help="Of every random choice."),
    click.option("--device", default="cpu", help='Such as "cuda".'),
    click.option("--dtype", default="auto", help="Weights in memory."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option("--quiet", is_flag=True, help="No progress and no tables."),
    click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=config.read_config,
        help="A TOML file that holds any of these options, and [[client]] tables.",
    ),
)

method = all_of(
    click.option("--pruner", type=click.Choice(PRUNERS), default="sparsegpt"),
    click.option("--sparsity", type=float, help=f"Share to prune.  [default: {DEFAULT_SPARSITY}]"),
    click.option("--pattern", help='Keep n of every m instead, such as "2:4".'),
    click.option("--aggregation", type=click.Choice(AGGREGATIONS), default="l0"),
    click.option(
        "--schedule",
        type=click.Choice(SCHEDULES),
        help="[default: one-shot; synchronous with statistics]",
    ),
    click.option("--synchronize-every", type=COUNT, help="Blocks between two exchanges."),
    click.option("--rounds", type=COUNT, default=1, help="Rounds of pruning and averaging."),
    click.option("--ramp", type=click.Choice(RAMPS), default="constant"),
    click.option("--layers-per-client", type=COUNT, help="Blocks of a client of capacity 1."),
    click.option("--every-block", is_flag=True, help="Deal blocks so that none is left out."),
    click.option("--expansion", type=click.Choice(EXPANSIONS), default="layer"),
    click.option("--scaling", is_flag=True, help="FedPrLLM's, with --aggregation mask."),
    click.option("--weighting", type=click.Choice(WEIGHTINGS), help="Of clients in averages."),
    click.option("--participation", type=float, default=1.0, help="Share of clients a round."),
    click.option("--dropout", type=float, default=0.0, help="Share that leaves in a round."),
    click.option("--message-dtype", type=click.Choice(MESSAGE_DTYPES), help="Weights in messages."),
    click.option("--statistics-dtype", type=click.Choice(STATISTICS_DTYPES), default="float32"),
    click.option("--block-size", type=COUNT, default=128, help="SparseGPT's columns."),
    click.option("--damping", default=0.01, help="SparseGPT's damping."),
    click.option("--batch-size", type=COUNT, help="Windows in a forward pass; else by the device."),
)


def settings_of(options: dict[str, Any], sparsity: float, **defaults: Any) -> Settings:
    """The settings among a command's options, with the command's own defaults."""
    values = {f.name: options[f.name] for f in fields(Settings)}
    for name, default in defaults.items():
        if values[name] is None:
            values[name] = default
    if values["sparsity"] is None and values["pattern"] is None:
        values["sparsity"] = sparsity
    return Settings(**values)
