"""What pruners are given: statistics gathered from inputs, and layers that share one."""

import pytest
import torch
from small_models import make_clients, make_model
from torch import nn

from fedspa import Settings, federate
from fedspa.calibration import BlockTask, calibrate
from fedspa.pruners import SparseGPT, Wanda
from fedspa.schedule import Target
from fedspa.walk import Stream


class Experts(nn.Module):
    """A block that calls one of two layers, by what the batch holds, and one layer for all."""

    def __init__(self) -> None:
        """Three linear layers and a count of the passes that came to their end."""
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(8, 8) for _ in range(3))
        self.finished = 0

    def forward(self, hidden):
        """Layers in an order that the input decides."""
        hidden = self.last(hidden)
        for layer in (self.first, self.second) if hidden.flatten()[0] > 0 else (self.second,):
            hidden = layer(hidden)
        self.finished += 1
        return hidden


def test_calibration_ends_a_pass_early_only_where_every_layer_was_called_once():
    torch.manual_seed(0)
    hidden = [torch.randn(1, 4, 8) for _ in range(6)]
    block = Experts()
    with torch.no_grad():
        signs = [bool(block.last(h).flatten()[0] > 0) for h in hidden]
    assert {True, False} == set(signs)
    batches = sorted(zip(signs, hidden, strict=True), key=lambda pair: not pair[0])
    for order in (batches, batches[::-1]):
        block.finished = 0
        stream = Stream([h for _, h in order], {1: [((), {})]})
        task = BlockTask(0, 0, "block", Target(sparsity=0.5))
        statistics = calibrate("c", block, stream, task, SparseGPT()).statistics
        # After a first batch with all three layers, a pass ends with the third of them.
        assert block.finished == (1 + signs.count(False) if order[0][0] else len(order))
        with torch.no_grad():
            for name in ("first", "second"):
                inputs = []
                handle = getattr(block, name).register_forward_pre_hook(
                    lambda _, args, into=inputs: into.append(args[0].reshape(-1, 8))
                )
                for _, h in order:
                    block(h)
                handle.remove()
                rows = torch.cat(inputs)
                torch.testing.assert_close(statistics[name], rows.T @ rows)


@pytest.mark.parametrize("support", [False, True])
@pytest.mark.parametrize("target", [Target(sparsity=0.6), Target(pattern="2:4")])
def test_layers_of_one_statistic_are_pruned_together_as_they_are_alone(support, target):
    torch.manual_seed(1)
    weights = [torch.randn(rows, 16) for rows in (8, 4, 12)]
    inputs, pruner = torch.randn(200, 16), SparseGPT()
    supports = [torch.rand_like(weight) > 0.3 for weight in weights] if support else None
    statistic = pruner.gather(None, inputs)
    together = pruner.prune_shared(weights, statistic, target, supports)
    for index, weight in enumerate(weights):
        mine = supports[index] if support else None
        alone = pruner.prune(weight, statistic, target, mine)
        assert torch.equal(together[index].mask, alone.mask)
        torch.testing.assert_close(together[index].weight, alone.weight)
        torch.testing.assert_close(together[index].loss, alone.loss)


def test_a_pruner_without_prune_shared_is_asked_layer_by_layer():
    class Alone:
        """Wanda, which counts what it is asked."""

        needs_inputs = True

        def __init__(self) -> None:
            self.asked = 0

        def gather(self, statistic, inputs):
            return Wanda().gather(statistic, inputs)

        def prune(self, weight, statistic, target, support):
            self.asked += 1
            return Wanda().prune(weight, statistic, target, support)

    class Together(Alone):
        """The same, which takes layers together."""

        groups = ()

        def prune_shared(self, weights, statistic, target, supports):
            self.groups = (*self.groups, len(weights))
            pairs = zip(weights, supports or [None] * len(weights), strict=True)
            return [Wanda().prune(weight, statistic, target, mine) for weight, mine in pairs]

    alone, together = Alone(), Together()
    models = make_model("llama"), make_model("llama")
    for model, pruner in zip(models, (alone, together), strict=True):
        federate(model, make_clients(1), Settings(pruner=pruner, sparsity=0.5))
    assert alone.asked == 14 and together.asked == 0
    assert together.groups == (3, 1, 2, 1) * 2
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wandas_sums_of_squares_are_float32s_whatever_the_inputs(dtype):
    inputs = torch.randn(1300, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = Wanda().gather(Wanda().gather(None, inputs[:700]), inputs[700:])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), inputs.double().square().sum(0), rtol=1e-6, atol=0)


def test_halves_reach_the_hessian_as_they_are():
    model = make_model("llama", dtype=torch.bfloat16)
    seen = set()

    class Watching(SparseGPT):
        """Notes the dtype of what it is given."""

        def gather(self, statistic, inputs):
            seen.add(inputs.dtype)
            return super().gather(statistic, inputs)

    federate(model, make_clients(1), Settings(pruner=Watching(), sparsity=0.5))
    assert seen == {torch.bfloat16}


class Steps(nn.Module):
    """Calls `first` once or twice, by what the batch holds, and then `last`."""

    def __init__(self) -> None:
        """Two linear layers."""
        super().__init__()
        self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, hidden):
        for _ in range(2 if float(hidden.sum()) > 0 else 1):
            out = self.first(hidden + 0)
        return self.last(out + 0)


def test_a_layer_after_one_that_was_called_twice_still_gathers():
    block = Steps()
    batches = [-torch.ones(1, 3, 4), torch.ones(1, 3, 4)]
    stream = Stream(batches, {1: [((), {})]})
    task = BlockTask(0, 0, "block", Target(0.5, None))
    found = calibrate("a", block, stream, task, Wanda()).statistics
    with torch.no_grad():
        expected = sum(block.first(batch)[0].square().sum(0) for batch in batches)
    torch.testing.assert_close(found["last"], expected)


def test_wandas_statistic_is_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        statistic = Wanda().gather(None, torch.ones(1001, 4, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert statistic.dtype == torch.float32 and statistic.tolist() == [1001] * 4
