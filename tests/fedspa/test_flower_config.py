"""What a federation over Flower is told: every key is known, reaches its place, and is checked."""

import importlib
import re
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import fedspa
import fedspa.flower
from fedspa import Settings
from fedspa.flower.run_config import Network, read_run_config

APP = Path(fedspa.flower.__file__).parent / "app"
PROJECT = tomllib.loads((APP / "pyproject.toml").read_text())
DEFAULTS = PROJECT["tool"]["flwr"]["app"]["config"]
# What travels is half as large by default where weights are float32.
USUAL = {"message_dtype": "bfloat16"}
GIVEN = {"model": "llama", "out": "pruned", "clients": 3, "sparsity": 0.6}

# A value of every setting that is not its default, and what some of them need beside them.
SETTINGS = {
    "pruner": "wanda",
    "sparsity": 0.25,
    "pattern": "2:4",
    "aggregation": "mean",
    "schedule": "synchronous",
    "synchronize_every": 2,
    "rounds": 3,
    "ramp": "cubic",
    "layers_per_client": 5,
    "every_block": True,
    "expansion": "row",
    "scaling": True,
    "weighting": "samples",
    "participation": 0.5,
    "dropout": 0.25,
    "message_dtype": "float16",
    "statistics_dtype": "int64",
    "block_size": 64,
    "damping": 0.1,
    "batch_size": 4,
    "seed": 7,
}
BESIDE = {
    "pattern": {"sparsity": ""},
    "synchronize_every": {"schedule": "synchronous"},
    "scaling": {"aggregation": "mask"},
    "statistics_dtype": {"aggregation": "statistics"},
}
# Likewise of the network: as it is given, and as it is read.
NETWORK = {
    "model": ("other", "other"),
    "out": ("results/run", Path("results/run")),
    "clients": (4, 4),
    "min_clients": (2, 2),
    "dtype": ("bfloat16", "bfloat16"),
    "device": ("cuda", "cuda"),
    "join_timeout": (5, 5.0),
    "deadline": (60.5, 60.5),
    "patience": (0, 0.0),
    "blocks_per_message": (2, 2),
    "message_mib": (0.5, 0.5),
    "norm_bound": (2, 2.0),
    "samples": (4, 4),
    "seqlen": (16, 16),
    "restart": (True, True),
    "texts": ("a.txt; b c.txt ;c4", ("a.txt", "b c.txt", "c4")),
}


def key(name):
    return name.replace("_", "-")


def read(**changed):
    return read_run_config(DEFAULTS | GIVEN | {key(name): value for name, value in changed.items()})


def network(**changed):
    return read(**changed)[1]


def test_the_app_has_a_key_for_every_setting_and_no_other():
    names = [f.name for kind in (Settings, Network) for f in fields(kind)]
    assert len(set(names)) == len(names)
    assert DEFAULTS.keys() == {key(name) for name in names}


def test_the_defaults_of_the_app_are_those_of_the_library():
    assert read() == read_run_config(GIVEN | {"message-dtype": "bfloat16"})
    assert read()[0] == Settings(sparsity=0.6, **USUAL)
    assert read()[1] == Network("llama", Path("pruned"), clients=3, min_clients=3)


@pytest.mark.parametrize("name", [f.name for f in fields(Settings)])
def test_every_setting_reaches_the_settings(name):
    value = SETTINGS[name]
    beside = BESIDE.get(name, {})
    settings, _ = read(**beside, **{name: value})
    expected = {"sparsity": 0.6} | beside | {name: value}
    assert settings == Settings(**USUAL | {name: value or None for name, value in expected.items()})
    assert getattr(settings, name) == value != getattr(Settings(sparsity=0.6, **USUAL), name)


@pytest.mark.parametrize("name", [f.name for f in fields(Network)])
def test_every_key_of_the_network_reaches_it(name):
    given, value = NETWORK[name]
    found = network(**{name: given})
    assert getattr(found, name) == value != getattr(network(), name)
    assert type(getattr(found, name)) is type(value) or isinstance(value, Path)


def test_whole_numbers_do_where_fractions_are_meant():
    settings, _ = read(participation=1, sparsity=0, damping=1)
    values = (settings.participation, settings.sparsity, settings.damping)
    assert values == (1.0, 0.0, 1.0) and {type(value) for value in values} == {float}


