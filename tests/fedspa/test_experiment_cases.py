import json
import tomllib
from collections import Counter

import pytest
from click.testing import CliRunner
from experiment_files import ALL, GRID, METHODS, make_folder, write_experiment

from fedspa.cli import main
from fedspa.experiments.cases import SETTINGS
from fedspa.experiments.experiment_file import read_experiment, shipped_grids
from fedspa.experiments.jobs import deal_jobs


@pytest.fixture
def read(tmp_path):
    return lambda **parts: read_experiment(write_experiment(tmp_path, **parts))


def test_a_grid_is_the_product_of_its_lists_and_each_case_is_there_once(read):
    grid = f"""
[[grid]]
targets = [0.5, "2:4"]
clients = [2, 3]
partitions = ["domain", "iid"]
seeds = [0, 1]
methods = {ALL}
"""
    methods = METHODS.replace('expansion = ["layer", "row"]\n', "")
    cases = read(methods=methods, grids=grid + grid).cases
    counted = Counter(case.method for case in cases)
    # 16 places; dense has one, centralised one a target and seed; scaling is an axis of mask.
    assert counted == {
        "dense": 1,
        "standalone": 16,
        "mean": 16,
        "l0": 16,
        "mask": 32,
        "synchronous": 16,
        "statistics": 16,
        "centralised": 4,
    }
    assert len({case.key for case in cases}) == len(cases)
    dense = cases[0]
    assert (dense.target, dense.seed, dense.clients, dense.partition) == (None,) * 4
    assert all(len(case.key) == 16 and int(case.key, 16) >= 0 for case in cases)


def test_settings_are_those_of_the_method_and_messages_are_bfloat16(read):
    cases = {case.title: case for case in read().cases}
    l0 = cases["l0, 50%, 3 clients domain, seed 0"]
    assert l0.settings == {"message_dtype": "bfloat16"}
    federation = l0.federation()
    assert (federation.sparsity, federation.seed, federation.aggregation) == (0.5, 0, "l0")
    mask = [case.settings for case in read().cases if case.method == "mask"]
    found = [(settings["expansion"], settings["scaling"]) for settings in mask]
    assert found == [("layer", False), ("layer", True), ("row", False), ("row", True)]


def test_a_key_depends_on_what_is_asked_for_alone(read, tmp_path):
    first = read()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    other = read_experiment(write_experiment(moved, grids=GRID + GRID.replace("0.5", "0.6")))
    assert [case.key for case in other.cases[: len(first.cases)]] == [c.key for c in first.cases]
    changed = read(windows=5)
    assert not {case.key for case in changed.cases} & {case.key for case in first.cases}


def test_the_same_names_in_another_folder_are_other_cases(tmp_path):
    keys = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        make_folder(tmp_path / name)
        experiment = read_experiment(write_experiment(tmp_path / name))
        keys.append({case.key for case in experiment.cases})
    assert not keys[0] & keys[1]


def test_weights_travel_in_the_models_own_dtype_where_a_method_says_so(read):
    methods = METHODS.replace("[method.l0]", '[method.l0]\nmessage_dtype = "auto"')
    cases = read(methods=methods).cases
    dtypes = {case.method: case.federation().message_dtype for case in cases if case.seed == 0}
    assert dtypes["l0"] is None and dtypes["mean"] == "bfloat16"


def test_titles_tell_cases_apart(read):
    cases = read().cases
    assert len({case.title for case in cases}) == len(cases)


def test_cases_that_differ_on_the_server_alone_are_one_job(read):
    jobs = deal_jobs(read().cases)
    assert [sorted({case.method for case in job.cases}) for job in jobs if job.one_walk] == [
        ["l0", "mask", "mean", "standalone"]
    ]
    assert sum(len(job.cases) for job in jobs) == len(read().cases)
    apart = deal_jobs(
        read(methods=METHODS.replace("[method.l0]", "[method.l0]\npruner='wanda'")).cases
    )
    assert len(apart) == len(jobs) + 1


def test_clients_that_leave_share_no_walk(read):
    methods = METHODS.replace("[method.l0]", "[method.l0]\ndropout = 0.3")
    methods = methods.replace("[method.mean]", "[method.mean]\nparticipation = 0.5")
    shared = [job for job in deal_jobs(read(methods=methods).cases) if job.one_walk]
    assert [{case.method for case in job.cases} for job in shared] == [{"standalone", "mask"}]


def test_jobs_come_in_the_order_of_the_grids_and_the_longest_first_within(read):
    later = GRID.replace("[0.5]", "[0.6]").replace("[3]", "[3, 12]")
    jobs = deal_jobs(read(grids=GRID + later).cases)
    assert [job.order[0] for job in jobs] == sorted(job.order[0] for job in jobs)
    costs = [job.cost for job in jobs if job.order[0] == 1]
    assert costs == sorted(costs, reverse=True)


