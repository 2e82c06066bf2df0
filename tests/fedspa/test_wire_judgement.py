"""What a server believes: every honest client's numbers, and nothing that no client can have."""

from dataclasses import replace

import pytest
import torch
from small_models import make_clients, make_model
from wire_frames import ENVELOPE, block, sums

from fedspa import Client, Settings, federate
from fedspa import client as local
from fedspa.blocks import views
from fedspa.messages import BlockMessage, LayerMessage, pack_layer
from fedspa.model import decoder_blocks
from fedspa.pruners import make_pruner
from fedspa.schedule import Target
from fedspa.sums import ONE, ROOM
from fedspa.triangle import pack_triangle, triangle_diagonal, triangle_size
from fedspa.wire import (
    Expected,
    decode,
    encode,
    judge_definite,
    judge_finite,
    judge_mean_squares,
    judge_statistics,
    judge_weights,
    mean_squares,
    square_limits,
)

NUMBERS = (torch.float32, torch.bfloat16, torch.int64)
BOUND = 10.0


# Honest clients always pass.


def judged_messages(monkeypatch, settings, clients, name="llama", dtype=torch.float32):
    """Run a federation in which every block that a client prunes is sent, received and judged."""
    received = []
    prune = local.prune

    def sent_and_judged(who, samples, module, statistics, task, *more, **named):
        result = prune(who, samples, module, statistics, task, *more, **named)
        dense = views(module)
        shapes = {layer: tuple(weight.shape) for layer, weight in dense.items()}
        kind = "mask" if task.mask_only else "weights"
        of = None if task.mask_only else task.message_dtype or dtype
        place = (who, task.round, task.block, samples)
        got = decode(encode(result.message, ENVELOPE), Expected(ENVELOPE, *place, shapes, kind, of))
        judge_weights(got, dense, task.target, task.support, BOUND)
        received.append(got)
        return result

    monkeypatch.setattr(local, "prune", sent_and_judged)
    federate(make_model(name, dtype=dtype), clients, settings)
    assert {(m.round, m.sender) for m in received} == {
        (round_index, member.name) for round_index in range(settings.rounds) for member in clients
    }
    return received


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(
    "target", [{"sparsity": s} for s in (0.0, 0.5, 0.7, 0.999)] + [{"pattern": "2:4"}]
)
def test_every_built_in_pruner_passes(monkeypatch, pruner, target):
    settings = Settings(pruner=pruner, **target)
    received = judged_messages(monkeypatch, settings, make_clients(2, samples=2))
    assert any(layer.values.numel() for m in received for layer in m.layers.values())


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(
    "target", [{"sparsity": s} for s in (0.0, 0.5, 0.7, 0.99)] + [{"pattern": "2:4"}]
)
def test_a_second_round_passes(monkeypatch, pruner, target):
    """Within what the first one left; at 0.999 nothing of so small a model would be left."""
    settings = Settings(pruner=pruner, rounds=2, **target)
    judged_messages(monkeypatch, settings, make_clients(2, samples=2))


@pytest.mark.parametrize("aggregation", ["l0", "mean", "mask"])
@pytest.mark.parametrize("ramp", ["linear", "cubic"])
@pytest.mark.parametrize("expansion", ["layer", "row", "column"])
def test_every_way_to_agree_passes(monkeypatch, aggregation, ramp, expansion):
    """Three rounds in which the support grows, agreed in groups that no pruner has."""
    settings = Settings(
        pruner="wanda", sparsity=0.7, aggregation=aggregation, ramp=ramp, rounds=3,
        expansion=expansion, layers_per_client=1,
    )  # fmt: skip
    judged_messages(monkeypatch, settings, make_clients(3, samples=2))


@pytest.mark.parametrize("sparsities", [(0.3, 0.8), (0.8, 0.3)])
@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_clients_of_their_own_sparsity_pass(monkeypatch, pruner, sparsities):
    """A support may be beyond the target of the next round, and stays."""
    clients = [
        replace(client, sparsity=sparsity)
        for client, sparsity in zip(make_clients(2, samples=2), sparsities, strict=True)
    ]
    settings = Settings(pruner=pruner, sparsity=0.5, rounds=2, schedule="synchronous")
    judged_messages(monkeypatch, settings, clients)


