"""How many windows go through a block at once."""

import math
from types import SimpleNamespace

import pytest
import torch
from small_models import LENGTH, VOCABULARY, make_clients, make_model

from fedspa import Settings, batches, federate
from fedspa.batches import choose_batch, tokens_that_fit
from fedspa.evaluate import perplexity
from fedspa.model import decoder_blocks, layer_weights


def test_a_cpus_batch_fills_its_tokens_and_never_less_than_a_window():
    model = make_model()
    assert [choose_batch(model, length) for length in (1, 16, 300, 512, 4096)] == [512, 32, 1, 1, 1]


def test_a_gpus_batch_is_bounded_by_tokens_and_by_memory(monkeypatch):
    model = make_model()
    memory = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(batches, "device_of", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert choose_batch(model, 2048) == 8
    memory.total_memory = 2**23
    tokens = tokens_that_fit(model, 16, 0, 2**23)
    assert 16 < tokens < 16384 and choose_batch(model, 16) == tokens // 16
    assert choose_batch(model, 16, logits=VOCABULARY) < choose_batch(model, 16)
    memory.total_memory = 0
    assert choose_batch(model, 16) == 1


def test_memory_is_counted_by_hand():
    model = make_model()
    model.config._attn_implementation = "sdpa"
    weights = 4 * sum(p.numel() for p in model.parameters())
    # q and o: 32 + 32; k and v: 32 + 16; gate, up and down: 32 + 64, of 4 bytes each.
    a_token = 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert tokens_that_fit(model, 16, 0, weights + 4 * 10 * a_token) == 10
    assert tokens_that_fit(model, 16, 100, weights + 4 * 10 * (a_token + 12 * 100)) == 10
    model.config._attn_implementation = "eager"
    scores = 4 * 16 * (4 + 4)
    assert tokens_that_fit(model, 16, 0, weights + 4 * 10 * (a_token + scores)) == 10


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda"])
def test_batches_change_only_rounding(pruner):
    pruned = []
    for batch in (None, 1, 3):
        model = make_model()
        federate(model, make_clients(2), Settings(pruner=pruner, sparsity=0.5, batch_size=batch))
        pruned.append([layer_weights(block) for block in decoder_blocks(model)])
    for other in pruned[1:]:
        for block, weights in zip(pruned[0], other, strict=True):
            for name, weight in block.items():
                close = torch.isclose(weight, weights[name], atol=1e-5)
                assert close.float().mean() > 0.99


def test_perplexity_does_not_depend_on_batches_or_chunks(monkeypatch):
    model, windows = make_model(), make_clients(1, samples=5)[0].tokens
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].double()
    losses = -logits.log_softmax(-1).gather(2, windows[:, 1:, None])
    expected = math.exp(losses.mean())
    seen = []
    for batch in (None, 1, 2):
        found = perplexity(model, windows, batch_size=batch, advance=lambda: seen.append(1))
        assert found == pytest.approx(expected, rel=1e-6)
    assert len(seen) == 3 * 5
    monkeypatch.setattr("fedspa.evaluate.ENTRIES", {"cpu": 3 * VOCABULARY})
    assert perplexity(model, windows) == pytest.approx(expected, rel=1e-6)
    assert LENGTH * 5 % 3  # the last chunk is smaller
