"""Every architecture: each linear of the blocks is pruned to target, the rest keeps its bits."""

import math

import pytest
import torch
from small_models import LENGTH, VOCABULARY, make_clients, make_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from fedspa import Settings, federate
from fedspa.calibration import BlockTask, calibrate
from fedspa.model import (
    block_names,
    decoder_blocks,
    linear_layers,
    unprunable_weights,
    weight_of,
)
from fedspa.pruners import SparseGPT
from fedspa.schedule import Target
from fedspa.walk import Stream, embed, run_block

# Linear layers in one block of each architecture, counted in the papers' own figures.
LAYERS = {
    "opt": 6,
    "llama": 7,
    "mistral": 7,
    "qwen2": 7,
    "qwen3": 7,
    "gemma": 7,
    "gpt2": 4,
    "gpt_neox": 4,
    "phi3": 4,
}


def zeros_per_layer(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Zeros and size of every prunable weight by full name."""
    blocks = decoder_blocks(model)
    found = {}
    for prefix, block in zip(block_names(model, blocks), blocks, strict=True):
        for name, layer in linear_layers(block).items():
            weight = weight_of(layer)
            found[f"{prefix}.{name}"] = (int((weight == 0).sum()), weight.numel())
    return found


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "magnitude"])
def test_every_linear_is_pruned_exactly_to_target(architecture, pruner):
    model = make_model(architecture)
    federate(model, make_clients(3), Settings(pruner=pruner, sparsity=0.6))
    layers = zeros_per_layer(model)
    assert len(layers) == 2 * LAYERS[architecture]
    assert {name: zeros for name, (zeros, _) in layers.items()} == {
        name: math.ceil(size * 0.6) for name, (_, size) in layers.items()
    }


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "magnitude"])
def test_patterns_hold_in_every_group_along_the_inputs(architecture, pruner, pattern):
    model = make_model(architecture)
    federate(model, make_clients(2), Settings(pruner=pruner, pattern=pattern))
    kept, group = map(int, pattern.split(":"))
    for block in decoder_blocks(model):
        for layer in linear_layers(block).values():
            groups = weight_of(layer).reshape(-1, group)
            assert bool(((groups != 0).sum(dim=1) == kept).all())


def test_everything_else_is_bit_identical(architecture):
    model, dense = make_model(architecture), make_model(architecture)
    report = federate(model, make_clients(2), Settings(sparsity=0.5))
    pruned = {f"{name}.weight" for name in report.masks}
    before = dict(dense.named_parameters()) | dict(dense.named_buffers())
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in pruned), name


def test_walking_the_blocks_is_the_models_own_forward(architecture):
    model = make_model(architecture, layers=3)
    tokens = make_clients(1, samples=5)[0].tokens
    blocks = decoder_blocks(model)
    entered = {}

    def note(block, args, kwargs):
        entered[block] = args[0] if args else kwargs["hidden_states"]

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    stream = embed(model, blocks, tokens, batch_size=2)
    assert [hidden.shape[0] for hidden in stream.hidden] == [2, 2, 1]
    for index, block in enumerate(blocks):
        torch.testing.assert_close(torch.cat(stream.hidden), entered[block])
        with torch.no_grad():
            stream.hidden = [run_block(block, *inputs) for inputs in stream.inputs(index)]


def test_recording_leaves_the_models_forward_as_it_was():
    model = make_model("llama")
    tokens = make_clients(1)[0].tokens
    with torch.no_grad():
        before = model(input_ids=tokens).logits
    embed(model, decoder_blocks(model), tokens, batch_size=1)
    assert all("forward" not in vars(block) for block in decoder_blocks(model))
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, before)


class TupleBlock(nn.Module):
    """A block as older architectures write it: its output is a tuple."""

    def __init__(self) -> None:
        """One linear layer."""
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states):
        """Hidden states and something else."""
        return hidden_states + self.linear(hidden_states), "attention weights"


class TupleModel(nn.Module):
    """Three such blocks."""

    def __init__(self) -> None:
        """Embedding and blocks."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList(TupleBlock() for _ in range(3))

    def forward(self, input_ids, use_cache=False):
        """The blocks in turn, each output taken apart."""
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden, _ = block(hidden)
        return hidden


def test_blocks_that_return_tuples_are_walked_too():
    torch.manual_seed(0)
    model = TupleModel()
    tokens = torch.randint(VOCABULARY, (3, LENGTH))
    stream = embed(model, model.blocks, tokens, batch_size=1)
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            stream.hidden = [run_block(block, *inputs) for inputs in stream.inputs(index)]
        torch.testing.assert_close(torch.cat(stream.hidden), model(tokens))


def test_weights_outside_linear_layers_are_named_in_the_report():
    model = make_model("llama")
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.randn(2, 4, 4))
    model.model.layers[1].mlp.experts = experts
    expected = ("model.layers.1.mlp.experts.gate_up_proj",)
    assert unprunable_weights(model, decoder_blocks(model)) == expected
    report = federate(model, make_clients(1), Settings(sparsity=0.5))
    assert report.unprunable == expected


def test_a_mixture_of_experts_prunes_its_attention_and_names_the_rest():
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config)
    report = federate(model, make_clients(2), Settings(sparsity=0.5))
    assert {layer.layer.split(".")[0] for layer in report.layers} == {"self_attn"}
    assert "model.layers.0.mlp.experts.gate_up_proj" in report.unprunable
    assert "model.layers.0.mlp.experts.down_proj" in report.unprunable


def test_layers_with_one_input_share_one_statistic():
    model = make_model("llama")
    blocks = decoder_blocks(model)
    stream: Stream = embed(model, blocks, make_clients(1)[0].tokens, batch_size=1)
    task = BlockTask(0, 0, "block", Target(sparsity=0.5))
    statistics = calibrate("c", blocks[0], stream, task, SparseGPT()).statistics
    distinct = {id(statistic) for statistic in statistics.values()}
    assert len(statistics) == 7 and len(distinct) == 4
    assert statistics["self_attn.q_proj"] is statistics["self_attn.v_proj"]
    assert statistics["mlp.gate_proj"] is statistics["mlp.up_proj"]


def test_calibration_gathers_every_token_of_every_layer_once():
    model = make_model("llama")
    blocks = decoder_blocks(model)
    seen: dict[str, list[torch.Tensor]] = {}
    layers = linear_layers(blocks[0])
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(
                args[0].reshape(-1, args[0].shape[-1])
            )
        )
    stream = embed(model, blocks, make_clients(1, samples=5)[0].tokens, batch_size=2)
    seen.clear()
    task = BlockTask(0, 0, "block", Target(sparsity=0.5))
    statistics = calibrate("c", blocks[0], stream, task, SparseGPT()).statistics
    for name in layers:
        inputs = torch.cat(seen[name]).double()
        torch.testing.assert_close(
            statistics[name].double(), inputs.T @ inputs, rtol=1e-4, atol=1e-4
        )
