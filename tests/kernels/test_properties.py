"""Every backend does what the reference does, on shapes, dtypes and values that nobody chose."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspa_kernels import (
    Compressed,
    compress,
    decompress,
    expand_mask,
    l0_average,
    l0_average_compressed,
    obs_prune,
    pack_mask,
    smallest_mask,
    wanda_prune,
    wanda_scores,
)

OPERATORS = ("smallest_mask", "wanda_prune", "expand_mask", "l0_average", "compress", "obs_prune")
# An interpreted kernel takes a hundred times as long as a compiled one.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
slowly = settings(deadline=None, max_examples=12 if INTERPRETED else 60, derandomize=True)

DTYPES = st.sampled_from((torch.float32, torch.float16, torch.bfloat16))
SPARSITIES = st.sampled_from((0.0, 0.01, 0.3, 0.5, 0.55, 0.99))
PATTERNS = st.sampled_from(((1, 2), (2, 4), (4, 8), (3, 5), (1, 16)))
# Ties, both zeros, subnormals, and the ends of every dtype's range.
PALETTE = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-40, -1e-40, 6e-8, 3e38, -65504.0, 1e-30)


@st.composite
def tensors(draw, shape, dtype, distinct=False):
    """Values of the palette (ties everywhere), or normal ones."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if distinct or draw(st.booleans()):
        return torch.randn(shape, generator=generator).to(dtype)
    palette = torch.tensor(PALETTE).to(dtype)
    palette = palette[palette.isfinite()]
    return palette[torch.randint(len(palette), shape, generator=generator)]


@st.composite
def shapes(draw, most=300, least=0):
    """Rows and columns, on both sides of the sizes of vectors, words and warps."""
    some = st.sampled_from((0, 1, 128, 256))
    size = st.one_of(st.integers(1, 40), st.integers(1, most), some)
    size = size.filter(lambda n: least <= n <= most)
    return draw(size), draw(size)


def choices(width, options=PATTERNS):
    """A sparsity, or a pattern that divides the width."""
    dividing = options.filter(lambda pattern: width % pattern[1] == 0)
    some = any(width % of == 0 for of in (2, 4, 8, 5, 16))
    patterns = dividing.map(lambda pattern: {"pattern": f"{pattern[0]}:{pattern[1]}"})
    sparsities = SPARSITIES.map(lambda sparsity: {"sparsity": sparsity})
    return st.one_of(sparsities, patterns) if some else sparsities


def on(place, *values):
    """The same tensors on the place's device, as views that start at an odd element."""

    def move(tensor):
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=place.device)
        view = storage[1:].view(tensor.shape)
        return view.copy_(tensor)

    return [move(value) if isinstance(value, torch.Tensor) else value for value in values]


