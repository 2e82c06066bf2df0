"""A checkpoint that is streamed block by block gives the bits of the model in memory."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from small_models import ARCHITECTURES, make_clients, make_model, save_with_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedspa import Settings, federate, load_masks
from fedspa.run import Surroundings
from fedspa.streaming.blocks import StreamedBlocks
from fedspa.streaming.weights import Weights

INDEX = "model.safetensors.index.json"
SETTINGS = {
    "one-shot": {"sparsity": 0.6},
    "synchronous": {
        "sparsity": 0.5,
        "schedule": "synchronous",
        "rounds": 2,
        "layers_per_client": 1,
        "every_block": True,
    },
    "mask ramp": {
        "sparsity": 0.5,
        "pruner": "wanda",
        "aggregation": "mask",
        "rounds": 2,
        "ramp": "linear",
        "layers_per_client": 2,
    },
    "pattern": {"pattern": "2:4", "pruner": "magnitude"},
}


@pytest.fixture(autouse=True)
def no_power_failure(monkeypatch):
    """Leave out the waits for the disk, which are for power failures."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def saved(folder, architecture="llama", layers=3, dtype=torch.float32):
    """A checkpoint of several shards."""
    make_model(architecture, layers, dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


def in_memory(folder, settings, dtype="auto", clients=3):
    """The model of a folder, pruned in memory, and its report."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, federate(model, make_clients(clients), Settings(**settings), progress=False)


def streamed(folder, out, settings, clients=3, **surroundings):
    return federate(
        folder,
        make_clients(clients),
        Settings(**settings),
        out=out,
        progress=False,
        surroundings=Surroundings(**surroundings),
    )


def shards_of(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {file.name: load_file(file) for file in files if file.name != "masks.safetensors"}


def assert_same_result(out, report, model, expected):
    """Weights, dtypes, masks, clients and layers, all to the bit."""
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    wanted = model.state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert found[name].dtype == weight.dtype, name
        assert torch.equal(found[name], weight), name
    masks = load_masks(out)
    assert masks.keys() == expected.masks.keys() == set(report.masks)
    for name, mask in masks.items():
        assert torch.equal(mask, expected.masks[name].mask()), name
        assert torch.equal(mask, report.masks[name].mask()), name
    # Of clients that pruned nothing the sparsity is nan, which equals nothing.
    assert str(report.clients) == str(expected.clients)
    assert report.layers == expected.layers
    assert report.unprunable == expected.unprunable
    sizes = ("type", "blocks", "parameters", "prunable")
    assert all(report.model[key] == expected.model[key] for key in sizes)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_architecture_gives_the_bits_of_the_model_in_memory(tmp_path, architecture, name):
    settings = SETTINGS[name]
    # Every architecture in both dtypes, every setting in both as well.
    half = (ARCHITECTURES.index(architecture) + list(SETTINGS).index(name)) % 2
    dtype, place = ((torch.float32, "auto"), (torch.bfloat16, "disk"))[half]
    dense = saved(tmp_path / "dense", architecture, dtype=dtype)
    report = streamed(dense, tmp_path / "out", settings, activations=place)
    assert_same_result(tmp_path / "out", report, *in_memory(dense, settings))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


SUMS = {"sparsity": 0.6, "aggregation": "statistics"}
EXCHANGES = {"sparsity": 0.5, "schedule": "synchronous", "synchronize_every": 2}
EXCHANGED = {
    "statistics": SUMS,
    "two blocks at a time": EXCHANGES,
    "statistics of two blocks, some clients absent": {
        **SUMS,
        **EXCHANGES,
        "rounds": 2,
        "ramp": "linear",
        "participation": 0.7,
        "layers_per_client": 4,
    },
    "one upload of statistics": {**SUMS, "schedule": "one-shot", "pruner": "wanda"},
    "masks of two blocks, scaled": {**EXCHANGES, "aggregation": "mask", "scaling": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("name", EXCHANGED)
def test_statistics_and_every_number_of_exchanges_give_the_bits_of_the_model_in_memory(
    tmp_path, name, place, dtype
):
    dense = saved(tmp_path / "dense", layers=5, dtype=dtype)
    report = streamed(dense, tmp_path / "out", EXCHANGED[name], activations=place)
    assert_same_result(tmp_path / "out", report, *in_memory(dense, EXCHANGED[name]))


@pytest.mark.parametrize("place", ["auto", "host", "disk"])
@pytest.mark.parametrize("settings", [SETTINGS["one-shot"], SETTINGS["synchronous"]])
def test_no_place_of_the_hidden_states_changes_a_bit(tmp_path, settings, place):
    dense = saved(tmp_path / "dense")
    settings = {**settings, "batch_size": 3}  # batches of two sizes
    report = streamed(dense, tmp_path / "out", settings, activations=place)
    assert_same_result(tmp_path / "out", report, *in_memory(dense, settings))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_the_output_has_the_checkpoints_shards_and_a_true_index(tmp_path, architecture):
    dense = saved(tmp_path / "dense", architecture)
    streamed(dense, tmp_path / "out", {"pattern": "2:4", "pruner": "magnitude"})
    before, after = shards_of(dense), shards_of(tmp_path / "out")
    assert len(before) > 3
    assert {name: list(shard) for name, shard in after.items()} == {
        name: list(shard) for name, shard in before.items()
    }
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == {name: file for file, shard in after.items() for name in shard}
    stored = sum(tensor.nbytes for shard in after.values() for tensor in shard.values())
    assert index["metadata"]["total_size"] == stored
    masks = load_masks(tmp_path / "out")
    for file, shard in after.items():
        for name, tensor in shard.items():
            if name.removesuffix(".weight") not in masks:
                assert torch.equal(tensor, before[file][name]), name
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.endswith(".partial")]


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    dense = tmp_path / "dense"
    save_with_tokenizer(make_model(), dense)
    (dense / "LICENSE").write_text("as it is\n")
    (dense / ".hidden").write_text("not this\n")
    streamed(dense, tmp_path / "out", {"sparsity": 0.5})
    for name in ("config.json", "generation_config.json", "tokenizer.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (dense / name).read_bytes(), name
    assert not (tmp_path / "out" / ".hidden").exists()
    assert not (tmp_path / "out" / INDEX).exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("word3")["input_ids"] == [3]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["layers"]) == 14
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "stored", "asked"),
    [
        ("one-shot", torch.float32, "bfloat16"),
        ("synchronous", torch.float32, "bfloat16"),
        ("synchronous", torch.bfloat16, "float32"),
    ],
)
def test_another_dtype_is_that_of_the_model_loaded_so(tmp_path, name, stored, asked):
    settings = SETTINGS[name]
    dense = saved(tmp_path / "dense", dtype=stored)
    report = streamed(dense, tmp_path / "out", settings, dtype=asked)
    model, expected = in_memory(dense, settings, dtype=asked)
    assert_same_result(tmp_path / "out", report, model, expected)
    shards = shards_of(tmp_path / "out")
    assert shards.keys() == shards_of(dense).keys()
    assert {t.dtype for shard in shards.values() for t in shard.values()} == {model.dtype}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == asked
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for shard in shards.values() for tensor in shard.values()
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_its_own_and_a_tied_one_stay_what_they_are(tmp_path, tied):
    model = make_model()
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    report = streamed(tmp_path / "dense", tmp_path / "out", SETTINGS["one-shot"])
    held = in_memory(tmp_path / "dense", SETTINGS["one-shot"])
    assert_same_result(tmp_path / "out", report, *held)
    names = {name for shard in shards_of(tmp_path / "out").values() for name in shard}
    assert ("lm_head.weight" in names) is not tied


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_more_than_two_blocks_are_ever_in_memory(tmp_path, monkeypatch, settings):
    dense = saved(tmp_path / "dense", layers=5)
    seen = []
    real_open, real_place, real_ask = StreamedBlocks.open, Weights.place, Weights.ask
    blocks = None

    def there():
        """The blocks of which a parameter is real, and the one that is read ahead."""
        placed = {
            index
            for index, block in enumerate(blocks.modules)
            if any(not parameter.is_meta for parameter in block.parameters())
        }
        return placed | ({blocks._ahead[0]} if blocks._ahead else set())

    def opened(self, index):
        nonlocal blocks
        blocks = self
        return real_open(self, index)

    def watched(real):
        def call(self, tensors):
            before = there() if blocks else set()
            done = real(self, tensors)
            seen.append(before | (there() if blocks else set()))
            return done

        return call

    monkeypatch.setattr(StreamedBlocks, "open", opened)
    monkeypatch.setattr(Weights, "place", watched(real_place))
    monkeypatch.setattr(Weights, "ask", watched(real_ask))

    def look(message):
        seen.append(there())
        block = blocks.modules[message.block]
        assert not any(parameter.is_meta for parameter in block.parameters())

    federate(
        dense,
        make_clients(5, samples=2),
        Settings(**settings),
        out=tmp_path / "out",
        progress=False,
        observe=look,
    )
    assert max(map(len, seen)) == 2
    assert all(max(indices) - min(indices) <= 1 for indices in seen if indices)
    assert blocks._ahead is None
    assert all(p.is_meta for block in blocks.modules for p in block.parameters())


def test_the_next_block_is_read_while_one_is_worked_on(tmp_path, monkeypatch):
    dense = saved(tmp_path / "dense", layers=4)
    real, ahead = StreamedBlocks._look_ahead, []
    monkeypatch.setattr(
        StreamedBlocks,
        "_look_ahead",
        lambda self, index: (real(self, index), ahead.append((self, index)))[0],
    )
    pruned = []

    def look(message):
        blocks, index = ahead[-1]
        assert index == message.block + 1
        if index < len(blocks):
            waiting, reading = blocks._ahead
            assert waiting == index
            assert all(f".{index}." in name for name in reading.result(timeout=20))
        pruned.append(message.block)

    federate(
        dense,
        make_clients(2),
        Settings(sparsity=0.5),
        out=tmp_path / "out",
        progress=False,
        observe=look,
    )
    assert pruned == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["sparsegpt", "magnitude"])
def test_one_round_reads_every_block_once(tmp_path, monkeypatch, name):
    dense = saved(tmp_path / "dense", layers=4)
    real, reads = Weights.ask, []

    def asked(self, names):
        names = list(names)
        reads.extend({name.split(".")[2] for name in names if ".layers." in name})
        return real(self, names)

    monkeypatch.setattr(Weights, "ask", asked)
    streamed(dense, tmp_path / "out", {"sparsity": 0.5, "pruner": name})
    assert reads == ["0", "1", "2", "3"]


def test_clients_in_another_order_and_of_other_capacities_change_no_bit(tmp_path):
    dense = saved(tmp_path / "dense", layers=4)
    settings = Settings(sparsity=0.5, layers_per_client=2, rounds=2, seed=3)
    clients = make_clients(3)
    for client, capacity in zip(clients, (0.5, 1.0, 1.0), strict=True):
        object.__setattr__(client, "capacity", capacity)
    for name, order in (("a", clients), ("b", clients[::-1])):
        federate(dense, order, settings, out=tmp_path / name, progress=False)
    for file, shard in shards_of(tmp_path / "a").items():
        again = load_file(tmp_path / "b" / file)
        assert all(torch.equal(tensor, again[name]) for name, tensor in shard.items())


def test_a_path_needs_an_output(tmp_path):
    dense = saved(tmp_path / "dense", layers=1)
    with pytest.raises(ValueError, match="give out=FOLDER"):
        federate(dense, make_clients(1), Settings(sparsity=0.5))
