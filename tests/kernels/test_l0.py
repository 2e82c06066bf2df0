import pytest
import torch

from fedspa_kernels import L0Accumulator, compress, l0_average

OPERATORS = ("l0_average",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Float32 sums of at most 300 numbers of order 1, then the rounding of the result's dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def clients(count, shape=(13, 21), dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(count)
    weights = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    masks = [torch.rand(shape, generator=generator) < 0.4 for _ in range(count)]
    return (
        [
            weight.masked_fill(~mask, 0).to(device)
            for weight, mask in zip(weights, masks, strict=True)
        ],
        [mask.to(device) for mask in masks],
    )


def test_by_hand(place):
    weights = torch.tensor(
        [[2.0, 0.0, 0.0, -1.0], [4.0, 3.0, 0.0, 1.0], [0.0, 0.0, 0.0, 6.0]], device=place.device
    )
    average = l0_average(weights, backend=place.backend)
    assert average.weight.tolist() == [3.0, 3.0, 0.0, 2.0]  # not 2, 1, 0, 2 as a mean would have
    assert average.votes.tolist() == [2, 1, 0, 3] and average.votes.dtype == torch.int32


def test_a_kept_zero_counts_where_masks_say_so_and_other_values_never_count(place):
    weights = [
        torch.tensor([0.0, 5.0, torch.nan], device=place.device),
        torch.tensor([4.0, 5.0, 1.0], device=place.device),
    ]
    masks = torch.tensor([[True, False, False], [True, False, True]], device=place.device)
    average = l0_average(weights, masks, backend=place.backend)
    assert average.weight.tolist() == [2.0, 0.0, 1.0] and average.votes.tolist() == [2, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", (1, 2, 7, 300))
@pytest.mark.parametrize("with_masks", (False, True))
def test_matches_the_quotient_of_sums_in_float64(place, dtype, count, with_masks):
    weights, masks = clients(count, dtype=dtype, device=place.device)
    average = l0_average(weights, masks if with_masks else None, backend=place.backend)
    votes = torch.stack(masks).sum(0)
    if not with_masks:
        votes = torch.stack([weight != 0 for weight in weights]).sum(0)
    expected = torch.stack(weights).double().sum(0) / votes.clamp(min=1)
    assert torch.equal(average.votes, votes.int()) and average.weight.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(average.weight.double(), expected, atol=tolerance, rtol=tolerance)


def test_a_stacked_tensor_is_its_sequence(place):
    weights, masks = clients(5, device=place.device)
    one = l0_average(weights, masks, backend=place.backend)
    two = l0_average(torch.stack(weights), torch.stack(masks), backend=place.backend)
    assert torch.equal(one.weight, two.weight) and torch.equal(one.votes, two.votes)


def test_non_contiguous_clients_and_one_client_are_copied_not_aliased(place):
    weight = torch.randn(8, 6, device=place.device).T
    average = l0_average([weight], backend=place.backend)
    assert torch.equal(average.weight, weight) and average.weight.is_contiguous()
    assert average.weight.data_ptr() != weight.data_ptr()


def test_float64_is_summed_in_float64():
    tiny = torch.tensor([1.0, 1e-12], dtype=torch.float64)
    assert float(l0_average(tiny.view(2, 1)).weight) == 0.5 + 0.5e-12


@pytest.mark.parametrize("shape", ((0, 4), (), (0,)))
def test_empty_and_zero_dimensional_weights(place, shape):
    average = l0_average([torch.ones(shape, device=place.device)] * 2, backend=place.backend)
    assert average.weight.shape == average.votes.shape == shape


@pytest.mark.parametrize(
    ("weights", "masks", "sentence"),
    (
        ([], None, "there are no clients; pass at least one"),
        (torch.zeros(0, 3), None, "there are no clients"),
        ([torch.ones(2), torch.ones(3)], None, r"weight of client 1 is \(3,\)"),
        ([torch.ones(2), torch.ones(2).half()], None, r"client 1 is \(2,\) torch.float16"),
        (
            [torch.ones(2)] * 2,
            [torch.ones(2).bool()],
            "2 weights and 1 masks; pass a mask a client",
        ),
        ([torch.ones(2)], [torch.ones(2)], "mask has dtype torch.float32"),
        ([torch.ones(2)], [torch.ones(1).bool()], r"mask has shape \(1,\) and weight \(2,\)"),
        ([torch.ones(2).int()], None, "weight has dtype torch.int32"),
    ),
)
def test_bad_arguments_are_refused_with_their_values(weights, masks, sentence):
    with pytest.raises(ValueError, match=f"^l0_average: .*{sentence}"):
        l0_average(weights, masks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_masks", (False, True))
def test_the_accumulator_gives_the_bits_of_l0_average(place, dtype, with_masks):
    weights, masks = clients(9, dtype=dtype, device=place.device)
    accumulator = L0Accumulator(weights[0].shape, place.device)
    for weight, mask in zip(weights, masks, strict=True):
        accumulator.add(weight, mask if with_masks else None)
    expected = l0_average(weights, masks if with_masks else None, backend=place.backend)
    average = accumulator.average(dtype)
    assert torch.equal(average.weight, expected.weight)
    assert torch.equal(average.votes, expected.votes) and accumulator.clients == 9


def test_compressed_clients_count_like_dense_ones(place):
    weights, masks = clients(4, device=place.device)
    dense, packed = (L0Accumulator(weights[0].shape, place.device) for _ in range(2))
    for weight, mask in zip(weights, masks, strict=True):
        weight.masked_fill_(weight > 1, 0)  # kept zeros
        dense.add(weight, mask, importance=3)
        packed.add_compressed(compress(weight, mask), importance=3)
    assert torch.equal(dense.votes, torch.stack(masks).sum(0).int())
    assert torch.equal(packed.votes, dense.votes) and torch.equal(packed.total, dense.total)
    assert torch.equal(packed.average().weight, dense.average().weight)


def test_importance_by_hand_weighs_the_mean_and_not_the_votes():
    accumulator = L0Accumulator((3,))
    accumulator.add(torch.tensor([1.0, 2.0, 0.0]))
    accumulator.add(torch.tensor([5.0, 0.0, 0.0]), importance=3)
    assert accumulator.total.tolist() == [16.0, 2.0, 0.0]
    average = accumulator.average()
    assert average.weight.tolist() == [4.0, 2.0, 0.0] and average.votes.tolist() == [2, 1, 0]


def test_averaging_is_a_snapshot():
    accumulator = L0Accumulator((2,))
    accumulator.add(torch.tensor([2.0, 0.0]))
    first = accumulator.average()
    accumulator.add(torch.tensor([4.0, 1.0]))
    assert first.weight.tolist() == [2.0, 0.0] and first.votes.tolist() == [1, 0]
    assert accumulator.average().weight.tolist() == [3.0, 1.0]


def test_an_accumulator_takes_parameters():
    accumulator = L0Accumulator((2,))
    accumulator.add(torch.nn.Parameter(torch.ones(2)))
    assert not accumulator.average().weight.requires_grad


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    (
        ({"weight": torch.ones(3)}, r"weight is \(3,\) and the sum \(2,\)"),
        ({"mask": torch.ones(2)}, "mask has dtype torch.float32"),
        ({"importance": 0.0}, "importance is 0.0; pass a finite number > 0"),
        ({"importance": -1}, "importance is -1"),
        ({"importance": float("nan")}, "importance is nan"),
        ({"importance": float("inf")}, "importance is inf"),
        ({"weight": torch.ones(2).double()}, "weight is float64 and sums are float32"),
    ),
)
def test_a_refused_client_leaves_the_sums_alone(arguments, sentence):
    accumulator = L0Accumulator((2,))
    with pytest.raises(ValueError, match=f"^L0Accumulator: .*{sentence}"):
        accumulator.add(**({"weight": torch.ones(2)} | arguments))
    assert accumulator.clients == 0 and not accumulator.total.any()
    with pytest.raises(ValueError, match="^L0Accumulator: there are no clients"):
        accumulator.average()


def test_votes_of_nobody_average_to_zero_where_subnormals_are_flushed():
    sums = L0Accumulator((4,), "cpu")
    sums.add(torch.arange(1.0, 5), torch.tensor([True, False, True, False]))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    try:
        average = sums.average()
    finally:
        torch.set_flush_denormal(False)
    assert average.weight.tolist() == [1, 0, 3, 0]
