"""What lasts from block to block: the members of a run, their accounts, and the run itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from fedspa.blocks import Blocks
from fedspa.clock import StageClock
from fedspa.data import Client
from fedspa.events import BlockProgress
from fedspa.messages import BlockMessage, StatisticsMessage
from fedspa.pruners import Pruner
from fedspa.ranks import Ranks, alone
from fedspa.report import BlockResult, LayerResult
from fedspa.settings import Settings
from fedspa.sums import OpenSum, plain_sums
from fedspa.walk import Stream

Observer = Callable[[BlockMessage | StatisticsMessage], None]
Add = Callable[[BlockMessage | StatisticsMessage], None]


@dataclass(eq=False)
class Member:
    """A client in a run, with its hidden states and its account with the server.

    digest: of its data; orders the members, so that float sums do not depend on a list's order.
    tokens: of several ranks that split the samples this one's windows, else all of the client's;
        those of a client elsewhere are on the meta device, where they have nothing but a shape.
    wire_up, wire_down: bytes of whole messages, as a network got them; 0 within one process.
    """

    client: Client
    name: str
    digest: str = ""
    stream: Stream = field(default_factory=lambda: Stream([], {}))
    tokens: Tensor | None = None
    drawn: list[tuple[int, ...]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    wire_up: int = 0
    wire_down: int = 0
    pruned: int = 0
    weights: int = 0
    loss: float = 0.0
    # The round whose version of a block the client holds; it starts with the pretrained model.
    holds: dict[int, int] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Calibration windows, those of all ranks."""
        return self.client.tokens.shape[0]

    @property
    def windows(self) -> Tensor:
        """Calibration windows that this rank walks, (windows, length) int64."""
        return self.client.tokens if self.tokens is None else self.tokens


class Remote(Protocol):
    """Clients that are elsewhere: what they send comes over a network (`fedspa.flower`).

    members: all of them, in the order in which they joined.
    """

    members: list[Member]

    def collect(
        self,
        run: Run,
        block: nn.Module,
        asked: list[Member],
        round_index: int,
        index: int,
        together: range,
        add: Add,
    ) -> None:
        """Add what clients sent of a block, in the order of `asked`, leaving bad messages out.

        block: as it is before this round. together: the blocks that are exchanged with it.
        Raises RuntimeError where too few clients have answered.
        """
        ...

    def blame(
        self, run: Run, block: nn.Module, asked: list[Member], round_index: int, index: int
    ) -> bool:
        """Find the clients for whom the sum of a block's statistics cannot be pruned with.

        returns: whether any was found; `collect` then leaves them out
        """
        ...

    def agreed(self, run: Run, message: BlockMessage) -> dict[str, str]:
        """Take what was agreed on of a block, which clients will get, before it is committed.

        returns: who was left out of the block, and why
        """
        ...

    def sends_back(self, run: Run) -> bool:
        """Whether clients get blocks that were agreed on, so that these lie on the disk."""
        ...

    def finish(self, run: Run) -> None:
        """Give clients what they have not got yet; nothing is asked of them after that."""
        ...


@dataclass
class Run:
    """What lasts from block to block.

    order: the members in the order in which they are aggregated; walked: those of them that this
    rank walks. open_sum: opens the sums of statistics that clients send. agreed: for every block
    that was pruned the round of its last broadcast; sent: its bytes. block_done: called with the
    round and the block that a run could go on behind. remote: clients that are elsewhere.
    """

    model: nn.Module
    blocks: Blocks
    settings: Settings
    pruner: Pruner
    members: list[Member]
    order: list[Member]
    observe: Observer | None
    clock: StageClock
    progress: BlockProgress = field(default_factory=lambda: BlockProgress(1, 1, {}))
    ranks: Ranks = field(default_factory=alone)
    walked: list[Member] = field(default_factory=list)
    agreed: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    layers: list[LayerResult] = field(default_factory=list)
    results: list[BlockResult] = field(default_factory=list)
    block_done: Callable[[int, int], None] | None = None
    open_sum: OpenSum = field(default_factory=lambda: plain_sums("float32"))
    remote: Remote | None = None


def goes_on(run: Run, member: Member, index: int) -> bool:
    """Whether a client still needs its hidden states behind a block."""
    return run.pruner.needs_inputs and index < max(member.drawn[-1], default=-1)