@pytest.mark.parametrize("message_dtype", [None, "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_dtype_of_messages_passes(monkeypatch, message_dtype, dtype):
    settings = Settings(sparsity=0.5, message_dtype=message_dtype)
    judged_messages(monkeypatch, settings, make_clients(2, samples=2), dtype=dtype)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma"])
def test_other_architectures_pass(monkeypatch, name):
    """GPT-2's weights are not contiguous, and OPT's inputs have features that are always 0."""
    judged_messages(monkeypatch, Settings(sparsity=0.5), make_clients(2, samples=1), name=name)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_a_bound_of_one_is_enough_for_what_was_only_pruned_and_rounded(pruner, sparsity):
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(300, 40, generator=draw)
    for seed in range(20):
        weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed))
        made = make_pruner(Settings(pruner=pruner, sparsity=sparsity))
        statistic = made.gather(None, inputs) if made.needs_inputs else None
        pruned = made.prune(weight, statistic, Target(sparsity=sparsity), None)
        layers = {"w": pack_layer(pruned.weight, pruned.mask, torch.bfloat16, False)}
        message = BlockMessage("c1", 0, 0, 1, layers)
        judge_weights(message, {"w": weight}, Target(sparsity=sparsity), None, 1.0)


def judged_statistics(settings, clients, name="llama"):
    """Run a federation in which every statistic is sent, received and judged."""
    kind = {"sparsegpt": "hessian", "wanda": "squares"}[settings.pruner]
    model = make_model(name)
    found = []

    def receive(message):
        shapes = {n: tuple(w.shape) for n, w in views(decoder_blocks(model)[message.block]).items()}
        place = (message.sender, message.round, message.block, message.samples)
        of = getattr(torch, settings.statistics_dtype)
        got = decode(encode(message, ENVELOPE), Expected(ENVELOPE, *place, shapes, kind, of))
        judge_statistics(got, kind)
        found.append(got)

    federate(model, clients, settings, observe=receive)
    assert {message.sender for message in found} == {client.name for client in clients}
    for index in {message.block for message in found}:
        together = [message for message in found if message.block == index]
        squares = [mean_squares(message, kind) for message in together]
        for message in together:
            own = mean_squares(message, kind)
            judge_mean_squares(message, own, square_limits(squares, BOUND))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_statistics_of_honest_clients_pass(name, pruner, dtype):
    settings = Settings(
        pruner=pruner, sparsity=0.5, aggregation="statistics", statistics_dtype=dtype
    )
    judged_statistics(settings, make_clients(3, samples=2), name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_hessians_of_three_tokens_pass(dtype):
    """Of rank 3: nearly every entry is as large as the squares on the diagonal allow."""
    clients = [Client(torch.tensor([[1, 2, 3]]) + i, name=f"c{i}") for i in range(3)]
    settings = Settings(sparsity=0.5, aggregation="statistics", statistics_dtype=dtype)
    judged_statistics(settings, clients)


def hessian(inputs, dtype):
    """A message of the hessian of inputs (tokens, cols), added up in batches of 7 tokens."""
    total = torch.zeros(inputs.shape[1], inputs.shape[1])
    if dtype == torch.int64:
        total = total.long()
    for batch in inputs.split(7):
        product = batch.T @ batch
        total += (product.double() * ONE).round().long() if dtype == torch.int64 else product
    (first, *_) = sums().statistics
    shape = tuple(total.shape)
    values = pack_triangle(total).to(dtype)
    statistic = replace(first, shape=shape, tokens=len(inputs), values=values)
    return replace(sums(), statistics=(statistic,))


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("cols", [1, 2, 3, 31, 256, 257, 600])
def test_hessians_of_any_width_and_scale_pass(dtype, cols):
    """Features of rank one, of scales from 1e-12 to 1e3, and some that are always 0."""
    draw = torch.Generator().manual_seed(cols)
    scales = 10 ** (15 * torch.rand(cols, generator=draw) - 12)
    scales[::5] = 0
    for tokens in (1, 2, 50):
        inputs = torch.randn(tokens, 1, generator=draw) * scales
        judge_statistics(hessian(inputs, dtype), "hessian")
        inputs = torch.randn(tokens, cols, generator=draw) * scales
        judge_statistics(hessian(inputs, dtype), "hessian")


def test_products_that_float32_cannot_square_pass():
    """1e-25 squared is 0 in float32, and times 1000 it is not."""
    inputs = torch.tensor([[1e-25, 1e3, 1.0]]).repeat(5, 1)
    message = hessian(inputs, torch.float32)
    assert float(triangle_diagonal(message.statistics[0].values, 3)[0]) == 0
    judge_statistics(message, "hessian")


@pytest.mark.parametrize("dtype", NUMBERS)
def test_a_pruners_own_sums_may_be_negative(dtype):
    message = sums(dtype, "sums")
    statistic = replace(message.statistics[0], values=-message.statistics[0].values)
    judge_statistics(replace(message, statistics=(statistic,)), "sums")


# Weights that no client can have.


def weights_of(message, sparsity=0.5, support=None, bound=BOUND):
    """Judge a block whose dense weights are those that `block` drew."""
    judge_weights(message, DENSE, Target(sparsity=sparsity), support, bound)


DENSE = {name: layer.weight() for name, layer in block(sparsity=0.0).layers.items()}


def refused(match, judge, *args, **named):
    """Assert that it is refused with a sentence that begins with the sender and the block."""
    with pytest.raises(ValueError, match=match) as error:
        judge(*args, **named)
    assert str(error.value).startswith("'c1', block 2, layer ")


def with_values(values, name="down"):
    """The block with other values in one layer."""
    message = exact_block(0.5)
    layer = replace(message.layers[name], values=values)
    return replace(message, layers={**message.layers, name: layer})


def exact_block(sparsity, extra=0):
    """The dense block with exactly so many weights of every layer pruned, and some of down more."""
    layers = {}
    for name, weight in DENSE.items():
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        mask[: int(weight.numel() * sparsity) + (extra if name == "down" else 0)] = False
        layers[name] = pack_layer(weight, mask.view(weight.shape), None, False)
    return replace(block(), layers=layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 20, 51])
