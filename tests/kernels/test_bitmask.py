import numpy as np
import pytest
import torch

from fedspa_kernels import Compressed, compress, decompress, pack_mask, unpack_mask

OPERATORS = ("pack_mask", "unpack_mask", "compress", "decompress")
FLOAT64_IS_FOR_ALL = True  # values are moved, and not computed with
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WIDTHS = (1, 7, 8, 9, 63, 64, 65, 130)


def random_mask(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(shape[-1])) < 0.5


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("leading", ((), (5,), (2, 3)))
def test_packs_like_numpy_and_back(place, width, leading):
    mask = random_mask(*leading, width)
    bits = pack_mask(mask.to(place.device), backend=place.backend)
    expected = np.packbits(mask.numpy(), axis=-1, bitorder="little")
    assert bits.dtype == torch.uint8 and np.array_equal(bits.cpu().numpy(), expected)
    unpacked = unpack_mask(bits, width, backend=place.backend)
    assert unpacked.dtype == torch.bool and torch.equal(unpacked.cpu(), mask)
    assert bits.is_contiguous() and unpacked.is_contiguous()


def test_large_masks(place):
    mask = random_mask(700, 1001).to(place.device)
    bits = pack_mask(mask, backend=place.backend)
    expected = np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little")
    assert np.array_equal(bits.cpu().numpy(), expected)
    assert torch.equal(unpack_mask(bits, 1001, backend=place.backend), mask)