def assert_same(ours, theirs):
    """Bit for bit, but for the sign of a zero and what a NaN looks like."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.cpu().nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))


@slowly
@given(data=st.data())
def test_selection(place, data):
    shape = data.draw(shapes())
    scores = data.draw(tensors(shape, data.draw(DTYPES)))
    k = data.draw(st.integers(0, shape[1]))
    ours = smallest_mask(*on(place, scores), k, backend=place.backend)
    assert_same([ours], [smallest_mask(scores, k, backend="reference")])


@slowly
@given(data=st.data())
def test_wanda(place, data):
    shape = data.draw(shapes())
    weight = data.draw(tensors(shape, data.draw(DTYPES)))
    norms = data.draw(tensors(shape[1:], torch.float32)).abs().clamp(max=1.0)
    how = data.draw(choices(shape[1]))
    if "sparsity" in how:
        how["group"] = data.draw(st.sampled_from(("row", "layer", "column")))
    moved = on(place, weight, norms)
    ours = wanda_prune(*moved, **how, backend=place.backend)
    assert_same(ours[:2], wanda_prune(weight, norms, **how, backend="reference")[:2])
    scores = wanda_scores(*moved, backend=place.backend)
    assert_same([scores], [wanda_scores(weight, norms, backend="reference")])


@slowly
@given(data=st.data())
def test_expansion(place, data):
    shape = data.draw(shapes())
    clients = data.draw(st.sampled_from((1, 2, 64, 300, 2**31 - 1)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    votes = torch.randint(0, min(clients, 300) + 1, shape, generator=generator, dtype=torch.int32)
    votes[votes == 300] = clients
    scores = data.draw(st.one_of(st.none(), tensors(shape, data.draw(DTYPES))))
    how = data.draw(choices(shape[1]))
    if "sparsity" in how:
        how["group"] = data.draw(st.sampled_from(("row", "layer", "column")))
    moved = on(place, votes, scores)
    ours = expand_mask(moved[0], clients, scores=moved[1], **how, backend=place.backend)
    theirs = expand_mask(votes, clients, scores=scores, **how, backend="reference")
    assert_same([ours], [theirs])


@slowly
@given(data=st.data())
def test_l0_average_dense_and_compressed(place, data):
    shape, dtype = data.draw(shapes(24 if INTERPRETED else 100)), data.draw(DTYPES)
    count = data.draw(st.integers(1, 9))
    # float16 sums of its largest numbers are not finite in any order.
    weights = [data.draw(tensors(shape, dtype)).clamp(-100, 100) for _ in range(count)]
    masks = [data.draw(tensors(shape, torch.float32)) > 0 for _ in range(count)]
    poisoned = [
        weight.masked_fill(~mask, torch.nan) for weight, mask in zip(weights, masks, strict=True)
    ]
    expected = l0_average(weights, masks, backend="reference")
    moved = on(place, *poisoned), on(place, *masks)
    assert_same(l0_average(*moved, backend=place.backend), expected)
    plain = l0_average(on(place, *weights), backend=place.backend)
    assert_same(plain, l0_average(weights, backend="reference"))
    packed = [compress(*client, backend=place.backend) for client in zip(*moved, strict=True)]
    assert_same(l0_average_compressed(packed, shape, backend=place.backend), expected)


@slowly
@given(data=st.data())
def test_bits_and_values(place, data):
    shape, dtype = data.draw(shapes()), data.draw(DTYPES)
    weight = data.draw(tensors(shape, dtype))
    mask = data.draw(tensors(shape, torch.float32)) > 0
    moved = on(place, weight, mask)
    ours = compress(*moved, backend=place.backend)
    theirs = compress(weight, mask, backend="reference")
    assert_same(ours, theirs)
    assert_same([pack_mask(moved[1], backend=place.backend)], [theirs.bits])
    rebuilt = decompress(Compressed(*on(place, *theirs)), shape, backend=place.backend)
    assert_same([rebuilt], [decompress(theirs, shape, backend="reference")])


@slowly
@given(data=st.data())
def test_obs_of_uncorrelated_inputs_is_exact(place, data):
    """Without correlation nothing is updated, so that scores, masks and losses are exact."""
    shape, dtype = data.draw(shapes(64 if INTERPRETED else 150, least=1)), data.draw(DTYPES)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weight = torch.randint(-6, 7, shape, generator=generator).to(dtype)
    diagonal = torch.tensor([0.0, 1.0, 4.0, 16.0])
    diagonal = diagonal[torch.randint(4, shape[1:], generator=generator)]
    diagonal[0] = 1.0  # a hessian of zeros is refused
    how = data.draw(choices(shape[1], PATTERNS.filter(lambda pattern: 120 % pattern[1] == 0)))
    # One that no kernel holds (200) cuts the widths between 128 and 150.
    how["block_size"] = data.draw(st.sampled_from((7, 32, 128, 200))) if "sparsity" in how else 120
    arguments = weight, torch.diag(diagonal)
    ours = obs_prune(*on(place, *arguments), **how, damping=0.0, backend=place.backend)
    assert_same(ours, obs_prune(*arguments, **how, damping=0.0, backend="reference"))


@pytest.mark.parametrize("shape", ((0, 4), (4, 0)))
def test_what_is_refused_is_refused_of_empty_tensors_too(place, shape):
    weight, bad = torch.zeros(shape, device=place.device), torch.full((shape[1],), -1.0)
    if shape[1]:
        with pytest.raises(ValueError, match=r"norms\[0\] is -1.0"):
            wanda_prune(weight, bad.to(place.device), sparsity=0.5, backend=place.backend)
        with pytest.raises(ValueError, match="not positive definite"):
            hessian = torch.eye(4, device=place.device)
            hessian[0, 1] = 2.0
            obs_prune(weight, hessian, sparsity=0.5, backend=place.backend)
    values = torch.ones(3, device=place.device)
    packed = compress(weight, weight != 0, backend=place.backend)
    with pytest.raises(ValueError, match="client 1 keep 0 weights and there are 3 values"):
        clients = [packed, Compressed(packed.bits, values)]
        l0_average_compressed(clients, shape, backend=place.backend)


@pytest.mark.parametrize("k", (98_999, 99_000, 99_001, 100_999, 101_000, 101_001))
def test_a_count_that_ends_with_a_class_of_equals(place, k):
    """Where the k-th is the last of its class, a search that brackets it finds nothing beyond."""
    scale = 10 if place.backend == "triton" else 1  # interpreted kernels are slow
    sizes, k = torch.tensor((99_000, 2_000, 99_000)) // scale, k // scale
    classes = torch.tensor((1, 2, 3), dtype=torch.int32).repeat_interleave(sizes)
    n = len(classes)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(k))
    votes, ones = classes[shuffled].view(1, n), torch.ones(n)
    expected = smallest_mask(votes.float(), k, backend="reference")
    moved, scores, norms = on(place, votes, votes.float(), ones)
    assert_same([smallest_mask(scores, k, backend=place.backend)], [expected])
    mask = expand_mask(moved, 3, sparsity=k / n, backend=place.backend)
    assert_same([mask], [~expected])
    how = {"sparsity": k / n, "group": "layer", "backend": place.backend}
    assert_same([wanda_prune(scores, norms, **how).mask], [~expected])


@pytest.mark.parametrize("clients", (1, 2, 64, 300))
def test_votes_of_many_clients_do_not_wrap(place, clients):
    weight = torch.tensor([[1.0, -2.0, 0.0, 3.0]], device=place.device)
    average = l0_average([weight] * clients, backend=place.backend)
    assert average.votes.tolist() == [[clients, clients, 0, clients]]
    assert torch.equal(average.weight, weight)
    mask = expand_mask(average.votes, clients, sparsity=0.5, backend=place.backend)
    assert mask.tolist() == [[False, True, False, True]]


def test_the_same_bits_twice(place):
    torch.manual_seed(0)
    weight, inputs = torch.randn(40, 130), torch.randn(300, 130)
    weight, hessian = on(place, weight, inputs.T @ inputs)
    runs = []
    for _ in range(2):
        pruned = obs_prune(weight, hessian, sparsity=0.6, backend=place.backend)
        wanda = wanda_prune(weight, hessian.diagonal(), sparsity=0.6, backend=place.backend)
        average = l0_average([pruned.weight, wanda.weight], backend=place.backend)
        runs.append([*pruned, *wanda[:2], *average])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
