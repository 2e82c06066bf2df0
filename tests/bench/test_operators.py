"""The cases of the benches: complete, right before they are timed, and counted as documented."""

import json
from dataclasses import replace

import pytest
import torch

import fedspa_kernels
from bench import protocol
from bench.operators import CASES, OPERATORS, Baseline, Sizes, find_operator, obs
from bench.operators.measure import measure_case, prepare
from bench.operators.table import line, table
from bench.protocol import WrongResult
from fedspa_kernels import Pruned, dispatch

TINY = Sizes(16, 32, clients=3, tokens=24)
CEILINGS = {"copy": 1e10, "matmul": {"float32": 1e11, "bfloat16": 1e12}}
# Sums of a few float32 products in another order.
TOLERANCE = 1e-5
FAST = [
    # A package that takes seconds to import; tests/bench/test_peers.py has it.
    replace(case, baselines={k: v for k, v in case.baselines.items() if k != "llm-compressor"})
    for case in CASES
]
each_case = pytest.mark.parametrize("case", FAST, ids=[case.name for case in FAST])


def measured(case, dtype=torch.float32, **options):
    return measure_case(case, "tiny", TINY, dtype, "cpu", CEILINGS, budget=0.002, **options)


def tensors(result):
    """All tensors of a result, however it is packed."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result if part is not None for t in tensors(part)]


def test_every_operator_that_is_registered_or_public_has_a_case():
    assert set(dispatch.operators()) <= set(OPERATORS)
    returned = {"Average", "Compressed", "Pruned"}
    assert set(fedspa_kernels.__all__) - returned == set(OPERATORS)


def test_an_unknown_operator_is_answered_with_the_known():
    with pytest.raises(ValueError, match="operator 'wanda' is not known; choose from accumulate_"):
        find_operator("wanda")
    assert {case.variant for case in find_operator("wanda_prune")} >= {"row 50 %", "2:4"}


@each_case
def test_a_result_has_everything_that_the_format_says(case):
    result = measured(case)
    json.dumps(result, allow_nan=False)
    contenders = {"fedspa", "reference", *case.baselines}
    assert set(result["times"]) == contenders
    assert set(result["ratios"]) == contenders - {"fedspa"}
    assert all(
        times["p20"] <= times["median"] <= times["p80"] for times in result["times"].values()
    )
    assert result["times"]["fedspa"]["runs"] >= 5
    assert result["ours"] == dispatch.preferred(case.door or case.operator, "cpu")
    assert result["check"] and result["skipped"] == {}
    median = result["times"]["fedspa"]["median"]
    assert result["bytes_per_s"] == pytest.approx(result["least_bytes"] / median)
    assert result["of_copy"] == pytest.approx(result["bytes_per_s"] / 1e10)
    assert (result["of_matmul"] is None) == (result["operations"] == 0)
    assert (result["sizes"]["clients"] is None) == ("clients" not in case.uses)
    assert f"{1e3 * median:.3g} ms" in line(result)


@each_case
def test_a_wrong_operator_is_refused_before_the_clock(case, monkeypatch):
    """Every tensor of a result is spoilt in turn; each of them is found."""
    monkeypatch.setattr(protocol, "race", lambda *a, **k: pytest.fail("the clock ran"))
    inputs = case.inputs(TINY, torch.float32, torch.Generator().manual_seed(0))
    count = len(tensors(case.run(inputs, "reference")))
    # The last one of obs_prune is its loss, which a given mask is not checked by.
    for spoilt in range(count - (case.variant == "given mask")):

        def wrong(inputs, backend, spoilt=spoilt):
            result = case.run(inputs, backend)
            if backend != "reference":
                spoil(tensors(result)[spoilt])
            return result

        with pytest.raises(WrongResult, match=f"^{case.operator}.*backend "):
            measured(replace(case, run=wrong))


def spoil(tensor):
    if tensor.dtype == torch.bool:
        tensor.logical_not_()
    elif tensor.dtype.is_floating_point:
        tensor.mul_(1.1).add_(1)
    else:
        tensor.add_(1)


def test_one_weight_too_many_is_a_wrong_obs_prune():
    case = next(case for case in FAST if case.name == "obs_prune 50 %")

    def one_more(inputs, backend):
        weight, mask, loss = case.run(inputs, backend)
        if backend != "reference":
            row, column = mask.nonzero()[0].tolist()
            mask[row, column] = False
            weight[row, column] = 0
        return Pruned(weight, mask, loss)

    with pytest.raises(WrongResult, match="kept weights a block differs"):
        measured(replace(case, run=one_more))


@each_case
def test_baselines_compute_what_ours_does(case):
    inputs = case.inputs(TINY, torch.float32, torch.Generator().manual_seed(0))

    def call(run):
        own = {name: inputs[name].clone() for name in case.writes}
        result = run({**inputs, **own})
        return tensors(own["hessian"] if own else result)

    expected = call(lambda inputs: case.run(inputs, "reference"))
    # SparseGPT's loop and its mean are tested beside their code; a floor computes something else.
    for name, baseline in case.baselines.items():
        if name in ("floor", "sparsegpt"):
            continue
        truths = list(expected)
        for tensor in call(baseline.run):
            kind = tensor.shape, tensor.dtype.is_floating_point
            alike = [t for t in truths if (t.shape, t.dtype.is_floating_point) == kind]
            assert alike, f"{name} returns {tuple(tensor.shape)} {tensor.dtype}"
            truth = alike[0]
            truths = [t for t in truths if t is not truth]
            difference = (tensor.double() - truth.double()).norm()
            assert difference <= TOLERANCE * truth.double().norm(), name


def test_every_contender_of_an_in_place_operator_has_its_own_target():
    (case,) = find_operator("accumulate_hessian_")
    case = replace(case, baselines={"pytorch": case.baselines["pytorch"]})
    entrants = prepare(case, TINY, torch.float32, "cpu")
    before = entrants.sets[0]["hessian"].clone()
    for run in entrants.runs.values():
        run(entrants.sets[0])
    assert torch.equal(entrants.sets[0]["hessian"], before)


def test_a_baseline_that_cannot_be_measured_is_left_out_with_a_reason():
    (case,) = find_operator("pack_mask")

    def raising(error):
        def run(inputs):
            raise error

        return Baseline(run)

    unreachable = Baseline(lambda inputs: pytest.fail("it was called"))
    result = measured(
        replace(
            case,
            baselines={
                "missing": replace(unreachable, why_not=lambda: "it is not installed"),
                "large": replace(unreachable, copies=2**40),
                "slow": replace(unreachable, seconds=lambda sizes, device: 120),
                "greedy": raising(torch.OutOfMemoryError()),
                "small": raising(RuntimeError("k not in range\nfor dimension")),
            },
        )
    )
    assert set(result["times"]) == {"fedspa", "reference"}
    assert result["skipped"]["missing"] == "it is not installed"
    assert result["skipped"]["large"].startswith("needs about 5")
    assert result["skipped"]["slow"] == "would take over 60 s (about 120 s a call)"
    assert result["skipped"]["greedy"] == "ran out of memory on 16x32"
    assert result["skipped"]["small"] == "cannot do it: k not in range for dimension"


def test_the_floors_product_has_half_of_the_rows_where_half_is_all_that_is_needed():
    weight, factor = torch.randn(5, 4, dtype=torch.bfloat16), torch.randn(4, 4)
    assert torch.equal(obs.product(weight, factor), weight[:3].float() @ factor)


def test_ours_alone_is_still_checked():
    (case,) = find_operator("pack_mask")
    result = measured(case, baselines=False)
    assert set(result["times"]) == {"fedspa"} and result["ratios"] == {}
    assert result["check"] == "bits equal to the reference's, 64 entries"


def test_where_there_is_no_kernel_the_reference_is_not_measured_twice(monkeypatch):
    (case,) = find_operator("unpack_mask")
    monkeypatch.setenv("FEDSPA_BACKEND", "reference")
    result = measured(case)
    assert result["ours"] == "reference"
    assert result["skipped"] == {"reference": "ours runs on it"}
    assert set(result["times"]) == {"fedspa", "pytorch"}


@pytest.mark.parametrize(
    ("name", "least", "operations"),
    [
        # 16 x 32, 3 clients, 24 tokens, float32; by hand from the table of floors.
        ("accumulate_hessian_", 4 * 24 * 32 + 8 * 32 * 32, 24 * 32 * 33),
        ("obs_prune 50 %", 9 * 512 + 4 * 1024 + 4 * 16, 32**3 / 3 + 16 * 32 * 32),
        ("wanda_prune row 50 %", 512 * (4 + 4 + 1) + 4 * 32, 0),
        ("l0_average masks", 512 * (3 * (4 + 1 / 8) + 4 + 4), 0),
        ("l0_average_compressed", 512 * (3 * (2 + 1 / 8) + 4 + 4), 0),
        ("expand_mask layer 50 %", 512 * (4 + 4 + 1), 0),
        ("pack_mask", 512 + 64, 0),
    ],
)
def test_least_bytes_and_operations_are_those_of_the_floors(name, least, operations):
    case = next(case for case in CASES if case.name == name)
    assert case.least_bytes(TINY, 4) == pytest.approx(least)
    assert case.operations(TINY) == pytest.approx(operations)


def test_the_table_has_a_row_for_what_failed_too():
    (case,) = find_operator("pack_mask")
    failed = {**measured(case), "failed": "OutOfMemoryError: some"}
    made = table([measured(case), failed])
    assert made.row_count == 2
    assert "failed: OutOfMemoryError: some" in list(made.columns[-2].cells)
