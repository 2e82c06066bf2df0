"""What a federated run promises, on small random models."""

import math
from dataclasses import replace

import pytest
import torch
from small_models import LENGTH, make_clients, make_model

from fedspa import Client, Settings, federate
from fedspa.batches import choose_batch
from fedspa.calibration import BlockTask, calibrate
from fedspa.client import prune
from fedspa.compare import compare
from fedspa.model import decoder_blocks, layer_weights, linear_layers, weight_of
from fedspa.pruners import make_pruner
from fedspa.schedule import Target, round_target
from fedspa.walk import embed, run_block

HALF = Settings(sparsity=0.5)


def weights_of(model) -> dict[str, torch.Tensor]:
    """Every prunable weight, by block and layer."""
    return {
        f"{index}.{name}": weight
        for index, block in enumerate(decoder_blocks(model))
        for name, weight in layer_weights(block).items()
    }


def run(clients, settings, model=None, **more):
    """A federation on a fresh model: its weights and its report."""
    model = model or make_model()
    report = federate(model, clients, settings, **more)
    return weights_of(model), report


def same(left, right) -> bool:
    """Whether two sets of weights agree in every bit."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def prune_alone(client: Client, settings: Settings) -> dict[str, torch.Tensor]:
    """One client prunes a whole model by itself, written without any of the federation."""
    model, pruner = make_model(), make_pruner(settings)
    blocks = decoder_blocks(model)
    target = Target(sparsity=settings.sparsity, pattern=settings.pattern)
    stream = embed(model, blocks, client.tokens, choose_batch(model, LENGTH))
    for index, block in enumerate(blocks):
        task = BlockTask(0, index, "block", target)
        statistics = calibrate("alone", block, stream, task, pruner).statistics
        result = prune("alone", len(client.tokens), block, statistics, task, pruner)
        with torch.no_grad():
            for name, layer in linear_layers(block).items():
                weight_of(layer).copy_(result.weights[name])
            stream.hidden = [run_block(block, *inputs) for inputs in stream.inputs(index)]
    return weights_of(model)


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_one_client_one_round_is_its_own_pruning_bit_for_bit(pruner, target):
    settings = Settings(pruner=pruner, **target)
    client = make_clients(1)[0]
    weights, _ = run([client], settings)
    assert same(weights, prune_alone(client, settings))


def test_one_client_at_an_odd_sparsity_only_loses_what_rounding_down_left():
    settings = Settings(sparsity=0.6)
    client = make_clients(1)[0]
    weights, _ = run([client], settings)
    for name, alone in prune_alone(client, settings).items():
        kept = weights[name] != 0
        assert torch.equal(weights[name][kept], alone[kept])
        assert int((~kept).sum()) == math.ceil(0.6 * alone.numel())


@pytest.mark.parametrize("schedule", ["one-shot", "synchronous"])
@pytest.mark.parametrize("aggregation", ["l0", "mean", "mask"])
def test_the_order_of_clients_does_not_matter(schedule, aggregation):
    settings = Settings(sparsity=0.6, schedule=schedule, aggregation=aggregation)
    clients = make_clients(5)
    forward, report = run(clients, settings)
    backward, other = run(clients[::-1], settings)
    assert same(forward, backward)
    assert [c.name for c in report.clients] == [c.name for c in other.clients][::-1]


def test_the_order_of_unnamed_clients_does_not_matter_with_layer_sampling():
    settings = Settings(sparsity=0.6, layers_per_client=1, seed=3)
    clients = [replace(client, name=None) for client in make_clients(4)]
    assert same(run(clients, settings)[0], run(clients[2:] + clients[:2], settings)[0])


@pytest.mark.parametrize("schedule", ["one-shot", "synchronous"])
def test_same_seed_same_bits(schedule):
    settings = Settings(sparsity=0.6, schedule=schedule, layers_per_client=1, rounds=2, seed=5)
    first, report = run(make_clients(3), settings)
    second, again = run(make_clients(3), settings)
    assert same(first, second)
    assert report.layers == again.layers and report.clients == again.clients


def test_zeros_before_expansion_are_the_intersection():
    messages = []
    model = make_model()
    report = federate(model, make_clients(3), Settings(sparsity=0.6), observe=messages.append)
    assert len(messages) == 3 * 2
    for layer in report.layers:
        masks = [m.layers[layer.layer].mask() for m in messages if m.block == layer.block]
        pruned_by_all = ~torch.stack(masks).any(dim=0)
        assert layer.votes[0] == int(pruned_by_all.sum())
        final = report.masks[f"model.layers.{layer.block}.{layer.layer}"].mask()
        assert not bool((final & pruned_by_all).any())
        assert int((~final).sum()) == math.ceil(0.6 * final.numel())


@pytest.mark.parametrize("expansion", ["layer", "row", "column"])
def test_sparsity_is_exact_in_every_group_of_the_expansion(expansion):
    # Wanda prunes a whole number of every row; then rows and columns need not be over-pruned.
    settings = Settings(pruner="wanda", sparsity=0.6, expansion=expansion)
    _, report = run(make_clients(3), settings)
    for layer in report.masks.values():
        pruned = ~layer.mask()
        if expansion == "layer":
            assert int(pruned.sum()) == math.ceil(0.6 * pruned.numel())
        else:
            axis = 1 if expansion == "row" else 0
            counts, size = pruned.sum(dim=axis), pruned.shape[axis]
            assert int(counts.min()) >= math.ceil(0.6 * size)
            if expansion == "row":
                assert int(counts.max()) == math.ceil(0.6 * size)


@pytest.mark.parametrize("pruner", ["wanda", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_l0_over_mask_only_pruners_is_fedprllm(pruner, dtype):
    clients = make_clients(3)
    settings = Settings(pruner=pruner, sparsity=0.6)
    model = make_model(dtype=dtype)
    averaged, report = run(clients, settings, model)
    voted, by_votes = run(clients, replace(settings, aggregation="mask"), make_model(dtype=dtype))
    dense = weights_of(make_model(dtype=dtype))
    # The mean of three equal float32 numbers may be off by its last bit; of bfloat16 it is exact.
    tolerance = 2**-23 if dtype == torch.float32 else 0.0
    for name in dense:
        kept = averaged[name] != 0
        torch.testing.assert_close(averaged[name][kept], dense[name][kept], rtol=tolerance, atol=0)
        torch.testing.assert_close(averaged[name], voted[name], rtol=tolerance, atol=0)
    assert report.layers == by_votes.layers
    assert sum(c.bytes_up for c in by_votes.clients) < sum(c.bytes_up for c in report.clients) / 2


def test_synchronous_and_one_shot_agree_for_one_block():
    clients = make_clients(3)
    one_shot, _ = run(clients, Settings(sparsity=0.6), make_model(layers=1))
    synchronous = Settings(sparsity=0.6, schedule="synchronous")
    assert same(one_shot, run(clients, synchronous, make_model(layers=1))[0])


def test_synchronous_differs_from_one_shot_only_after_the_first_block():
    clients = make_clients(3)
    one_shot, _ = run(clients, Settings(sparsity=0.6))
    synchronous, _ = run(clients, Settings(sparsity=0.6, schedule="synchronous"))
    first = [name for name in one_shot if name.startswith("0.")]
    assert all(torch.equal(one_shot[name], synchronous[name]) for name in first)
    assert not same(one_shot, synchronous)


def test_synchronous_calibrates_on_the_agreed_block():
    clients, settings = make_clients(2), Settings(sparsity=0.5, schedule="synchronous")
    messages = []
    model = make_model()
    federate(model, clients, settings, observe=messages.append)
    # By hand: the first block as agreed, the second still dense, one client's statistics.
    half, pruner = make_model(), make_pruner(settings)
    blocks = decoder_blocks(half)
    stream = embed(half, blocks, clients[0].tokens, choose_batch(half, LENGTH))
    with torch.no_grad():
        for name, weight in layer_weights(decoder_blocks(model)[0]).items():
            weight_of(linear_layers(blocks[0])[name]).copy_(weight)
        stream.hidden = [run_block(blocks[0], *inputs) for inputs in stream.inputs(0)]
    task = BlockTask(0, 1, "block", Target(sparsity=0.5))
    statistics = calibrate("c0", blocks[1], stream, task, pruner).statistics
    expected = prune("c0", 4, blocks[1], statistics, task, pruner).weights
    sent = next(m for m in messages if m.sender == "c0" and m.block == 1)
    assert all(torch.equal(layer.weight(), expected[n]) for n, layer in sent.layers.items())


def test_layer_sampling_sends_and_changes_only_what_was_drawn():
    messages = []
    model, dense = make_model(layers=4), weights_of(make_model(layers=4))
    clients = [replace(client, capacity=0.25) for client in make_clients(2)]
    report = federate(model, clients, Settings(sparsity=0.5, seed=1), observe=messages.append)
    drawn = {client.name: client.blocks[0] for client in report.clients}
    assert all(len(blocks) == 1 for blocks in drawn.values())
    assert sorted((m.sender, m.block) for m in messages) == sorted(
        (name, block) for name, blocks in drawn.items() for block in blocks
    )
    touched = {block for blocks in drawn.values() for block in blocks}
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, dense[name]) == (int(name.split(".")[0]) not in touched)
    for client in report.clients:
        sent = sum(m.nbytes for m in messages if m.sender == client.name)
        assert client.bytes_up == sent
    assert {layer.block for layer in report.layers} == touched


def test_a_client_takes_blocks_that_it_did_not_draw_dense():
    """A client that drew the second block only calibrates it on the dense first one."""
    clients = make_clients(2)
    for seed in range(30):
        settings = Settings(sparsity=0.5, layers_per_client=1, seed=seed)
        messages = []
        federate(make_model(), clients, settings, observe=messages.append)
        if sorted(m.block for m in messages) == [0, 1]:
            break
    second = next(m for m in messages if m.block == 1)
    client = next(c for c in clients if c.name == second.sender)
    model, pruner = make_model(), make_pruner(settings)
    blocks = decoder_blocks(model)
    stream = embed(model, blocks, client.tokens, choose_batch(model, LENGTH))
    with torch.no_grad():
        stream.hidden = [run_block(blocks[0], *inputs) for inputs in stream.inputs(0)]
    task = BlockTask(0, 1, "block", Target(sparsity=0.5))
    statistics = calibrate("c", blocks[1], stream, task, pruner).statistics
    expected = prune("c", 4, blocks[1], statistics, task, pruner).weights
    assert all(torch.equal(layer.weight(), expected[n]) for n, layer in second.layers.items())


def test_blocks_of_later_rounds_reach_the_target_and_keep_their_zeros():
    settings = Settings(sparsity=0.6, layers_per_client=2, rounds=4, ramp="linear", seed=2)
    _, report = run(make_clients(3), settings, make_model(layers=3))
    by_layer: dict[tuple[int, str], list[float]] = {}
    for layer in report.layers:
        by_layer.setdefault((layer.block, layer.layer), []).append(layer.sparsity)
        expected = round_target(settings, layer.round).sparsity
        size = math.prod(layer.shape)
        assert round(layer.sparsity * size) == math.ceil(size * expected)
    assert all(shares == sorted(shares) for shares in by_layer.values())


def test_zeros_of_a_round_stay_in_the_next():
    seen = []
    settings = Settings(sparsity=0.6, rounds=2, ramp="linear")
    federate(make_model(), make_clients(2), settings, observe=seen.append)
    first = [m for m in seen if m.round == 0]
    second = [m for m in seen if m.round == 1]
    for later in second:
        for name, layer in later.layers.items():
            masks = [m.layers[name].mask() for m in first if m.block == later.block]
            pruned_by_all = ~torch.stack(masks).any(dim=0)
            assert not bool((layer.mask() & pruned_by_all).any())


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "magnitude"])
def test_a_block_at_its_target_is_left_alone_by_later_rounds(pruner):
    clients = make_clients(2)
    once, _ = run(clients, Settings(pruner=pruner, sparsity=0.6))
    twice, _ = run(clients, Settings(pruner=pruner, sparsity=0.6, rounds=2))
    assert all(torch.equal(once[n] == 0, twice[n] == 0) for n in once)
    assert all(torch.allclose(once[n], twice[n], atol=1e-6) for n in once)


def test_bytes_down_count_a_block_once_for_each_version_that_a_client_gets():
    settings = Settings(sparsity=0.5, layers_per_client=1, rounds=4, seed=4, ramp="linear")
    messages = []
    _, report = run(make_clients(3), settings, observe=messages.append)
    # By hand: version and size of every agreed block, and who holds which version.
    expected = {client.name: 0 for client in report.clients}
    holds: dict[tuple[str, int], int] = {}
    agreed: dict[int, tuple[int, int]] = {}
    fetched = 0
    for round_index in range(4):
        drawn = {client.name: client.blocks[round_index] for client in report.clients}
        for name, blocks in drawn.items():
            for block in blocks:
                if block in agreed and holds.get((name, block)) != agreed[block][0]:
                    expected[name] += agreed[block][1]
                    fetched += 1
        for block in {block for blocks in drawn.values() for block in blocks}:
            layers = [x for x in report.layers if (x.round, x.block) == (round_index, block)]
            kept = sum(round((1 - layer.sparsity) * layer.size) for layer in layers)
            size = 4 * kept + sum(layer.shape[0] * layer.shape[1] // 8 for layer in layers)
            agreed[block] = (round_index, size)
            for name, blocks in drawn.items():
                if block in blocks:
                    expected[name] += size
                    holds[name, block] = round_index
    assert fetched > 0
    assert {client.name: client.bytes_down for client in report.clients} == expected


def test_each_client_can_prune_to_its_own_sparsity():
    messages = []
    clients = [replace(c, sparsity=s) for c, s in zip(make_clients(2), (0.25, 0.5), strict=True)]
    federate(make_model(), clients, Settings(sparsity=0.5), observe=messages.append)
    for message in messages:
        share = 0.25 if message.sender == "c0" else 0.5
        for layer in message.layers.values():
            assert int((~layer.mask()).sum()) == int(layer.mask().numel() * share)


def test_messages_in_bfloat16_are_half_of_float32_and_what_the_model_then_holds():
    weights, small = run(make_clients(2), Settings(sparsity=0.5, message_dtype="bfloat16"))
    _, large = run(make_clients(2), HALF)
    mask_bytes = sum(layer.bits.nbytes for layer in large.masks.values())
    for few, many in zip(small.clients, large.clients, strict=True):
        assert (many.bytes_up - mask_bytes) == 2 * (few.bytes_up - mask_bytes)
    assert all(torch.equal(w, w.to(torch.bfloat16).float()) for w in weights.values())


def test_a_users_own_pruner_is_asked_for_everything():
    class Rows:
        """Prunes the left half of every row, after having seen all tokens."""

        needs_inputs = True

        def gather(self, statistic, inputs):
            return inputs.sum(dim=0) if statistic is None else statistic + inputs.sum(dim=0)

        def prune(self, weight, statistic, target, support):
            from fedspa_kernels import Pruned

            assert statistic.shape == weight.shape[1:]
            mask = torch.ones_like(weight, dtype=torch.bool)
            mask[:, : int(weight.shape[1] * target.sparsity)] = False
            return Pruned(weight * mask, mask, None)

    weights, report = run(make_clients(2), Settings(pruner=Rows(), sparsity=0.5))
    assert all(not w[:, : w.shape[1] // 2].any() for w in weights.values())
    assert "Rows" in report.settings["pruner"]


def test_comparison_has_every_row_and_leaves_the_federated_model():
    model, clients = make_model(), make_clients(2)
    heldout = {"a": make_clients(3)[2].tokens, "b": clients[0].tokens}
    report = compare(model, clients, Settings(sparsity=0.6), heldout, progress=False)
    assert [m.name for m in report.methods] == [
        "dense",
        "c0 alone",
        "c1 alone",
        "plain mean + expansion",
        "FedSpaLLM",
        "centralised",
    ]
    federated, _ = run(clients, Settings(sparsity=0.6))
    assert same(weights_of(model), federated)
    dense, *alone, mean, ours, central = report.methods
    assert dense.sparsity == 0.0 and all(m.sparsity < 0.6 for m in alone)
    assert 0.6 <= ours.sparsity == mean.sparsity < 0.601
    assert dense.bytes_up == alone[0].bytes_up == 0
    assert ours.bytes_up == mean.bytes_up == report.clients[0].bytes_up
    assert central.bytes_up == clients[0].tokens.numel() * 4
    assert all(set(m.perplexity) == {"a", "b"} for m in report.methods)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"schedule": "synchronous"}, "FedSpaLLM, synchronous"),
        ({"aggregation": "mask"}, "FedPrLLM"),
        ({"aggregation": "mean"}, "plain mean + expansion"),
        ({"rounds": 2, "ramp": "linear"}, "FedSpaLLM, 2 rounds"),
    ],
)
def test_the_baselines_are_the_same_whatever_they_are_compared_with(values, name):
    clients, heldout = make_clients(2), {"a": make_clients(3)[2].tokens}
    plain = compare(make_model(), clients, HALF, heldout, progress=False)
    model = make_model()
    other = compare(model, clients, replace(HALF, **values), heldout, progress=False)
    assert other.result == name and other.methods.index(other.final_method) >= 3
    rows = {method.name: method for method in plain.methods}
    for method in other.methods:
        if method.name in rows:
            assert method == rows[method.name]
    assert {"dense", "c0 alone", "c1 alone", "plain mean + expansion", "centralised"} <= {
        method.name for method in other.methods
    }
    assert same(weights_of(model), run(clients, replace(HALF, **values))[0])


def test_the_same_tokens_in_another_shape_are_another_client():
    tokens = make_clients(1)[0].tokens
    clients = [Client(tokens), Client(tokens.reshape(2, -1)), *make_clients(2)]
    settings = Settings(sparsity=0.6, layers_per_client=1, seed=3)
    swapped = [clients[1], clients[0], *clients[2:]]
    assert same(run(clients, settings)[0], run(swapped, settings)[0])


def test_a_model_comes_back_in_the_mode_that_it_came_in():
    model = make_model().train()
    federate(model, make_clients(1), HALF)
    assert model.training


def test_standalone_rows_are_the_clients_own_models():
    clients = make_clients(2)
    heldout = {"a": make_clients(3)[2].tokens}
    report = compare(make_model(), clients, HALF, heldout, progress=False)
    for client in clients:
        alone = compare(make_model(), [client], HALF, heldout, baselines=False, progress=False)
        row = next(m for m in report.methods if m.name == f"{client.name} alone")
        assert row.perplexity == alone.methods[-1].perplexity