@pytest.mark.parametrize("shape", ((0,), (3, 0), (0, 9), (0, 0)))
def test_empty_masks_pack_to_empty_bytes(place, shape):
    mask = torch.zeros(shape, dtype=torch.bool, device=place.device)
    bits = pack_mask(mask, backend=place.backend)
    assert bits.shape == (*shape[:-1], (shape[-1] + 7) // 8)
    assert unpack_mask(bits, shape[-1], backend=place.backend).shape == shape
    rebuilt = decompress(compress(mask.float(), mask, backend=place.backend), shape)
    assert rebuilt.shape == shape


def test_non_contiguous_masks_and_bits(place):
    mask = random_mask(40, 60).to(place.device).T[::3]
    bits = pack_mask(mask, backend=place.backend)
    assert torch.equal(bits, pack_mask(mask.contiguous(), backend=place.backend))
    strided = bits.T.contiguous().T
    assert torch.equal(unpack_mask(strided, 40, backend=place.backend), mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_compression_stores_the_kept_values_and_kept_zeros(place, dtype, width):
    mask = random_mask(6, width).to(place.device)
    weight = torch.randint(-2, 3, (6, width), device=place.device).to(dtype)
    compressed = compress(weight, mask, backend=place.backend)
    assert torch.equal(compressed.values, weight[mask]) and compressed.values.dtype == dtype
    assert torch.equal(compressed.bits, pack_mask(mask))
    rebuilt = decompress(compressed, weight.shape, backend=place.backend)
    assert rebuilt.dtype == dtype and torch.equal(rebuilt, torch.where(mask, weight, 0))


@pytest.mark.parametrize("width", (*WIDTHS, 20000))
def test_a_known_count_changes_nothing_and_a_wrong_one_is_refused(place, width):
    mask = random_mask(6, width).to(place.device)
    weight, kept = torch.rand(6, width, device=place.device), int(mask.sum())
    plain = compress(weight, mask, backend=place.backend)
    known = compress(weight, mask, kept=kept, backend=place.backend)
    assert torch.equal(known.bits, plain.bits) and torch.equal(known.values, plain.values)
    for wrong in {kept + 1, max(kept - 1, 0), 0} - {kept}:
        with pytest.raises(ValueError, match=f"^compress: kept is {wrong} and the mask keeps"):
            compress(weight, mask, kept=wrong, backend=place.backend)
    with pytest.raises(ValueError, match="^compress: kept is -1"):
        compress(weight, mask, kept=-1, backend=place.backend)


def test_a_known_count_of_an_empty_mask(place):
    empty = torch.zeros((3, 0), dtype=torch.bool, device=place.device)
    assert compress(empty.float(), empty, kept=0, backend=place.backend).values.shape == (0,)
    with pytest.raises(ValueError, match="^compress: kept is 2, of a mask of 0 entries"):
        compress(empty.float(), empty, kept=2, backend=place.backend)


def test_compression_of_views_is_row_major_and_no_alias(place):
    weight = torch.randn(7, 5, device=place.device).T
    mask = torch.ones(7, 5, dtype=torch.bool, device=place.device).T
    compressed = compress(weight, mask, backend=place.backend)
    assert torch.equal(compressed.values, weight.flatten())
    rebuilt = decompress(compressed, (5, 7), backend=place.backend)
    assert torch.equal(rebuilt, weight)
    assert len({t.data_ptr() for t in (weight, compressed.values, rebuilt)}) == 3


def test_negative_zero_and_nan_survive(place):
    weight = torch.tensor([[-0.0, torch.nan, 1.0]], device=place.device)
    mask = torch.tensor([[True, True, False]], device=place.device)
    rebuilt = decompress(compress(weight, mask, backend=place.backend), (1, 3))
    assert rebuilt[0, 0].signbit() and rebuilt[0, 1].isnan() and rebuilt[0, 2] == 0


BITS = torch.tensor([[0b101], [0b010]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("bits", "n", "sentence"),
    (
        (BITS, 9, r"bits are \(2, 1\), and a mask of \(2, 9\) packs to \(2, 2\)"),
        (BITS, 0, r"packs to \(2, 0\)"),
        (BITS, -1, r"the unpacked shape is \(2, -1\)"),
        (BITS.int(), 3, "bits have dtype torch.int32; pass uint8"),
        (BITS, 2, "a bit beyond the width 2 is set"),
        (BITS[0, 0], 1, "bits has no axis"),
    ),
)
def test_damaged_bits_are_refused(place, bits, n, sentence):
    with pytest.raises(ValueError, match=f"^unpack_mask: .*{sentence}"):
        unpack_mask(bits.to(place.device), n, backend=place.backend)


@pytest.mark.parametrize(
    ("bits", "values", "shape", "sentence"),
    (
        (BITS, torch.ones(2), (2, 3), "the bits keep 3 weights and there are 2 values"),
        (BITS, torch.ones(4), (2, 3), "the bits keep 3 weights and there are 4 values"),
        (BITS, torch.ones(3), (3, 3), r"bits are \(2, 1\), and a mask of \(3, 3\)"),
        (BITS, torch.ones(3), (), r"the unpacked shape is \(\)"),
        (BITS, torch.ones(3), (2, 2), "a bit beyond the width 2 is set"),
        (BITS, torch.ones(3, 1), (2, 3), r"values are \(3, 1\); pass one dimension"),
        (BITS, torch.ones(3).int(), (2, 3), "values has dtype torch.int32"),
        (BITS.bool(), torch.ones(3), (2, 3), "bits have dtype torch.bool"),
    ),
)
def test_a_compressed_weight_that_does_not_fit_is_refused(place, bits, values, shape, sentence):
    compressed = Compressed(bits.to(place.device), values.to(place.device))
    with pytest.raises(ValueError, match=f"^decompress: .*{sentence}"):
        decompress(compressed, shape, backend=place.backend)


def test_what_cannot_be_packed_is_refused(place):
    with pytest.raises(ValueError, match="^pack_mask: mask has dtype torch.float32; pass bool"):
        pack_mask(torch.ones(3, device=place.device), backend=place.backend)
    with pytest.raises(ValueError, match="^pack_mask: mask has no axis to pack along"):
        pack_mask(torch.tensor(True, device=place.device), backend=place.backend)
    weight, mask = torch.ones(3), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^compress: mask has shape \(2,\) and weight \(3,\)"):
        compress(weight, mask)
