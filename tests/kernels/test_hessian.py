import pytest
import torch

from fedspa_kernels import accumulate_hessian_
from fedspa_kernels.hessian import kernel

OPERATORS = ("accumulate_hessian_",)
# The inputs are exact in float32 whatever their dtype; only the order of float32 sums differs.
# 200 products of unit normals sum to about 200 with an error of some 200 · 2^-24 · a few.
ATOL = 1e-3


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize(("leading", "cols"), (((), 24), ((3,), 48), ((2, 3), 24), ((2,), 300)))
def test_adds_the_products_of_the_inputs(place, dtype, leading, cols):
    torch.manual_seed(0)
    inputs, start = torch.randn(*leading, 200, cols).to(dtype), torch.randn(*leading, cols, cols)
    start = start + start.mT
    hessian = start.clone().to(place.device)
    returned = accumulate_hessian_(hessian, inputs.to(place.device), backend=place.backend)
    assert returned is hessian
    exact = start.double() + inputs.double().mT @ inputs.double()
    torch.testing.assert_close(hessian.cpu().double(), exact, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("asked", "dtype", "expected"),
    (
        ("highest", torch.float32, "ieee"),
        ("high", torch.float32, "tf32"),
        ("medium", torch.float32, "tf32"),
        ("high", torch.bfloat16, "ieee"),  # its products are exact in float32 as they are
    ),
)
def test_float32_products_are_exact_unless_torch_was_asked_for_less(asked, dtype, expected):
    class Kernels:
        def accumulate_hessian_(self, hessian, inputs, precision):
            self.precision = precision

    kernels, before = Kernels(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        kernel.by_tiles(kernels, torch.zeros(4, 4), torch.ones(3, 4, dtype=dtype))
    finally:
        torch.set_float32_matmul_precision(before)
    assert kernels.precision == expected


def test_by_hand_a_raw_sum_over_two_batches(place):
    hessian = torch.zeros(2, 2, device=place.device)
    for tokens in ([[1.0, 2.0]], [[3.0, 0.0], [0.0, 1.0]]):
        accumulate_hessian_(
            hessian, torch.tensor(tokens, device=place.device), backend=place.backend
        )
    assert hessian.tolist() == [[10.0, 2.0], [2.0, 5.0]]


@pytest.mark.parametrize("leading", ((), (3,)))
def test_a_non_contiguous_hessian_and_inputs(place, leading):
    storage = torch.zeros(*leading, 16, 16, device=place.device)
    inputs = torch.randn(*leading, 8, 40, device=place.device).mT
    accumulate_hessian_(storage[..., ::2, ::2], inputs, backend=place.backend)
    expected = torch.zeros_like(storage)
    expected[..., ::2, ::2] = inputs.mT @ inputs
    torch.testing.assert_close(storage, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("hessian", "inputs"), (((4, 4), (0, 4)), ((0, 0), (5, 0))))
def test_no_tokens_or_no_columns_change_nothing(place, hessian, inputs):
    start = torch.ones(hessian, device=place.device)
    accumulate_hessian_(start, torch.zeros(inputs, device=place.device), backend=place.backend)
    assert torch.equal(start.cpu(), torch.ones(hessian))
    batched = torch.ones(0, *hessian, device=place.device)
    accumulate_hessian_(
        batched, torch.zeros(0, *inputs, device=place.device), backend=place.backend
    )


def test_autocast_around_the_call_changes_no_bit(place):
    inputs = torch.randn(50, 8, device=place.device)
    plain = accumulate_hessian_(torch.zeros(8, 8).to(place.device), inputs, backend=place.backend)
    with torch.autocast(place.device, dtype=torch.bfloat16):
        inside = accumulate_hessian_(torch.zeros_like(plain), inputs, backend=place.backend)
    assert torch.equal(plain, inside)


@pytest.mark.parametrize(
    ("hessian", "inputs", "sentence"),
    (
        (torch.zeros(3, 3), torch.zeros(5, 4), r"hessian is \(3, 3\) and inputs are \(5, 4\)"),
        (torch.zeros(4, 4), torch.zeros(2, 5, 4), "flattened into tokens"),
        (torch.zeros(4, 4), torch.zeros(4), "flattened into tokens"),
        (torch.zeros(4, 4).half(), torch.zeros(5, 4), "hessian is torch.float16; sum in float32"),
        (torch.zeros(4, 4), torch.zeros(5, 4).double(), "inputs are float64"),
        (torch.zeros(4, 4), torch.zeros(5, 4).long(), "inputs has dtype torch.int64"),
    ),
)
def test_bad_arguments_are_refused_with_their_values(place, hessian, inputs, sentence):
    with pytest.raises(ValueError, match=f"^accumulate_hessian_: .*{sentence}"):
        accumulate_hessian_(
            hessian.to(place.device), inputs.to(place.device), backend=place.backend
        )


@pytest.mark.parametrize("shape", [(1, 5), (2, 1, 5)], ids=str)
def test_one_column_may_have_any_stride(place, shape):
    inputs = torch.ones(shape, device=place.device).mT
    hessian = torch.zeros(*shape[:-2], 1, 1, device=place.device)
    assert (accumulate_hessian_(hessian, inputs, backend=place.backend) == 5).all()
