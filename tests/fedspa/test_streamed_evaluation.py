"""Perplexity of a model whose blocks are there one at a time: the bits of the model in memory."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from small_models import COMMON, GROUPED, SPECIAL, VOCABULARY, make_clients, make_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
)

from fedspa.blocks import HeldBlocks
from fedspa.evaluate import domain_perplexity
from fedspa.streaming.activations import Hidden
from fedspa.streaming.evaluate import streamed_perplexity
from fedspa.walk import Stream

WINDOWS = {
    "a": make_clients(1, samples=5)[0].tokens,
    "b": make_clients(2, samples=3, length=24)[1].tokens,
}


class OneAtATime(HeldBlocks):
    """Weights are on the meta device but for the open block, or those outside the blocks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.opened: list[int] = []
        self._outside = [
            module
            for module in model.modules()
            if not any(module is inner for block in self.modules for inner in block.modules())
            and any(True for _ in module.parameters(recurse=False))
        ]
        self._kept = {id(module): module.state_dict() for module in [*self.modules, *self._outside]}
        for module in (*self.modules, *self._outside):
            module.to("meta")

    @contextmanager
    def _there(self, modules):
        for module in modules:
            module.load_state_dict(self._kept[id(module)], assign=True)
        yield modules[0]
        for module in modules:
            module.to("meta")

    def embedding(self):
        """Block 0 as well."""
        return self._there([*self._outside, self.modules[0]])

    def head(self):
        """No block."""
        return self._there(self._outside)

    def open(self, index):
        """This block and nothing else."""
        self.opened.append(index)
        return self._there([self.modules[index]])


@pytest.mark.parametrize("batch", [None, 2])
def test_every_architecture_has_the_bits_of_the_model_in_memory(architecture, batch):
    model = make_model(architecture, layers=3)
    expected = domain_perplexity(model, WINDOWS, batch_size=batch)
    assert streamed_perplexity(model, HeldBlocks(model), WINDOWS, batch_size=batch) == expected
    assert all("forward" not in vars(block) for block in HeldBlocks(model).modules)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_same_bits_too(dtype):
    model = make_model("llama", dtype=dtype)
    expected = domain_perplexity(model, WINDOWS)
    assert streamed_perplexity(model, HeldBlocks(model), WINDOWS) == expected


SIZES = {**COMMON, **SPECIAL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PECULIAR = {
    "capped logits": Gemma2Config(
        **SIZES, **GROUPED, head_dim=8, final_logit_softcapping=0.1, sliding_window=8
    ),
    "scaled logits": CohereConfig(**SIZES, **GROUPED, logit_scale=9.0),
    "divided logits": GraniteConfig(**SIZES, **GROUPED, logits_scaling=0.1),
    "tied head": LlamaConfig(**SIZES, **GROUPED, tie_word_embeddings=True),
    "projections around the blocks": OPTConfig(
        **SIZES, ffn_dim=64, word_embed_proj_dim=16, dropout=0.0
    ),
}


@pytest.mark.parametrize("name", PECULIAR)
def test_what_an_architecture_does_around_its_blocks_is_done(name):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(PECULIAR[name]).eval()
    expected = domain_perplexity(model, WINDOWS)
    assert streamed_perplexity(model, HeldBlocks(model), WINDOWS) == expected


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_each_block_is_opened_once_and_no_other_weight_is_needed_meanwhile(name):
    model = make_model(name, layers=3)
    expected = domain_perplexity(model, WINDOWS)
    blocks, steps = OneAtATime(model), []
    found = streamed_perplexity(model, blocks, WINDOWS, advance=lambda: steps.append(1))
    assert found == expected
    assert blocks.opened == [0, 1, 2]
    assert len(steps) == 3 + 1
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("placement", ["gpu", "host", "disk"])
def test_hidden_states_may_lie_anywhere_and_leave_no_file(tmp_path, placement, monkeypatch):
    model, most = make_model(layers=3), []
    settle = Hidden.settle

    def settle_and_count(hidden):
        settle(hidden)
        most.append(len(list(tmp_path.iterdir())))

    monkeypatch.setattr(Hidden, "settle", settle_and_count)
    expected = domain_perplexity(model, WINDOWS)
    streams = {name: Stream(Hidden("cpu", placement, tmp_path, name), {}) for name in WINDOWS}
    assert streamed_perplexity(model, HeldBlocks(model), WINDOWS, streams=streams) == expected
    assert max(most) == len(WINDOWS)
    assert list(tmp_path.iterdir()) == []
    assert all(len(stream.hidden) == 0 for stream in streams.values())


class TupleModel(nn.Module):
    """Blocks that return a tuple, as older architectures write them."""

    class Block(nn.Module):
        """One linear layer."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden_states):
            """Hidden states and something else."""
            return hidden_states + self.linear(hidden_states), "attention weights"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=2)
        self.config.get_text_config = lambda decoder: self.config
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList(TupleModel.Block() for _ in range(2))
        self.head = nn.Linear(8, VOCABULARY)

    def get_input_embeddings(self):
        """As transformers' models tell."""
        return self.embedding

    def forward(self, input_ids, use_cache=False):
        """The blocks in turn, each output taken apart."""
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden, beside = block(hidden)
            assert beside == "attention weights"
        return SimpleNamespace(logits=self.head(hidden))


def test_blocks_that_return_tuples_are_evaluated_too():
    torch.manual_seed(0)
    model = TupleModel().eval()
    expected = domain_perplexity(model, WINDOWS)
    assert streamed_perplexity(model, HeldBlocks(model), WINDOWS) == expected


def test_a_changed_last_block_changes_the_result():
    model = make_model()
    blocks = HeldBlocks(model)
    before = streamed_perplexity(model, blocks, WINDOWS)
    with torch.no_grad():
        blocks.modules[-1].mlp.down_proj.weight.zero_()
    after = streamed_perplexity(model, blocks, WINDOWS)
    assert after != before and after == domain_perplexity(model, WINDOWS)


def test_logits_that_are_no_numbers_give_nan():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    found = streamed_perplexity(model, HeldBlocks(model), WINDOWS)
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize(
    "windows, sentence",
    [
        (torch.zeros(3, 1).long(), r"perplexity on a: windows have shape \(3, 1\)"),
        (torch.full((2, 8), VOCABULARY), "perplexity on a: the text"),
    ],
)
def test_windows_that_cannot_be_read_are_refused_before_a_block_is_opened(windows, sentence):
    model = make_model()
    blocks = OneAtATime(model)
    with pytest.raises(ValueError, match=sentence):
        streamed_perplexity(model, blocks, {"a": windows})
    assert blocks.opened == []
