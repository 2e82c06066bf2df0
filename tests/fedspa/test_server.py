"""The server by numbers that can be checked by hand."""

import pytest
import torch

from fedspa.messages import BlockMessage, pack_layer
from fedspa.schedule import Target
from fedspa.server import (
    PART,
    BlockAggregation,
    blocks_per_client,
    pack_block,
    received_weights,
    sample_blocks,
)
from fedspa.settings import Settings

DENSE = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
# Three clients: what each holds after its own pruning.
WEIGHTS = [[2.0, 0.0, 6.0, 0.0], [4.0, 8.0, 0.0, 0.0], [0.0, 4.0, 9.0, 0.0]]


def message(values, sender="c", samples=1, dtype=None, mask_only=False) -> BlockMessage:
    """A block of one layer whose mask is where the values are not zero."""
    weight = torch.tensor([values])
    layer = pack_layer(weight, weight != 0, dtype, mask_only)
    return BlockMessage(sender, 0, 0, samples, {"linear": layer})


def aggregate(settings: Settings, samples=(1, 1, 1), target=None):
    """The three clients' layer after aggregation."""
    sums = BlockAggregation({"linear": DENSE}, settings)
    for values, count in zip(WEIGHTS, samples, strict=True):
        only_mask = settings.aggregation == "mask"
        sums.add(message(values, samples=count, mask_only=only_mask))
    return sums.agree(target or Target(sparsity=settings.sparsity))["linear"]


def test_l0_averages_only_what_was_kept():
    agreed = aggregate(Settings(sparsity=0.25))
    assert agreed.weight.tolist() == [[3.0, 6.0, 7.5, 0.0]]
    assert agreed.mask.tolist() == [[True, True, True, False]]
    assert agreed.histogram == (1, 0, 3, 0)


def test_plain_mean_divides_by_every_client():
    agreed = aggregate(Settings(sparsity=0.25, aggregation="mean"))
    assert agreed.weight.tolist() == [[2.0, 4.0, 5.0, 0.0]]


def test_mask_votes_prune_the_pretrained_weights():
    agreed = aggregate(Settings(sparsity=0.25, aggregation="mask"))
    assert agreed.weight.tolist() == [[10.0, 20.0, 30.0, 0.0]]


def test_among_equal_votes_the_smaller_average_is_expanded_away():
    agreed = aggregate(Settings(sparsity=0.5))
    assert agreed.mask.tolist() == [[False, True, True, False]]
    assert agreed.weight.tolist() == [[0.0, 6.0, 7.5, 0.0]]


def test_fewest_votes_go_before_smaller_weights():
    sums = BlockAggregation({"linear": DENSE}, Settings(sparsity=0.5))
    sums.add(message([1.0, 50.0, 3.0, 0.0]))
    sums.add(message([1.0, 0.0, 3.0, 0.0]))
    agreed = sums.agree(Target(sparsity=0.5))["linear"]
    assert agreed.mask.tolist() == [[True, False, True, False]]
    assert agreed.histogram == (1, 1, 2)


def test_samples_weigh_the_average_and_not_the_votes():
    settings = Settings(sparsity=0.25, weighting="samples")
    agreed = aggregate(settings, samples=(1, 3, 5))
    expected = [[(2 + 12) / 4, (24 + 20) / 8, (6 + 45) / 6, 0.0]]
    torch.testing.assert_close(agreed.weight, torch.tensor(expected))
    assert agreed.histogram == (1, 0, 3, 0)


def test_samples_weigh_the_plain_mean_by_all_samples():
    settings = Settings(sparsity=0.25, weighting="samples", aggregation="mean")
    agreed = aggregate(settings, samples=(1, 3, 5))
    expected = [[14 / 9, 44 / 9, 51 / 9, 0.0]]
    torch.testing.assert_close(agreed.weight, torch.tensor(expected))


def test_a_pattern_keeps_the_most_voted_of_every_group():
    agreed = aggregate(Settings(pattern="2:4"), target=Target(pattern="2:4"))
    assert agreed.mask.tolist() == [[False, True, True, False]]


def test_the_server_holds_no_clients_tensors():
    sums = BlockAggregation({"linear": torch.zeros(64, 64)}, Settings(sparsity=0.5))
    for index in range(50):
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(index))
        layer = pack_layer(weight, weight > 0, None, False)
        sums.add(BlockMessage("c", 0, 0, 1, {"linear": layer}))
    held = [t for t in vars(sums._sums["linear"]).values() if isinstance(t, torch.Tensor)]
    assert sum(t.nbytes for t in held) <= 64 * 64 * 8
    assert sums.clients == 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aggregation", ["l0", "mean", "mask"])
