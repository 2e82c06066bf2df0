"""Targets: which cases they mean, and whether these reach them."""

import pytest
from made_up import document, model, operator, row

from bench.loaded import Machine, machines
from bench.targets import TARGETS, judge, verdicts


def target(device, subject, says):
    (found,) = [t for t in TARGETS if (t.device, t.subject) == (device, subject) and says in t.says]
    return found


def test_targets_are_reached_missed_or_not_measured(written):
    good = operator("wanda_prune", "row 50 %", ratios={"sorted": 31.0})
    poor = operator("wanda_prune", "2:4", ratios={"sorted": 29.0})
    floor = operator("obs_prune", "50 %", 768, 768, operations=10**9, ratios={"floor": 0.8})
    page = written(document(good, poor, floor))
    missed = row(page, "≥ 30× the sorted form")
    assert missed[2:] == ["29.0× to 31.0×", "2:4, 4096×4096, float32", "**missed** in 1 of 2"]
    # 1/0.8 = 1.25 times the floor, of at most 1.3.
    assert row(page, "≤ 1.3× one Cholesky")[2:] == ["1.25×", "50 %, 768×768, float32", "yes"]
    assert row(page, "≥ 60× the argsort form")[2:] == ["–", "–", "not measured"]
    assert "Not measured: no GPU result file yet." in page
    assert row(page, "whole model under 5 minutes")[-1] == "not measured"


@pytest.mark.parametrize(("clients", "cases"), [(16, 1), (8, 0)])
def test_a_target_takes_only_the_cases_that_it_names(clients, cases):
    machine = Machine("cpu", "m", operators=[operator("l0_average", "masks", clients=clients)])
    share = target("cpu", "l0_average", "copy bandwidth")
    assert len(judge(share, machine).cases) == cases


def test_the_floor_of_obs_prune_is_for_layers_whose_mask_is_to_be_chosen():
    """Not for a given mask, and not for 64 columns; a size in between counts."""
    shapes = {"50 %": ((64, 64), (576, 500)), "2:4": ((576, 1536),), "given mask": ((2048, 2048),)}
    cases = [
        operator("obs_prune", variant, *shape, operations=10**9, ratios={"floor": 0.5})
        for variant, found in shapes.items()
        for shape in found
    ]
    over = judge(target("cpu", "obs_prune", "1.3×"), Machine("cpu", "m", operators=cases))
    assert [case.name for case in over.cases] == [
        "obs_prune, 2:4, 576×1536, float32",
        "obs_prune, 50 %, 576×500, float32",
    ]


def test_never_slower_than_the_reference_is_of_every_operator_from_64_on():
    small = operator("pack_mask", rows=32, cols=512, ratios={"reference": 0.5})
    large = operator("pack_mask", rows=64, cols=64, ratios={"reference": 0.99})
    anything = target("cpu", "any", "never slower")
    assert judge(anything, Machine("cpu", "m", operators=[small])).reached is None
    assert judge(anything, Machine("cpu", "m", operators=[small, large])).reached is False


def test_whole_models_are_judged_by_the_peers_and_extrapolated_only_where_it_is_said(written):
    files = [document(model("fedspa", 4.0), model("peers", 124.0), kind="model", device="cuda")]
    page = written(*files)
    assert row(page, "SparseGPT's procedure")[2:] == [
        "16.0×",
        "sparsegpt 50 %, 1 client, 2 of 32 blocks",
        "yes",
    ]
    headings = row(page, "all blocks, extrapolated")
    cells = dict(zip(headings, row(page, "| sparsegpt | peers |"), strict=True))
    assert (cells["sum"], cells["against fedspa"]) == ("2 min 8 s", "16.0×")
    assert cells["blocks measured"] == "2 of 32" and cells["peak GB"] == "2.00 host"
    assert "is extrapolated.\nExtrapolated as if every block took as long.\n" in page
    many = model("fedspa", 400.0, model="llama-2-70b", clients=8)
    large = document(model("fedspa", 4.0, model="llama-2-70b"), kind="model", device="cuda")
    (machine,) = machines([("a", large)])
    seconds = target("cuda", "llama-2-70b", "under 5 minutes")
    assert judge(seconds, machine).cases[0].value == 128
    (machine,) = machines([("a", large), ("b", {**large, "results": [many]})])
    assert [case.value for case in judge(seconds, machine).cases] == [128], "of one client alone"


def test_every_target_of_the_two_tables_is_data():
    assert {t.subject for t in TARGETS if t.device == "cuda"} == {
        "l0_average",
        "wanda_prune",
        "expand_mask",
        "accumulate_hessian_",
        "obs_prune",
        "llama-2-7b",
        "llama-2-70b",
    }
    assert len(verdicts(Machine("cpu", "m"))) == 9