BAD = {
    "name": ({"more": "nmae = 'x'"}, "unknown key 'nmae'; did you mean 'name'"),
    "dtype": ({"more": "dtype = 'int8'"}, "dtype 'int8' is unknown"),
    "models": ({"models": "[]"}, r"models is \[\]"),
    "data": ({"windows": "4\nwindow = 4"}, "unknown key 'window'; did you mean 'windows'"),
    "windows": ({"windows": "0"}, "windows is 0; give a whole number of at least 1"),
    "method key": (
        {"methods": METHODS.replace("expansion", "expansoin")},
        "method 'mask' of kind 'federated' has the unknown key 'expansoin'; did you mean 'expan",
    ),
    "sparsity of a method": (
        {"methods": METHODS.replace("[method.l0]", "[method.l0]\nsparsity = 0.5")},
        "unknown key 'sparsity'",
    ),
    "kind": ({"methods": METHODS.replace('"dense"', '"dens"', 1)}, "kind 'dens'; did you mean 'd"),
    "setting of a kind": (
        {"methods": METHODS.replace("[method.centralised]", "[method.centralised]\nrounds = 2")},
        "of kind 'centralised' has the unknown key 'rounds'",
    ),
    "value": (
        {"methods": METHODS.replace('"mean"', '"median"')},
        "method 'mean': settings: aggregation 'median' is unknown",
    ),
    "empty axis": ({"methods": METHODS.replace("[false, true]", "[]")}, "scaling is an empty list"),
    "no grid": ({"grids": ""}, "has no grid; give tables"),
    "grid is no list": ({"grids": GRID.replace("[[grid]]", "[grid]")}, r"\[\[grid\]\]"),
    "empty grid": ({"grids": "[[grid]]"}, "grid 1 has no methods, so it is empty"),
    "empty list": ({"grids": GRID.replace("[0.5]", "[]")}, r"grid 1: targets is \[\]"),
    "grid key": ({"grids": GRID + "seed = [1]"}, "unknown key 'seed'; did you mean 'seeds'"),
    "method": (
        {"grids": GRID.replace('"mean"', '"maen"')},
        "unknown method 'maen'; did you mean 'mean'",
    ),
    "target": ({"grids": GRID.replace("0.5", "1.5")}, "sparsity 1.5 is outside"),
    "pattern": ({"grids": GRID.replace("0.5", '"2of4"')}, "2of4"),
    "partition": ({"grids": GRID.replace('"domain"', '"domian"')}, "partition 'domian' is unknown"),
    "clients": ({"grids": GRID.replace("[3]", "[13]")}, "12 windows .* fewer than 13 clients"),
    "one client": ({"grids": GRID.replace("[3]", "[1]")}, 'kind "centralised"'),
    "text for clients": ({"grids": GRID.replace("[3]", "['3']")}, "clients has '3'"),
    "seed": ({"grids": GRID + "seeds = [-1]"}, "seeds has -1"),
    "capacity": ({"grids": GRID + "capacities = [1.5]"}, "capacities has 1.5"),
    "expect key": (
        {"grids": GRID + "[[expect]]\nlower = 'l0'\nhigher = 'mean'\nat_last = 1"},
        "at_last",
    ),
    "expect method": (
        {"grids": GRID + "[[expect]]\nlower = 'l0'\nhigher = 'maen'\nat_least = 1"},
        "unknown method 'maen'",
    ),
    "expect part": (
        {"grids": GRID + "[[expect]]\nlower = 'l0'\nhigher = 'standalone, mena'"},
        "unknown method 'standalone, mena'; did you mean 'standalone, mean'",
    ),
    "expect alone": (
        {"grids": GRID + "[[expect]]\nlower = 'l0'\nhigher = 'standalone'"},
        "unknown method 'standalone'",
    ),
    "expect partition": (
        {"grids": GRID + "[[expect]]\nlower = 'l0'\nhigher = 'mean'\npartitions = ['iidd']"},
        "no case of the grids has partitions 'iidd'",
    ),
    "expect clients": (
        {"grids": GRID + "[[expect]]\nlower = 'l0'\nhigher = 'mean'\nclients = [99]"},
        "no case of the grids has clients 99",
    ),
    "pruner": (
        {"methods": METHODS.replace("[method.l0]", "[method.l0]\npruner = 5")},
        "pruner is 5; name one, as a text",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_in_a_file_is_named_before_anything_runs(read, name):
    parts, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        read(**parts)


def test_a_plain_file_cannot_be_its_own_held_out_text(tmp_path):
    (tmp_path / "a.txt").write_text("word1 " * 500)
    path = write_experiment(tmp_path)
    text = path.read_text()
    start, end = text.index("a = {"), text.index("b = {")
    path.write_text(text[:start] + 'a = "a.txt"\n' + text[end:])
    with pytest.raises(ValueError, match="a.txt has no held-out part"):
        read_experiment(path)
    path.write_text(text[:start] + 'a = "shipped:speech"\n' + text[end:])
    with pytest.raises(ValueError, match="'shipped:speech' is not shipped"):
        read_experiment(path)


def test_a_file_that_is_not_there_or_not_toml_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no file .*absent.toml.*'quick'"):
        read_experiment(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(ValueError, match="is not TOML"):
        read_experiment(tmp_path / "broken.toml")


@pytest.mark.parametrize("name", shipped_grids())
def test_every_shipped_grid_is_read(name):
    experiment = read_experiment(name)
    assert experiment.name == name and experiment.cases
    written = tomllib.loads(shipped_grids()[name].read_text())
    assert {case.method for case in experiment.cases} == set(written["method"])


def test_methods_may_set_every_setting_that_the_library_has():
    assert {"pruner", "aggregation", "synchronize_every", "statistics_dtype", "dropout"} <= set(
        SETTINGS
    )
    assert not {"sparsity", "pattern", "seed"} & set(SETTINGS)


def test_list_runs_nothing(tmp_path):
    path = write_experiment(tmp_path)
    arguments = ["experiment", str(path), "--out", str(tmp_path / "out"), "--list"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "11 cases, of which 11 are to be run" in result.stdout
    listed = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert [case["state"] for case in listed] == ["missing"] * 11
    assert not (tmp_path / "out").exists()
    unknown = CliRunner().invoke(main, ["experiment", "smolm2", "--list"])
    assert unknown.exit_code == 2 and "no shipped grid of that name" in unknown.stderr