def test_all_clients_must_answer_unless_fewer_are_said_to_do():
    assert network(clients=5).min_clients == 5
    assert network(clients=5, min_clients=0).min_clients == 5


def test_a_home_folder_may_be_written_as_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    found = network(model="~/llama", out="~/pruned", texts="~/a;b;c")
    assert found.model == "/home/ada/llama" and found.out == Path("/home/ada/pruned")
    assert found.texts[0] == "/home/ada/a"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"sparcity": 0.5}, "run-config has the unknown key 'sparcity'; did you mean 'sparsity'?"),
        ({"min-client": 2}, "'min-client'; did you mean 'min-clients'?"),
        ({"zzz": 1}, "'zzz'; known are ['aggregation', 'batch-size'"),
        ({"message_dtype": "float32"}, "'message_dtype'; did you mean 'message-dtype'?"),
        ({"model": ""}, "run-config has no model; give it as in --run-config 'model="),
        ({"out": "", "clients": ""}, "run-config has no out and no clients; give it as in"),
        ({"sparsity": ""}, "exactly one of sparsity and pattern"),
        ({"pattern": "2:4"}, "exactly one of sparsity and pattern"),
        ({"sparsity": "60%"}, "run-config: sparsity is '60%'; give a number"),
        ({"sparsity": True}, "run-config: sparsity is True; give a number"),
        ({"sparsity": 60}, "sparsity 60.0 is outside [0, 1)"),
        ({"damping": float("nan")}, "damping must be 0 or more, not nan"),
        ({"pruner": "wonda"}, "pruner 'wonda' is unknown; choose one of"),
        ({"pruner": 3}, 'run-config: pruner is 3; give a text in quotes, as in pruner="..."'),
        ({"rounds": 1.5}, "run-config: rounds is 1.5; give a whole number"),
        ({"rounds": True}, "run-config: rounds is True; give a whole number"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1, not 0"),
        ({"seed": False}, "run-config: seed is False; give a whole number"),
        ({"every-block": 1}, "run-config: every-block is 1; give true or false"),
        ({"restart": "yes"}, "run-config: restart is 'yes'; give true or false"),
        ({"model": 7}, 'run-config: model is 7; give a text in quotes, as in model="..."'),
        ({"clients": 0}, "run-config: clients must be at least 1, not 0"),
        ({"min-clients": 4}, "min-clients 4 is more than the 3 clients that are waited for"),
        ({"min-clients": -1}, "run-config: min-clients must be at least 1, not -1"),
        ({"blocks-per-message": -1}, "blocks-per-message must be at least 1, not -1"),
        ({"samples": 0}, "run-config: samples must be at least 1, not 0"),
        ({"seqlen": -2}, "run-config: seqlen must be at least 1, not -2"),
        ({"join-timeout": 0}, "run-config: join-timeout must be more than 0 and finite, not 0.0"),
        ({"deadline": float("inf")}, "deadline must be more than 0 and finite, not inf"),
        ({"message-mib": -1}, "message-mib must be more than 0 and finite, not -1.0"),
        ({"norm-bound": float("nan")}, "norm-bound must be more than 0 and finite, not nan"),
        ({"patience": -1}, "patience must be 0 or more seconds, not -1.0"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown; choose one of ['auto', 'float32'"),
        ({"texts": "a.txt;b.txt"}, "texts must name one text for each of the 3 clients"),
        ({"texts": "a.txt;;b.txt"}, "separated by ';', and names ['a.txt', 'b.txt']"),
    ],
)
def test_a_run_config_that_cannot_be(changed, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_run_config(DEFAULTS | GIVEN | changed)


def test_the_app_has_the_version_of_the_package():
    package = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert PROJECT["project"]["version"] == package["project"]["version"] == fedspa.__version__


@pytest.mark.parametrize("name", ["run_config", "node_config"])
def test_a_configuration_is_read_without_flower(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.delitem(sys.modules, f"fedspa.flower.{name}", raising=False)
    monkeypatch.setattr(fedspa.flower, name, None, raising=False)
    assert importlib.import_module(f"fedspa.flower.{name}").WHERE.endswith("config")


def test_flower_accepts_the_app():
    config = pytest.importorskip("flwr.common.config")
    assert config.validate_fields_in_config(PROJECT) == (True, [], [])
    assert config.validate_config(PROJECT, check_module=False) == (True, [], [])
    fused = config.fuse_dicts(DEFAULTS, GIVEN)
    assert read_run_config(fused) == read()
