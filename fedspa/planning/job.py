"""What is to be planned: a model, clients, settings, and the machine that is meant for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

import torch

from fedspa.batches import TOKENS, tokens_that_fit
from fedspa.planning.architecture import Architecture
from fedspa.planning.flight import Flight, fly
from fedspa.schedule import exchanged_together, goes_back, message_dtype
from fedspa.settings import Settings

ACTIVATIONS = ("auto", "gpu", "host", "disk")
SPLITS = ("samples", "clients")


@dataclass(frozen=True)
class Job:
    """A run of one round in which every client prunes every block.

    clients, samples, seqlen: `samples` windows of `seqlen` tokens for each client.
    device: "cuda" or "cpu", where blocks are computed. device_memory: bytes of one GPU.
    activations: where hidden states are, one of `ACTIVATIONS`.
    split, ranks: what is divided over how many processes; None and 1.
    process: bytes of main memory that a process takes before it holds a tensor.
    """

    architecture: Architecture
    settings: Settings
    clients: int
    samples: int
    seqlen: int
    device: str
    device_memory: int | None
    activations: str = "auto"
    split: str | None = None
    ranks: int = 1
    process: int = 0

    def __post_init__(self) -> None:
        for name in ("clients", "samples", "seqlen", "ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name} is {getattr(self, name)}; give at least 1")
        if (self.split is None) != (self.ranks == 1):
            raise ValueError(
                f"plan: --split is {self.split} and --ranks {self.ranks}; several ranks need "
                f"--split samples or --split clients, and that needs --ranks of 2 or more"
            )
        if self.activations == "gpu" and self.device == "cpu":
            raise ValueError(
                "plan: --activations gpu with --device cpu; choose auto, host or disk, or --device "
                "cuda"
            )
        most = {"samples": self.samples, "clients": self.clients}.get(self.split or "", self.ranks)
        if self.ranks > most:
            raise ValueError(
                f"plan: --split {self.split} over {self.ranks} ranks leaves some of them without "
                f"work; there are {most} {self.split} to share"
            )
        if self.needs_inputs and self.seqlen > (self.positions or self.seqlen):
            raise ValueError(
                f"plan: --seqlen is {self.seqlen}, and {self.architecture.name} was made for "
                f"{self.positions} positions; take shorter windows"
            )

    @property
    def positions(self) -> int | None:
        """The longest window of the model, None where its configuration names none."""
        return getattr(self.architecture.model.config, "max_position_embeddings", None)

    @property
    def needs_inputs(self) -> bool:
        """Whether clients calibrate at all."""
        return self.settings.pruner != "magnitude"

    @property
    def clients_here(self) -> int:
        """Clients that the busiest rank walks."""
        return ceil(self.clients / self.ranks) if self.split == "clients" else self.clients

    @property
    def samples_here(self) -> int:
        """Windows of a client that the busiest rank walks."""
        return ceil(self.samples / self.ranks) if self.split == "samples" else self.samples

    @property
    def element(self) -> int:
        """Bytes of a weight, and of a number in the hidden states."""
        return self.architecture.dtype.itemsize

    @property
    def sent_element(self) -> int:
        """Bytes of a weight in a message."""
        return (message_dtype(self.settings) or self.architecture.dtype).itemsize

    @cached_property
    def batch(self) -> int:
        """Windows in a forward pass: those of the settings, or as `batches.choose_batch` says."""
        wanted = self.settings.batch_size
        if wanted is None and self.fixed_point:
            wanted = 1
        if wanted is None:
            tokens = TOKENS[self.device]
            if self.device == "cuda":
                assert self.device_memory is not None
                model = self.architecture.model
                tokens = min(tokens, tokens_that_fit(model, self.seqlen, 0, self.device_memory))
            wanted = max(1, tokens // self.seqlen)
        return min(wanted, self.samples_here)

    @cached_property
    def flights(self) -> tuple[Flight, ...]:
        """A batch in a block of every kind, in the order of `architecture.kinds`."""
        return fly(self.architecture, self.batch, self.seqlen)

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states of all clients that one rank walks; 0 without calibration."""
        if not self.needs_inputs:
            return 0
        tokens = self.clients_here * self.samples_here * self.seqlen
        return tokens * self.architecture.width * self.element

    @property
    def held_hidden(self) -> int:
        """Bytes of those that are held at once: twice as many where clients go back."""
        return self.hidden * (2 if self.goes_back else 1)

    @property
    def statistic_square(self) -> bool:
        """Whether a statistic is a matrix, and not a number for each input."""
        return self.settings.pruner == "sparsegpt"

    @property
    def sums_statistics(self) -> bool:
        """Whether clients send statistics, and the server alone prunes."""
        return self.settings.aggregation == "statistics"

    @property
    def fixed_point(self) -> bool:
        """Whether statistics are summed as whole numbers."""
        return self.settings.statistics_dtype == "int64"

    @property
    def sent_statistic_element(self) -> int:
        """Bytes of a number in a client's statistics."""
        dtype: torch.dtype = getattr(torch, self.settings.statistics_dtype)
        return dtype.itemsize

    @property
    def exchanged(self) -> int:
        """Blocks that are exchanged at a time."""
        return exchanged_together(self.settings, self.architecture.block_count)

    @property
    def goes_back(self) -> bool:
        """Whether clients walk blocks once more when they were agreed on."""
        return goes_back(self.settings, self.architecture.block_count)

    @property
    def walks(self) -> float:
        """How often hidden states go through a block, beside calibration: once, or nearly twice."""
        return 2 - 1 / self.exchanged if self.goes_back else 1

    @property
    def message_dtype_differs(self) -> bool:
        """Whether weights are converted on their way."""
        sent = message_dtype(self.settings)
        return sent is not None and sent != self.architecture.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in the run."""
        return self.architecture.dtype
