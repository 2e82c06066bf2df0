"""Every peer prunes what it should, and agrees with the reference: else its time means nothing."""

import functools

import pytest
import torch

from bench.peers import aggregation, llmcompressor, sparsegpt, wanda
from fedspa_kernels import accumulate_hessian_, expand_mask, l0_average, obs_prune, wanda_prune

ROWS, COLS, BLOCK = 96, 320, 128
WHY_NOT = llmcompressor.why_not()
PACKAGE = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
SPARSEGPT = [
    pytest.param(sparsegpt.prune, id="sparsegpt"),
    pytest.param(llmcompressor.sparsegpt, id="llm-compressor", marks=PACKAGE),
]
WANDA = [
    pytest.param(wanda.prune, id="sorted"),
    pytest.param(llmcompressor.wanda, id="llm-compressor", marks=PACKAGE),
]
EXPANSIONS = [aggregation.expand_argsort, aggregation.expand_topk]
MEANS = [aggregation.l0_mean_stacked, aggregation.l0_mean_streamed]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def draw():
    return _drawing(4)


def _drawing(seed):
    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def inputs():
    """Tokens whose features differ in scale and go together, as in a model."""
    draw = _drawing(5)
    return draw(6, 100, COLS) @ draw(COLS, COLS) * draw(COLS).exp()


@pytest.fixture(scope="module")
def hessian(inputs):
    rows = inputs.flatten(0, 1)
    return rows.T @ rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prune", SPARSEGPT)
def test_sparsegpt_prunes_its_published_count_and_the_reference_s_weights(
    draw, hessian, prune, dtype
):
    weight, before = draw(ROWS, COLS).to(dtype), hessian.clone()
    pruned = prune(weight, hessian, sparsity=0.6, block_size=BLOCK)
    assert pruned.dtype == dtype and torch.equal(hessian, before)
    # The threshold is itself pruned, with what equals it, as rounded weights may: one more in each
    # block than the share says, or a few.
    for start in range(0, COLS, BLOCK):
        block = pruned[:, start : start + BLOCK]
        more = int((block == 0).sum()) - int(block.numel() * 0.6)
        assert more == 1 if dtype == torch.float32 else 1 <= more <= 3
    ours = obs_prune(weight, hessian, sparsity=0.6, block_size=BLOCK, backend="reference")
    assert ((pruned != 0) == ours.mask).float().mean() > 0.99
    assert _loss(weight, pruned, hessian) == pytest.approx(
        _loss(weight, ours.weight, hessian), rel=0.02
    )


@pytest.mark.parametrize("prune", SPARSEGPT)
def test_sparsegpt_keeps_patterns(draw, hessian, prune):
    weight = draw(ROWS, COLS)
    pruned = prune(weight, hessian, pattern=(1, 4), block_size=BLOCK)
    assert ((pruned != 0).view(-1, 4).sum(1) == 1).all()
    ours = obs_prune(weight, hessian, pattern="1:4", block_size=BLOCK, backend="reference")
    assert ((pruned != 0) == ours.mask).float().mean() > 0.99


@pytest.mark.parametrize("prune", SPARSEGPT)
def test_sparsegpt_drops_columns_that_no_input_reached(draw, hessian, prune):
    dead = hessian.clone()
    dead[7], dead[:, 7] = 0, 0
    pruned = prune(draw(ROWS, COLS), dead, sparsity=0.5)
    assert (pruned[:, 7] == 0).all() and pruned.isfinite().all()


def _loss(weight, pruned, hessian):
    change = weight.float() - pruned.float()
    return float(((change @ hessian) * change).sum())


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(sparsegpt.add_batch, id="sparsegpt"),
        pytest.param(llmcompressor.accumulate_hessian, id="llm-compressor", marks=PACKAGE),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_running_means_are_sums_by_another_scale(inputs, step, dtype):
    inputs, samples = inputs.to(dtype), 0
    mean, total = torch.zeros(COLS, COLS), torch.zeros(COLS, COLS)
    for batch in inputs.split([1, 3, 2]):
        samples = step(mean, samples, batch)
        accumulate_hessian_(total, batch.flatten(0, 1), backend="reference")
    assert samples == 6
    scale = total.diagonal().max()
    torch.testing.assert_close(mean * 6 / 2 / scale, total / scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prune", WANDA)
@pytest.mark.parametrize("share", [{"sparsity": 0.6}, {"pattern": (2, 4)}, {"pattern": (1, 8)}])
def test_wanda_is_the_reference_s(draw, prune, dtype, share):
    weight, norms = draw(ROWS, COLS).to(dtype), draw(COLS).abs()
    ours = {"pattern": "{}:{}".format(*share["pattern"])} if "pattern" in share else share
    expected = wanda_prune(weight, norms, **ours, backend="reference")
    pruned = prune(weight, norms, **share)
    if dtype == torch.float32 or prune is wanda.prune:
        assert torch.equal(pruned, expected.weight)
    else:
        # The package squares the norms and takes the root again: scores that are almost equal.
        assert ((pruned != 0) == expected.mask).float().mean() > 0.999
        assert (pruned == 0).sum() == (~expected.mask).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", MEANS)
def test_means_are_the_reference_s(draw, mean, dtype):
    weights = [draw(ROWS, COLS).to(dtype) for _ in range(5)]
    masks = [draw(ROWS, COLS) > 0.3 for _ in range(5)]
    weight, votes = mean(weights, masks)
    ours = l0_average(weights, masks, backend="reference")
    assert torch.equal(votes, ours.votes.to(votes.dtype)) and weight.dtype == dtype
    torch.testing.assert_close(weight, ours.weight)
    assert (weight[votes == 0] == 0).all() and (votes == 0).any()


@pytest.mark.parametrize("expand", EXPANSIONS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75])
def test_expansions_are_the_reference_s(draw, expand, sparsity):
    votes = torch.randint(0, 9, (ROWS, COLS), generator=torch.Generator().manual_seed(1)).int()
    scores = draw(ROWS, COLS).abs()
    expected = expand_mask(votes, 8, sparsity=sparsity, scores=scores, backend="reference")
    assert torch.equal(expand(votes, scores, 8, sparsity), expected)


@pytest.mark.parametrize("expand", EXPANSIONS)
def test_expansions_keep_patterns(draw, expand):
    votes = torch.randint(0, 4, (ROWS, COLS), generator=torch.Generator().manual_seed(1))
    scores = draw(ROWS, COLS).abs()
    expected = expand_mask(votes, 3, pattern="2:4", scores=scores, backend="reference")
    assert torch.equal(expand(votes, scores, 3, pattern=(2, 4)), expected)


def test_a_missing_package_is_a_reason(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'loguru'", name="loguru")

    monkeypatch.setattr(llmcompressor, "_functions", missing)
    llmcompressor.why_not.cache_clear()
    assert llmcompressor.why_not().startswith("loguru is not installed (pip install --no-deps")
    llmcompressor.why_not.cache_clear()
