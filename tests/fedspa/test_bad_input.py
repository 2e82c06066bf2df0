"""Every mistake gets one sentence with the values and a way out, before any work is done."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import VOCABULARY, make_clients, make_model
from torch import nn
from transformers import T5Config

from fedspa import Client, Settings, federate, load
from fedspa.compare import compare
from fedspa.model import decoder_blocks
from fedspa.walk import embed


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sparsity": 1.0}, r"sparsity 1.0 is outside \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity -0.1 is outside"),
        ({"sparsity": float("nan")}, r"sparsity nan is outside"),
        ({"sparsity": "60%"}, r"sparsity '60%' is outside"),
        ({}, "exactly one of sparsity and pattern"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "exactly one of sparsity and pattern"),
        ({"pattern": "4:4"}, "'4:4' keeps 4 of 4"),
        ({"pattern": "2-4"}, "'2-4'"),
        ({"pattern": 24}, "pattern must be a text such as '2:4', not 24"),
        ({"sparsity": 0.5, "damping": "x"}, "damping must be 0 or more, not 'x'"),
        ({"sparsity": 0.5, "seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"pattern": "2:4", "block_size": 6}, "block_size 6 is not a multiple of the 4"),
        ({"pattern": "2:4", "ramp": "cubic", "rounds": 2}, "ramp 'cubic' needs a sparsity"),
        ({"pattern": "2:4", "expansion": "row"}, "expansion 'row' has no meaning"),
        ({"sparsity": 0.5, "pruner": "wonda"}, r"pruner 'wonda' is unknown.*'wanda'"),
        ({"sparsity": 0.5, "aggregation": "median"}, r"aggregation 'median'.*'l0'"),
        ({"sparsity": 0.5, "schedule": "async"}, r"schedule 'async'.*'synchronous'"),
        ({"sparsity": 0.5, "expansion": "block"}, r"expansion 'block'.*'layer'"),
        ({"sparsity": 0.5, "weighting": "bytes"}, r"weighting 'bytes'.*'samples'"),
        ({"sparsity": 0.5, "message_dtype": "int8"}, r"message_dtype 'int8'.*'bfloat16'"),
        ({"sparsity": 0.5, "rounds": 0}, "rounds must be a whole number of at least 1, not 0"),
        ({"sparsity": 0.5, "batch_size": 1.5}, "batch_size must be a whole number"),
        ({"sparsity": 0.5, "layers_per_client": 0}, "layers_per_client must be"),
        ({"sparsity": 0.5, "damping": -1.0}, "damping must be 0 or more, not -1.0"),
    ],
)
def test_impossible_settings(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**values)


def refuse(match, model=None, clients=None, settings=None, error=ValueError):
    """A run must end with that sentence and leave the model as it was."""
    model = model or make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        federate(
            model,
            make_clients(2) if clients is None else clients,
            settings or Settings(sparsity=0.5),
        )
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name].nan_to_num(7), parameter.nan_to_num(7)), name


def test_a_pattern_that_does_not_divide_the_width_names_the_layer():
    refuse(
        r"model.layers.0.self_attn.q_proj has 32 inputs, which a pattern over every 5",
        settings=Settings(pattern="2:5", block_size=10),
    )


def test_clients_that_cannot_take_part():
    tokens = make_clients(1)[0].tokens
    refuse("no clients", clients=[])
    refuse("capacity 0", clients=[Client(tokens, capacity=0.0)])
    refuse("capacity 1.5", clients=[Client(tokens, capacity=1.5)])
    refuse("capacity 'half'", clients=[Client(tokens, capacity="half")])
    refuse("sparsity 1.0", clients=[Client(tokens, sparsity=1.0)])
    refuse("named 'a'", clients=[Client(tokens, name="a"), Client(tokens, name="a")])
    refuse(f"token id {VOCABULARY} ", clients=[Client(torch.full((1, 8), VOCABULARY))])
    refuse("token id -1", clients=[Client(torch.full((1, 8), -1))])
    refuse("int64", clients=[Client(tokens.float())])
    refuse("0 samples", clients=[Client(tokens[:0])])
    refuse("65 tokens are longer than the 64", clients=[Client(torch.zeros(1, 65).long())])
    refuse(
        "client 'a' has its own sparsity 0.3, which the pattern '2:4'",
        clients=[Client(tokens, name="a", sparsity=0.3)],
        settings=Settings(pattern="2:4"),
    )
    refuse(
        "needs clients for 2 blocks, but their capacities add up to 1",
        clients=[Client(tokens, capacity=0.5)],
        settings=Settings(sparsity=0.5, every_block=True),
    )


def test_a_model_without_decoder_blocks():
    refuse("Linear has no list of decoder blocks", model=nn.Linear(4, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(value):
    model = make_model()
    with torch.no_grad():
        decoder_blocks(model)[1].mlp.up_proj.weight[3, 5] = value
    refuse("model.layers.1.mlp.up_proj holds 1 weights that are NaN or infinite", model=model)


def test_a_weight_that_two_blocks_share():
    model = make_model()
    blocks = decoder_blocks(model)
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    refuse("layers.1.mlp.up_proj shares its weight with model.layers.0.mlp.up_proj", model=model)


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda"])
def test_activations_that_are_not_finite_name_the_layer_and_the_client(pruner):
    model = make_model()
    clients = [
        Client(torch.randint(0, 50, (2, 8)), name="good"),
        Client(torch.full((2, 8), 90), name="bad"),
    ]
    with torch.no_grad():
        model.get_input_embeddings().weight[90] = float("inf")
    settings = Settings(pruner=pruner, sparsity=0.5)
    refuse(
        r"client 'bad', layer model.layers.0.self_attn.q_proj: its activations",
        model=model,
        clients=clients,
        settings=settings,
    )


def test_a_singular_hessian_names_client_layer_damping_and_samples():
    clients = [Client(make_clients(1)[0].tokens[:1, :4], name="few")]
    refuse(
        r"client 'few', layer model.layers.0.self_attn.q_proj and .*v_proj, 1 calibration windows: "
        r".*not positive definite after damping 0.0",
        clients=clients,
        settings=Settings(sparsity=0.5, damping=0.0),
    )


def test_a_pruner_without_the_three_attributes():
    refuse("no attribute 'needs_inputs'", settings=Settings(pruner=object(), sparsity=0.5))


def test_a_path_needs_a_place_for_the_result(tmp_path):
    with pytest.raises(ValueError, match="give out=FOLDER"):
        federate(str(tmp_path), make_clients(1), Settings(sparsity=0.5))


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="there is no folder or file"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="there is no file"):
        load(tmp_path / "nothing.gguf")
    with pytest.raises(ValueError, match="dtype 'int8' is unknown"):
        load(tmp_path, dtype="int8")
    with pytest.raises(RuntimeError, match="device 'cuda:99' cannot be used here"):
        load(tmp_path, device="cuda:99")
    with pytest.raises(RuntimeError, match="neither a folder here nor a model that could be"):
        load("nobody/no-such-model")


def test_quantised_checkpoints_are_refused_with_a_way_out(tmp_path):
    model = make_model()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantised weights.*the checkpoint that it was"):
        load(tmp_path)


def test_clients_are_named_alike_in_results_and_errors():
    clients = [replace(client, name=None) for client in make_clients(2)]
    report = federate(make_model(), clients, Settings(sparsity=0.5))
    assert [client.name for client in report.clients] == ["client 1", "client 2"]
    refuse(
        "client 'client 2' has capacity", clients=[clients[0], replace(clients[1], capacity=2.0)]
    )
    taken = [replace(clients[0], name="client 2"), clients[1]]
    refuse("named 'client 2'", clients=taken)


def test_a_checkpoint_that_lacks_weights_is_not_filled_with_random_ones(tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*model.layers.1.mlp.up_proj.weight"):
        load(tmp_path)


def test_a_checkpoint_with_tied_weights_lacks_nothing(tmp_path):
    model = make_model("gemma")
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load(tmp_path).model
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_broken_checkpoints_name_what_is_broken(tmp_path):
    make_model().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="the weights of .* cannot be read.*copy them again"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="the configuration in .* is broken"):
        load(tmp_path)
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 't5', which is no causal language model"):
        load(tmp_path)


def test_dtypes_that_are_not_pruned():
    refuse(r"q_proj is torch.float64; load the model in", model=make_model(dtype=torch.float64))


def test_messages_too_small_for_a_weight_name_the_layer():
    model = make_model()
    with torch.no_grad():
        decoder_blocks(model)[0].mlp.up_proj.weight[0, 0] = 1e6
    refuse(
        r"layer model.layers.0.mlp.up_proj.*does not fit into messages of float16",
        model=model,
        settings=Settings(pruner="magnitude", sparsity=0.5, message_dtype="float16"),
    )


def test_blocks_that_see_the_tokens_are_refused():
    class Spy(nn.Module):
        """A block with an argument that depends on the tokens."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden_states, extra):
            return self.linear(hidden_states) + extra

    class Model(nn.Module):
        """Two of them."""

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, 8)
            self.blocks = nn.ModuleList([Spy(), Spy()])

        def forward(self, input_ids, use_cache=False):
            hidden = extra = self.embedding(input_ids)
            for block in self.blocks:
                hidden = block(hidden, extra)
            return hidden

    model = Model()
    with pytest.raises(ValueError, match="arguments that depend on the tokens"):
        embed(model, model.blocks, torch.randint(VOCABULARY, (2, 8)), 1)


@pytest.mark.parametrize(
    ("windows", "sentence"),
    [
        (torch.zeros(3, 1).long(), r"perplexity on held: windows have shape \(3, 1\)"),
        (torch.zeros(0, 8).long(), r"windows have shape \(0, 8\)"),
        (torch.zeros(1, 65).long(), "65 tokens are longer than the 64 positions"),
        (torch.full((1, 8), VOCABULARY), f"token id {VOCABULARY}"),
    ],
)
def test_evaluation_windows_are_checked_before_any_pruning(windows, sentence):
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=sentence):
        compare(model, make_clients(2), Settings(sparsity=0.5), {"held": windows})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