def test_weights_that_are_not_finite_are_refused(dtype, value, place):
    values = exact_block(0.5).layers["down"].values.to(dtype)
    values[place] = value
    refused("layer down: weights are NaN or infinite", weights_of, with_values(values))


def test_a_layer_may_be_off_by_its_longer_side_and_no_more():
    """down has 13 rows of 8 columns: 104 weights."""
    for extra in (-13, 0, 13):
        weights_of(exact_block(0.5, extra))
    for extra in (-14, 14):
        pruned = f"layer down: {52 + extra} of 104 weights are pruned, .* prune 39 to 65 of them"
        refused(pruned, weights_of, exact_block(0.5, extra))


def test_a_mask_alone_is_counted_too():
    message = exact_block(0.5, 14)
    layers = {n: replace(layer, values=None, kept=None) for n, layer in message.layers.items()}
    refused("layer down: 66 of 104", weights_of, replace(message, layers=layers))


def supports(sparsity):
    """Where the exact block of a sparsity kept its weights."""
    return {name: layer.mask() for name, layer in exact_block(sparsity).layers.items()}


def test_what_a_former_round_pruned_stays_pruned():
    support = supports(0.5)
    weights_of(exact_block(0.5), support=support)
    weights_of(exact_block(0.7), 0.7, support)
    support["down"].view(-1)[60] = False
    refused(
        "layer down: 1 weights from row 0 on are kept that a former round pruned",
        weights_of, exact_block(0.5), support=support,
    )  # fmt: skip


def test_a_support_beyond_the_target_may_stay_and_go_no_further():
    support = supports(0.8)
    weights_of(exact_block(0.8), 0.2, support)
    # 83 of 104 were pruned before.
    refused("layer down: 84 of 104", weights_of, exact_block(0.8, 1), 0.2, support)
    refused("layer down: 71 of 104", weights_of, exact_block(0.5, 19), 0.2, supports(0.5))
    refused("layer q: 32 of 65 .* prune 46 to 65", weights_of, exact_block(0.5), 0.9, supports(0.5))


@pytest.mark.parametrize("support", [False, True])
def test_every_group_of_a_pattern_is_looked_at(support):
    weight = torch.ones(2, 8)
    good = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1], [0, 1, 1, 0, 1, 0, 1, 0]]).bool()
    before = {"w": good} if support else None

    def judge(mask):
        message = replace(block(), layers={"w": pack_layer(weight, mask, None, False)})
        judge_weights(message, {"w": weight}, Target(pattern="2:4"), before, BOUND)

    judge(good)
    # The count is right, and one group has 3 where another has 1.
    moved = good.clone()
    moved[1, 3], moved[1, 4] = True, False
    refused("kept that a former" if support else "3 of 4 neighbours are kept", judge, moved)
    fewer = good.clone()
    fewer[0, 0] = False
    refused("9 of 16 weights are pruned, and the task was to prune 8 to 8", judge, fewer)