def test_layers_of_many_parts_are_those_of_plain_arithmetic(dtype, aggregation):
    shape = (3, PART // 2 + 5)
    dense = torch.randn(shape, dtype=dtype)
    settings = Settings(sparsity=0.6, aggregation=aggregation, weighting="samples")
    sums = BlockAggregation({"linear": dense}, settings)
    total, shares, votes = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape).int()
    for samples in (1, 2, 4):  # powers of two: no product is rounded
        weight, mask = torch.randn(shape, dtype=dtype), torch.rand(shape) > 0.5
        layer = pack_layer(weight, mask, None, aggregation == "mask")
        sums.add(BlockMessage("c", 0, 0, samples, {"linear": layer}))
        total += samples * torch.where(mask, weight, 0).float()
        shares += samples * mask
        votes += mask
    divisor = {"l0": shares.clamp(min=1), "mean": torch.tensor(7.0)}.get(aggregation)
    average = dense if divisor is None else (total / divisor).to(dtype)
    agreed = sums.agree(Target(sparsity=0.6))["linear"]
    assert torch.equal(agreed.weight, torch.where(agreed.mask, average, 0))
    assert not agreed.weight[~agreed.mask].signbit().any()
    assert agreed.histogram == tuple(torch.bincount(votes.view(-1), minlength=4).tolist())
    assert agreed.kept == int(agreed.mask.sum()) == votes.numel() - -(-votes.numel() * 3 // 5)
    assert torch.equal(sums.dense["linear"], dense)


def test_more_clients_than_a_byte_counts_are_counted():
    sums = BlockAggregation({"linear": DENSE}, Settings(sparsity=0.25))
    for index in range(300):
        sums.add(message([1.0, 2.0, float(index < 256), 0.0]))
    histogram = sums.agree(Target(sparsity=0.25))["linear"].histogram
    assert {votes: n for votes, n in enumerate(histogram) if n} == {0: 1, 256: 1, 300: 2}


def test_messages_of_another_block_are_refused():
    sums = BlockAggregation({"other": DENSE}, Settings(sparsity=0.5))
    with pytest.raises(ValueError, match=r"'c' sent layers \['linear'\].*\['other'\]"):
        sums.add(message([1.0, 2.0, 3.0, 4.0]))
    sums = BlockAggregation({"linear": DENSE.T}, Settings(sparsity=0.5))
    with pytest.raises(ValueError, match=r"shape \(1, 4\).*\(4, 1\)"):
        sums.add(message([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(ValueError, match="nothing to aggregate"):
        BlockAggregation({"linear": DENSE}, Settings(sparsity=0.5)).agree(Target(sparsity=0.5))


def test_bytes_are_the_packed_mask_and_two_bytes_a_kept_weight():
    weight = torch.randn(10, 20)
    mask = torch.zeros(10, 20, dtype=torch.bool)
    mask[:, :7] = True
    assert pack_layer(weight, mask, torch.bfloat16, False).nbytes == 10 * 3 + 70 * 2
    assert pack_layer(weight, mask, torch.bfloat16, True).nbytes == 10 * 3


def test_the_model_holds_no_digit_that_was_not_sent():
    settings = Settings(sparsity=0.25, message_dtype="bfloat16")
    sums = BlockAggregation({"linear": DENSE}, settings)
    sums.add(message([1.2345678, 2.3456789, 3.456789, 0.0]))
    agreed = sums.agree(Target(sparsity=0.25))
    received = received_weights(pack_block(agreed, 0, 0, settings), agreed)["linear"]
    assert torch.equal(received.float(), received.to(torch.bfloat16).float())
    assert not torch.equal(received.float(), agreed["linear"].weight)


@pytest.mark.parametrize(
    ("capacities", "limit", "expected"),
    [
        ((1.0, 0.5, 0.01), None, [12, 6, 1]),
        ((1.0, 0.5, 0.01), 4, [4, 2, 1]),
        ((1.0,), 99, [12]),
    ],
)
def test_capacity_decides_how_many_blocks(capacities, limit, expected):
    assert blocks_per_client(capacities, 12, limit) == expected


def test_sampling_is_without_replacement_uniform_and_seeded():
    counts = [0] * 10
    for seed in range(2000):
        drawn = sample_blocks([3, 1], 10, seed, every_block=False)
        assert [len(set(mine)) for mine in drawn] == [3, 1]
        assert drawn == sample_blocks([3, 1], 10, seed, every_block=False)
        for block in drawn[0]:
            counts[block] += 1
    # 600 expected, standard deviation 20.5: five of them.
    assert all(abs(count - 600) < 103 for count in counts)


def test_every_block_finds_a_client_and_counts_still_hold():
    for seed in range(200):
        drawn = sample_blocks([5, 3, 2, 2], 10, seed, every_block=True)
        assert [len(mine) for mine in drawn] == [5, 3, 2, 2]
        assert all(len(set(mine)) == len(mine) for mine in drawn)
        assert set().union(*drawn) == set(range(10))
    assert any(
        set().union(*sample_blocks([5, 3, 2, 2], 10, seed, every_block=False)) != set(range(10))
        for seed in range(20)
    )


def test_every_block_needs_enough_capacity():
    with pytest.raises(ValueError, match=r"needs clients for 10 blocks.*add up to 9"):
        sample_blocks([5, 4], 10, 0, every_block=True)
