"""What holds for every operator as a PyTorch operator."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fedspa_kernels
from fedspa_kernels import dispatch

OPERATORS = ("smallest_mask",)
WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
MASK = WEIGHT > 0
NORMS = torch.arange(1.0, 9.0)
HESSIAN = torch.eye(8) + 0.1
VOTES = MASK.int() + (WEIGHT > 1).int()
BITS = torch.tensor([[5], [255]], dtype=torch.uint8)

CALLS = [
    ("smallest_mask", (WEIGHT, 3), {}),
    ("wanda_scores", (WEIGHT, NORMS), {}),
    ("wanda_scores", (WEIGHT.bfloat16().T.contiguous().T, NORMS), {}),
    ("wanda_prune", (WEIGHT, NORMS), {"sparsity": 0.5}),
    ("wanda_prune", (WEIGHT.half(), NORMS), {"pattern": "2:4"}),
    ("wanda_prune", (WEIGHT.T, NORMS[:6]), {"sparsity": 0.5, "group": "column"}),
    ("accumulate_hessian_", (HESSIAN.clone(), WEIGHT), {}),
    ("accumulate_hessian_", (HESSIAN.expand(2, 8, 8).clone(), WEIGHT.expand(2, 6, 8)), {}),
    ("obs_prune", (WEIGHT, HESSIAN), {"sparsity": 0.5}),
    ("obs_prune", (WEIGHT.half().T.contiguous().T, HESSIAN), {"pattern": "2:4"}),
    ("obs_prune", (WEIGHT[None], HESSIAN[None]), {"mask": MASK[None]}),
    ("obs_prune_shared", ([WEIGHT, WEIGHT[:3]], HESSIAN), {"sparsity": 0.5}),
    ("obs_prune_shared", ([WEIGHT, WEIGHT], HESSIAN), {"masks": [MASK, ~MASK]}),
    ("l0_average", ([WEIGHT, WEIGHT * MASK],), {}),
    ("l0_average", ([WEIGHT.bfloat16()] * 2, [MASK, ~MASK]), {}),
    ("l0_average_compressed", ([BITS] * 2, [torch.ones(10), torch.zeros(10)], [2, 8]), {}),
    ("expand_mask", (VOTES, 2), {"sparsity": 0.5, "scores": WEIGHT}),
    ("expand_mask", (VOTES.T, 2), {"sparsity": 0.5, "group": "column"}),
    ("expand_mask", (VOTES, 2), {"pattern": "2:4"}),
    ("pack_mask", (MASK,), {}),
    ("unpack_mask", (BITS, 8), {}),
    ("compress", (WEIGHT, MASK), {}),
    ("compress", (WEIGHT, MASK), {"kept": int(MASK.sum())}),
    ("decompress", (BITS, torch.ones(10), [2, 8]), {}),
]  # fmt: skip
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(CALLS)]


def operator(name):
    return getattr(torch.ops.fedspa, name).default


def test_every_operator_is_called_here():
    assert {name for name, _, _ in CALLS} == set(dispatch.operators())


def moved(value, device):
    """The same arguments on a device; what an operator writes into is the test's own."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(one, device) for one in value)
    return value.to(device, copy=True) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(("name", "arguments", "options"), CALLS, ids=IDS)
def test_opcheck_passes(place, name, arguments, options):
    options = options | {"backend": place.backend}
    options = {key: moved(value, place.device) for key, value in options.items()}
    torch.library.opcheck(operator(name), moved(arguments, place.device), options)


@pytest.mark.parametrize(("name", "arguments", "options"), CALLS, ids=IDS)
def test_parameters_give_outputs_without_a_graph(name, arguments, options):
    def parameter(value):
        if isinstance(value, list):
            return [parameter(one) for one in value]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return torch.nn.Parameter(value.clone())

    if name == "accumulate_hessian_":
        arguments = (arguments[0].clone(), parameter(arguments[1]))
        operator(name)(*arguments, **options)
        outputs = arguments[0]
    else:
        outputs = operator(name)(*map(parameter, arguments), **options)
    for output in tree_leaves(outputs):
        assert not output.requires_grad and output.grad_fn is None


@pytest.mark.parametrize(("name", "arguments", "options"), CALLS, ids=IDS)
def test_an_unknown_backend_is_refused_by_every_operator(name, arguments, options):
    with pytest.raises(ValueError, match=f"^{name}: backend 'fastest' is not known"):
        operator(name)(*arguments, **options, backend="fastest")


def test_a_direct_call_is_checked_like_one_through_the_door():
    with pytest.raises(ValueError, match=r"^wanda_prune: norms\[0\] is -1.0"):
        torch.ops.fedspa.wanda_prune(WEIGHT, -NORMS, sparsity=0.5)


def test_shapes_are_checked_where_only_shapes_are_known():
    with pytest.raises(ValueError, match="^obs_prune: weight is"):
        fedspa_kernels.obs_prune(
            torch.ones(4, 6, device="meta"), torch.ones(5, 5, device="meta"), sparsity=0.5
        )


def test_compiled_code_calls_the_operators_without_a_break():
    def prune_and_average(weights, hessian, norms):
        first = fedspa_kernels.obs_prune(weights[0], hessian, sparsity=0.5)
        second = fedspa_kernels.wanda_prune(weights[1], norms, pattern="2:4")
        average = fedspa_kernels.l0_average([first.weight, second.weight])
        mask = fedspa_kernels.expand_mask(average.votes, 2, sparsity=0.5)
        return average.weight * mask, fedspa_kernels.pack_mask(mask)

    arguments = ([WEIGHT, WEIGHT.flip(0)], HESSIAN, NORMS)
    compiled = torch.compile(prune_and_average, backend="aot_eager", fullgraph=True)
    for ours, plain in zip(compiled(*arguments), prune_and_average(*arguments), strict=True):
        assert torch.equal(ours, plain)


def test_the_public_names_are_those_of_the_package():
    assert all(hasattr(fedspa_kernels, name) for name in fedspa_kernels.__all__)
    for name in dispatch.operators():
        assert name in fedspa_kernels.__all__