def test_a_support_that_is_sparser_than_its_pattern_passes():
    """Where clients disagreed, a group may keep fewer."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0]]).bool()
    message = replace(block(), layers={"w": pack_layer(torch.ones(2, 4), mask, None, False)})
    judge_weights(message, {"w": torch.ones(2, 4)}, Target(pattern="2:4"), {"w": mask}, BOUND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_norm_beyond_the_bound_is_refused(dtype):
    values = exact_block(0.5).layers["down"].values.to(dtype)
    scale = float(DENSE["down"].norm() / values.float().norm())
    for share in (0.1, 0.99):
        weights_of(with_values(values * (scale * share * BOUND)))
    for share in (1.03, 1e3, 1e15):
        refused(
            "times that of the dense", weights_of, with_values(values * (scale * share * BOUND))
        )
    weights_of(with_values(values * (scale * 1.03 * BOUND)), bound=2 * BOUND)


def test_norms_are_of_the_whole_layer_however_many_parts_it_takes():
    weight = torch.full((300, 1000), 0.5)
    mask = torch.ones(300, 1000, dtype=torch.bool)
    for dense in (weight, weight.T.contiguous().T):
        for factor, fits in ((0.99, True), (1.02, False)):
            layers = {"w": pack_layer(weight * factor, mask, None, False)}
            message = replace(block(), layers=layers)
            if fits:
                judge_weights(message, {"w": dense}, Target(sparsity=0), None, 1.0)
            else:
                refused(
                    "norm of its weights is 279.3, and 273.9 at most",
                    judge_weights, message, {"w": dense}, Target(sparsity=0), None, 1.0,
                )  # fmt: skip


def test_a_wide_layer_is_looked_at_to_its_last_row():
    """More entries than are unpacked at a time."""
    mask = torch.ones(700, 1000, dtype=torch.bool)
    bits = pack_layer(torch.zeros(700, 1000), mask, None, True).bits
    message = replace(block(), layers={"w": LayerMessage((700, 1000), bits, None)})
    support = mask.clone()
    support[699, 999] = False
    refused(
        "1 weights from row 524 on are kept",
        judge_weights, message, {}, Target(sparsity=0), {"w": support}, BOUND,
    )  # fmt: skip


# Statistics that no tokens can have.


def with_numbers(message, change):
    """The message with the first statistic's numbers changed in place."""
    values = message.statistics[0].values.clone()
    change(values)
    first = replace(message.statistics[0], values=values)
    return replace(message, statistics=(first, *message.statistics[1:]))


