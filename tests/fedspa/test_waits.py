"""What a GPU is waited for: a few numbers a block, whatever the number of its layers."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fedspa import Client, Settings, federate
from fedspa_kernels import dispatch

WIDTH, BLOCKS, VOCABULARY = 16, 2, 50
# Each of them reads a number from the device, or needs one for the size of its result.
WAITING = ("_local_scalar_dense", "nonzero", "equal", "bincount", "masked_select", "_unique2")


class Branches(nn.Module):
    """A block of many linear layers, of which pairs share an input."""

    def __init__(self, pairs: int) -> None:
        """Two layers for each pair."""
        super().__init__()
        self.pairs = nn.ModuleList(
            nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(pairs)
        )

    def forward(self, hidden):
        """Each pair after the other."""
        for left, right in self.pairs:
            hidden = hidden + torch.tanh(left(hidden)) * right(hidden)
        return hidden


class Model(nn.Module):
    """Two such blocks."""

    def __init__(self, pairs: int) -> None:
        """Embedding and blocks."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Branches(pairs) for _ in range(BLOCKS))
        self.config = Configuration()

    def get_input_embeddings(self):
        """As transformers' models have it."""
        return self.embedding

    def forward(self, input_ids, use_cache=False):
        """The blocks in turn."""
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Configuration:
    """What fedspa reads of a configuration."""

    num_hidden_layers = BLOCKS

    def get_text_config(self, decoder=False):
        """Itself."""
        return self


def waits(monkeypatch, pairs: int, settings: Settings, clients: int) -> int:
    """How often a whole run waits."""
    count = 0

    def counting(method):
        def call(self, *args, **kwargs):
            nonlocal count
            count += 1
            return method(self, *args, **kwargs)

        return call

    torch.manual_seed(3)
    model = Model(pairs)
    tokens = torch.randint(VOCABULARY, (clients, 3, 8))
    with monkeypatch.context() as patch, profile(activities=[ProfilerActivity.CPU]) as profiled:
        # On a CPU these leave no trace in a profile.
        for name in ("tolist", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
        federate(model, [Client(windows) for windows in tokens], settings)
    operators = {f"aten::{name}" for name in WAITING}
    return count + sum(e.count for e in profiled.key_averages() if e.key in operators)


@pytest.mark.skipif(
    "native" not in dispatch.available("obs_prune", "cpu"),
    reason="the reference checks its values before it computes with them",
)
@pytest.mark.parametrize(
    "settings",
    [
        Settings(sparsity=0.5),
        Settings(pattern="2:4", schedule="synchronous"),
        Settings(pruner="wanda", sparsity=0.5, aggregation="mask"),
        Settings(pruner="magnitude", sparsity=0.5, message_dtype="float16"),
        Settings(sparsity=0.6, rounds=2, ramp="linear", weighting="samples", expansion="row"),
    ],
    ids=("sparsegpt", "pattern", "mask", "float16", "rounds"),
)
def test_waits_do_not_grow_with_the_layers_of_a_block(monkeypatch, settings):
    few, many = (waits(monkeypatch, pairs, settings, clients=2) for pairs in (1, 4))
    assert few == many
    # A block of a client: its statistics, counts and checks, and the server's check of the message;
    # of the server: counts, and checks of votes, messages and weights.
    once, blocks = 10, BLOCKS * settings.rounds
    assert many <= once + blocks * (2 * 5 + 4)