@pytest.mark.parametrize("kind", ["hessian", "squares", "sums"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_statistics_that_are_not_finite_are_refused(kind, dtype, value):
    for place in (0, 5, 12):
        message = with_numbers(sums(dtype, kind), lambda v, at=place: v.__setitem__(at, value))
        refused("layer q and k and v: .*NaN, infinite", judge_statistics, message, kind)


@pytest.mark.parametrize("kind", ["hessian", "squares", "sums"])
@pytest.mark.parametrize("value", [int(ROOM), -int(ROOM), -(2**63), 2**63 - 1])
def test_fixed_point_that_leaves_no_room_is_refused(kind, value):
    message = with_numbers(sums(torch.int64, kind), lambda v: v.__setitem__(3, value))
    refused("too large to be added", judge_statistics, message, kind)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("kind", ["hessian", "squares"])
def test_negative_squares_are_refused(dtype, kind):
    whole = sums(dtype, kind)
    # Where the diagonal is in the triangle: the places where its numbers are found again.
    places = range(13)
    if kind == "hessian":
        numbers = torch.arange(triangle_size(13))
        places = triangle_diagonal(numbers, 13).tolist()
    for place in places:
        message = with_numbers(whole, lambda v, at=place: v.__setitem__(at, -v[at]))
        refused("a sum of squares is -", judge_statistics, message, kind)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("cols", [2, 3, 12, 13, 513])
def test_products_larger_than_their_squares_allow_are_refused(dtype, cols):
    """Each entry off the diagonal in turn, of both signs: 2 % above the root of its squares."""
    draw = torch.Generator().manual_seed(cols)
    inputs = torch.randn(50, cols, generator=draw) * (1 + torch.rand(cols, generator=draw))
    good = hessian(inputs, dtype)
    judge_statistics(good, "hessian")
    values = good.statistics[0].values
    roots = triangle_diagonal(values, cols).double().sqrt()
    rows, columns = torch.ones(cols, cols).tril(-1).nonzero(as_tuple=True)
    numbers = torch.arange(cols * cols).view(cols, cols)
    packed = pack_triangle(numbers.tril() + numbers.tril(-1).T)
    place = {number: at for at, number in enumerate(packed.tolist())}
    step = max(1, len(rows) // 60)
    for i, j in zip(rows[::step].tolist(), columns[::step].tolist(), strict=True):
        at = place[i * cols + j]
        for sign, share in ((1, 1.02), (-1, 1.02), (1, 1e6)):
            number = sign * share * float(roots[i] * roots[j])
            number = round(number) if dtype == torch.int64 else number
            message = with_numbers(good, lambda v, at=at, to=number: v.__setitem__(at, to))
            refused("no sum of products", judge_statistics, message, "hessian")


def test_statistics_of_no_token_are_refused():
    first, *rest = sums().statistics
    message = replace(sums(), statistics=(replace(first, tokens=0), *rest))
    refused("count 0 tokens", judge_statistics, message, "hessian")


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("kind", ["hessian", "squares"])
def test_mean_squares_are_those_of_the_inputs(dtype, kind):
    inputs = torch.randn(40, 13, generator=torch.Generator().manual_seed(0))
    found = mean_squares(sums(dtype, kind), kind)
    assert list(found) == [("q", "k", "v"), ("down",), ("one",)]
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    assert found["q", "k", "v"] == pytest.approx(float(inputs.square().mean()), rel=tolerance)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_of_other_sums_the_mean_magnitude_is_meant(dtype):
    message = sums(dtype, "sums")
    message = with_numbers(message, lambda v: v[::2].neg_())
    expected = mean_squares(sums(dtype, "squares"), "squares")
    assert mean_squares(message, "sums") == pytest.approx(expected)


def test_limits_stand_on_the_median_of_three_clients_or_more():
    one, two = ("q",), ("up",)
    found = [{one: 1.0, two: 5.0}, {one: 3.0}, {one: 1e9, two: 7.0}]
    assert square_limits(found, 2.0) == {one: 12.0, two: float("inf")}
    assert square_limits(found[:2], 2.0) == {one: float("inf"), two: float("inf")}
    assert square_limits([{one: 2.0}, {one: 4.0}, {one: 1.0}, {one: 9.0}], 1.0) == {one: 3.0}
    assert square_limits([{one: 0.0}] * 3, 2.0) == {one: float("inf")}
    assert square_limits([{one: float("nan")}, *[{one: 1.0}] * 2], 2.0) == {one: float("inf")}
    assert square_limits([], 2.0) == {}


@pytest.mark.parametrize("kind", ["hessian", "squares", "sums"])
def test_squares_far_above_those_of_the_others_are_refused(kind):
    honest = [mean_squares(sums(kind=kind, seed=seed), kind) for seed in range(3)]
    limits = square_limits(honest, 3.0)
    for seed in range(3):
        message = sums(kind=kind, seed=seed)
        judge_mean_squares(message, mean_squares(message, kind), limits)
    large = with_numbers(sums(kind=kind, seed=1), lambda v: v.mul_(12))
    judge_mean_squares(large, mean_squares(large, kind), square_limits(honest, 6.0))
    why = "mean square of its inputs is .* at most"
    refused(why, judge_mean_squares, large, mean_squares(large, kind), limits)


def test_two_columns_do_not_hide_what_the_sum_of_all_would_show():
    # Their squares allow the product, and their own mean would damp it away; that of the 32 columns
    # of the sum, which all others' are in, does not.
    message = hessian(torch.eye(32), torch.float32)
    (statistic,) = message.statistics
    matrix = torch.zeros(32, 32)
    matrix[:2, :2] = torch.tensor([[1.0, -1 - 2.0**-10], [-1 - 2.0**-10, 1.0]])
    two = replace(message, statistics=(replace(statistic, values=pack_triangle(matrix)),))
    judge_statistics(two, "hessian")
    refused("not positive definite after damping 0.01", judge_definite, two, 0.01)
    judge_definite(message, 0.01)
    judge_definite(hessian(torch.eye(32)[:1], torch.float32), 0.01)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_found_in_the_frame_alone(number):
    message = with_values(torch.tensor([1.0, number]))
    refused("layer down: weights are NaN or infinite", judge_finite, message)
    judge_finite(with_values(torch.tensor([1.0, 2.0])))


def test_layers_that_nobody_else_sent_have_no_limit():
    message = sums()
    judge_mean_squares(message, mean_squares(message, "hessian"), {("other",): 0.0})
