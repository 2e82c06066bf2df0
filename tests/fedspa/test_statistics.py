"""Sums of statistics: as good as pooled data, whatever is added up by whom."""

import math
from dataclasses import replace

import pytest
import torch
from small_models import ARCHITECTURES, make_clients, make_model

from fedspa import Client, Settings, federate
from fedspa.calibration import Calibration
from fedspa.data import pool
from fedspa.messages import StatisticMessage, StatisticsMessage
from fedspa.model import decoder_blocks, layer_weights
from fedspa.pruners import Magnitude, make_pruner
from fedspa.report import Report, write_html
from fedspa.schedule import exchanged_together
from fedspa.statistics import BlockStatistics
from fedspa.sums import LIMIT, FixedPoint, PlainSum, plain_sums
from fedspa.tables import client_rows
from fedspa.triangle import pack_triangle, triangle_diagonal, triangle_size, unpack_triangle
from fedspa_kernels import wanda_prune

SUMS = Settings(sparsity=0.6, aggregation="statistics")
EXACT = replace(SUMS, statistics_dtype="int64")
# Of float32 sums in another order, a few layers on: relative to the largest weight.
ROUNDING = 1e-4


def run(clients, settings, layers=2, name="llama", **more):
    """A federation on a fresh model: its weights by block and layer, and its report."""
    model = make_model(name, layers)
    report = federate(model, clients, settings, **more)
    weights = {
        f"{index}.{layer}": weight
        for index, block in enumerate(decoder_blocks(model))
        for layer, weight in layer_weights(block).items()
    }
    return weights, report


def pooled(clients, settings, **more):
    """Centralised pruning of all clients' data."""
    own = replace(settings, aggregation="l0", schedule=settings.walking, statistics_dtype="float32")
    return run([pool(clients)], own, **more)


def masks_of(report):
    return torch.cat([layer.mask().flatten() for _, layer in sorted(report.masks.items())])


def assert_equal_to_pooled(clients, settings, **more):
    weights, report = run(clients, settings, **more)
    expected, reference = pooled(clients, settings, **more)
    equal = (masks_of(report) == masks_of(reference)).double().mean()
    assert equal >= 0.9999
    for name, weight in weights.items():
        assert float((weight - expected[name]).abs().max()) <= ROUNDING * float(weight.abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda"])
def test_statistics_are_centralised_pruning(name, pruner):
    assert_equal_to_pooled(make_clients(4), replace(SUMS, pruner=pruner), name=name)


@pytest.mark.parametrize("clients", [1, 2, 8, 16])
@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_whatever_the_number_of_clients_and_the_target(clients, target):
    settings = Settings(aggregation="statistics", **target)
    # Unequal ones, so that an average of averages would be another.
    every = [replace(c, tokens=c.tokens[: 1 + i % 4]) for i, c in enumerate(make_clients(clients))]
    assert_equal_to_pooled(every, settings)


def test_one_upload_is_pruning_with_the_dense_models_statistics():
    """Written out: gather in a dense walk, then prune every layer with what was gathered."""
    clients = make_clients(3)
    weights, report = run(clients, replace(SUMS, schedule="one-shot", pruner="wanda"))
    model = make_model()
    everything = torch.cat([client.tokens for client in clients])
    squares = {}
    for index, block in enumerate(decoder_blocks(model)):
        for name, layer in block.named_modules():
            if isinstance(layer, torch.nn.Linear):

                def gather(_, inputs, key=f"{index}.{name}"):
                    squares[key] = inputs[0].flatten(0, 1).square().sum(0)

                layer.register_forward_pre_hook(gather)
    with torch.no_grad():
        model(everything)
    dense = run(clients, replace(SUMS, sparsity=0.0, pruner="wanda"))[0]
    for key, weight in weights.items():
        own = wanda_prune(dense[key], squares[key].sqrt(), sparsity=0.6)
        kept = weight != 0
        # The exact target takes a few more than whole rows allow.
        assert not bool((kept & ~own.mask).any())
        assert int((~kept).sum()) == math.ceil(0.6 * kept.numel())
        assert torch.equal(weight[kept], dense[key][kept])


@pytest.mark.parametrize("aggregation", ["l0", "mean", "mask", "statistics"])
def test_exchanging_every_block_is_synchronous_and_all_of_them_one_shot(aggregation):
    settings = Settings(sparsity=0.5, aggregation=aggregation, schedule="synchronous")
    clients = make_clients(3)

    def every(blocks):
        return run(clients, replace(settings, synchronize_every=blocks), layers=5)[0]

    def same(left, right):
        return all(torch.equal(left[name], right[name]) for name in left)

    synchronous = run(clients, settings, layers=5)[0]
    one_shot = run(clients, replace(settings, schedule="one-shot"), layers=5)[0]
    assert same(every(1), synchronous)
    assert same(every(5), one_shot) and same(every(9), one_shot)
    between = every(2)
    assert not same(between, synchronous) and not same(between, one_shot)


def test_blocks_between_two_exchanges_are_walked_again_through_what_was_agreed():
    """Of two blocks and one more, the third is calibrated on the first two as they were agreed."""
    clients = make_clients(3)
    # Masks alone: an average of equal weights may differ in its last bit.
    last = Settings(sparsity=0.5, aggregation="mask", schedule="synchronous")
    settings = replace(last, synchronize_every=2)
    found = run(clients, settings, layers=3)[0]
    model = make_model(layers=3)
    with torch.no_grad():
        for index, block in enumerate(decoder_blocks(model)):
            for name, weight in layer_weights(block).items():
                source = found[f"{index}.{name}"] if index < 2 else weight
                block.get_submodule(name).weight.copy_(source)
    # The first two are pruned already and lose nothing more: the last one is pruned on them.
    federate(model, clients, last)
    weights = layer_weights(decoder_blocks(model)[2])
    assert all(torch.equal(weight, found[f"2.{name}"]) for name, weight in weights.items())


def test_a_client_sends_a_triangle_or_one_number_for_each_input():
    clients = make_clients(3)
    for pruner, of_width in (("sparsegpt", triangle_size), ("wanda", lambda cols: cols)):
        messages = []
        _, report = run(clients, replace(SUMS, pruner=pruner), observe=messages.append)
        # q, k and v share their input, and gate and up: 32, 32, 32 and 64 inputs.
        numbers = sum(of_width(cols) for cols in (32, 32, 32, 64))
        assert [m.nbytes for m in messages] == [4 * numbers] * 6
        assert all(client.bytes_up == 2 * 4 * numbers for client in report.clients)
        assert {s.tokens for m in messages for s in m.statistics} == {4 * 16}


def test_statistics_in_bfloat16_take_half_the_bytes_and_change_little():
    clients = make_clients(4)
    full, whole = run(clients, SUMS)
    halved, report = run(clients, replace(SUMS, statistics_dtype="bfloat16"))
    assert report.clients[0].bytes_up * 2 == whole.clients[0].bytes_up
    agree = (masks_of(report) == masks_of(whole)).double().mean()
    assert 0.95 < agree < 1


def test_rounding_leaves_no_hessian_of_few_tokens_indefinite():
    """Eight tokens, with two features a thousand times the others, as outliers are."""
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    inputs[:, 3] *= 1000
    inputs[:, 9] += inputs[:, 3] * 0.7
    hessian = inputs.mT @ inputs
    rounded = unpack_triangle(pack_triangle(hessian, torch.bfloat16), 64)
    # More than SparseGPT's damping would mend.
    least = float(torch.linalg.eigvalsh(rounded.double())[0])
    assert least < -0.01 * float(hessian.diagonal().mean())
    weights, sums = {"q": torch.zeros(4, 64)}, plain_sums("bfloat16")
    block = BlockStatistics(weights, "hessian", 0, 0, ["a"], sums)
    block.add(block.message("a", 1, Calibration({"q": hessian}, {"q": 8})))
    assert float(torch.linalg.eigvalsh(block.statistics()["q"].double())[0]) > 0


def test_nobody_votes_and_the_target_is_exact():
    _, report = run(make_clients(3), SUMS)
    for layer in report.layers:
        assert layer.votes == () and layer.clients == 3
        assert round(layer.sparsity * layer.size) == math.ceil(0.6 * layer.size)
    assert all(math.isnan(client.sparsity) for client in report.clients)


def test_a_blocks_sum_is_over_the_clients_that_sent_it():
    """With layer sampling each block equals pruning with the data of those who drew it."""
    clients = make_clients(4)
    settings = replace(SUMS, layers_per_client=2, seed=3, schedule="one-shot")
    weights, report = run(clients, settings, layers=4)
    for block in range(4):
        drew = [c for c, r in zip(clients, report.clients, strict=True) if block in r.blocks[0]]
        if drew:
            one = replace(settings, layers_per_client=None)
            expected = run(drew, one, layers=4)[0]
            mine = [name for name in weights if name.startswith(f"{block}.")]
            assert all(torch.equal(weights[name], expected[name]) for name in mine)


@pytest.mark.parametrize(
    "more",
    [
        {"rounds": 3, "ramp": "cubic"},
        {"rounds": 2, "ramp": "linear", "block_size": 16, "schedule": "one-shot"},
        {"rounds": 2, "sparsity": None, "pattern": "2:4"},
        {"rounds": 2, "ramp": "linear", "pruner": "wanda", "synchronize_every": 2},
    ],
)
def test_rounds_and_ramps_are_those_of_pooled_data(more):
    settings = replace(EXACT, **more)
    clients = make_clients(3)
    found, report = run(clients, settings, layers=3)
    expected, other = run([pool(clients)], settings, layers=3)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert [layer.sparsity for layer in report.layers] == [s.sparsity for s in other.layers]


def test_a_round_in_which_everybody_left_prunes_nothing_and_can_be_told():
    settings = replace(SUMS, dropout=0.99, seed=0, schedule="one-shot")
    weights, report = run(make_clients(2), settings)
    dense = run(make_clients(2), replace(SUMS, sparsity=0.0))[0]
    assert all(torch.equal(weights[name], dense[name]) for name in dense)
    assert report.layers == () and report.sparsity == 0
    assert [client.blocks for client in report.clients] == [((),), ((),)]


def test_what_is_exchanged_together_is_sent_whole_or_not_at_all():
    settings = replace(SUMS, dropout=0.9, seed=1, synchronize_every=3)
    _, report = run(make_clients(8), settings, layers=7)
    assert {len(client.blocks[0]) for client in report.clients} <= {0, 3, 6, 7}
    _, report = run(make_clients(8), Settings(sparsity=0.5, dropout=0.5, seed=1), layers=4)
    sent = {len(client.blocks[0]) for client in report.clients}
    assert sent == {0, 4}
    for client in report.clients:
        assert bool(client.bytes_up) == bool(client.bytes_down) == bool(client.blocks[0])


def test_a_report_of_sums_is_read_back_and_shown(tmp_path):
    _, report = run(make_clients(2), SUMS)
    again = Report.from_json(report.to_json())
    assert again.to_json() == report.to_json()
    assert math.isnan(again.clients[0].sparsity)
    rows = client_rows(again.clients)
    assert "–" in rows[0] and "nan" not in str(rows)
    write_html(again, tmp_path / "report.html")
    assert ">nan<" not in (tmp_path / "report.html").read_text()


def test_rounds_ramps_absence_and_leaving_work_with_sums():
    clients = make_clients(6)
    settings = replace(
        SUMS, rounds=3, ramp="linear", participation=0.5, dropout=0.5, seed=2, every_block=False
    )
    first, report = run(clients, settings, layers=4)
    second, again = run(clients[::-1], settings, layers=4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [client.blocks for client in report.clients]
    assert all(len(rounds) == 3 for rounds in drawn)
    assert [sum(bool(rounds[r]) for rounds in drawn) <= 3 for r in range(3)] == [True] * 3
    for layer in report.final_layers:
        sent = [rounds for rounds in drawn if layer.block in rounds[layer.round]]
        assert layer.clients == len(sent) > 0


def test_a_client_that_leaves_sent_its_first_blocks_only():
    settings = replace(SUMS, dropout=0.9, seed=1)
    _, report = run(make_clients(6), settings, layers=5)
    drawn = [client.blocks[0] for client in report.clients]
    assert all(mine == tuple(range(len(mine))) for mine in drawn)
    assert any(0 < len(mine) < 5 for mine in drawn)


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda"])
@pytest.mark.parametrize("schedule", ["synchronous", "one-shot"])
def test_sums_in_fixed_point_are_the_pooled_datas_to_the_bit(pruner, schedule):
    """However the windows are dealt out: to one, to four of one kind each, or to nine at random."""
    clients = make_clients(4, samples=9)
    settings = replace(EXACT, pruner=pruner, schedule=schedule)
    windows = pool(clients).tokens
    mixed = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(1))]
    dealt = [Client(part, name=str(i)) for i, part in enumerate(mixed.split([1, 20, 2, 3, 10]))]
    whole, report = run([pool(clients)], settings, layers=3)
    for others in (clients, dealt):
        found, other = run(others, settings, layers=3)
        assert all(torch.equal(found[name], whole[name]) for name in whole)
        assert torch.equal(masks_of(other), masks_of(report))
    # And they are the same pruning as with float32 sums.
    plain = run([pool(clients)], replace(settings, statistics_dtype="float32"), layers=3)[1]
    assert (masks_of(plain) == masks_of(report)).double().mean() > 0.99


def test_fixed_point_takes_eight_bytes_a_number():
    _, exact = run(make_clients(2), EXACT)
    _, plain = run(make_clients(2), SUMS)
    assert exact.clients[0].bytes_up == 2 * plain.clients[0].bytes_up


@pytest.mark.parametrize("value", [math.nan, math.inf, 2 * math.sqrt(LIMIT)])
def test_what_does_not_fit_into_fixed_point_is_refused(value):
    inputs = torch.ones(4, 3)
    inputs[2, 1] = value
    with pytest.raises(ValueError, match="do not fit into fixed point"):
        FixedPoint(make_pruner(SUMS)).gather(None, inputs)


class MaskedSum:
    """Secure aggregation by pairwise masks (Bonawitz et al. 2017), without its key agreement.

    Whole numbers modulo 2^64; each pair of clients adds and subtracts the same noise.
    """

    readable = False

    def __init__(self, place, clients):
        self.place, self.clients, self.sum = place, list(clients), None

    def _noise(self, left, right, like):
        seed = hash((self.place, left, right)) & (2**62 - 1)
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(-(2**62), 2**62, like.shape, generator=draw)

    def send(self, client, values):
        fixed = values
        for other in self.clients:
            if other != client:
                noise = self._noise(*sorted((client, other)), fixed)
                fixed = fixed + noise if client < other else fixed - noise
        return fixed

    def add(self, client, sent):
        self.sum = sent.clone() if self.sum is None else self.sum + sent

    def total(self):
        return self.sum


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda"])
def test_a_secure_sum_takes_the_place_of_the_plain_one_and_changes_no_bit(pruner):
    clients, messages = make_clients(4), []
    settings = replace(EXACT, pruner=pruner, layers_per_client=1, seed=2)
    plain, _ = run(clients, settings)
    secure, _ = run(clients, settings, open_sum=MaskedSum, observe=messages.append)
    assert all(torch.equal(plain[name], secure[name]) for name in plain)
    # What a client sent tells nothing of its sums: it is as large as the noise.
    sent = messages[0].statistics[0].values
    assert float(sent.double().abs().mean()) > 2.0**58


class Means:
    """A pruner of a user's own whose statistic is a sum that may be negative."""

    needs_inputs = True
    additive = "sums"

    def gather(self, statistic, inputs):
        sums = torch.stack([torch.ones_like(inputs), inputs, inputs.square()]).sum(dim=1)
        return sums if statistic is None else statistic + sums

    def prune(self, weight, statistic, target, support):
        count, total, squares = statistic
        deviation = (squares / count - (total / count).square()).clamp(min=0).sqrt()
        return wanda_prune(weight, deviation, sparsity=target.sparsity)


def test_a_pruner_of_ones_own_says_that_its_statistics_can_be_added():
    assert_equal_to_pooled(make_clients(3), replace(SUMS, pruner=Means()))


def test_a_pruner_that_does_not_say_so_is_refused():
    class Silent(Means):
        additive = None

    with pytest.raises(ValueError, match="does not say that this is a sum over tokens"):
        run(make_clients(2), replace(SUMS, pruner=Silent()))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"pruner": "magnitude"}, "needs no data and no exchange"),
        ({"weighting": "uniform"}, "weigh every token alike"),
        ({"expansion": "row"}, "nobody votes"),
        ({"scaling": True}, "belongs to aggregation 'mask'"),
        ({"schedule": "one-shot", "synchronize_every": 2}, "needs schedule 'synchronous'"),
        ({"statistics_dtype": "float16"}, "statistics_dtype 'float16' is unknown"),
        ({"participation": 0.0}, r"outside \(0, 1\]"),
        ({"participation": True}, r"outside \(0, 1\]"),
        ({"dropout": 1.0}, r"outside \[0, 1\)"),
        ({"dropout": 0.5, "every_block": True}, "every_block cannot promise"),
        ({"synchronize_every": 0}, "synchronize_every must be a whole number"),
        ({"aggregation": "l0", "statistics_dtype": "bfloat16"}, "needs aggregation 'statistics'"),
    ],
)
def test_settings_that_contradict_each_other(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**{"sparsity": 0.5, "aggregation": "statistics", **settings})


def test_what_is_left_out_suits_the_aggregation():
    sums, weights = Settings(sparsity=0.5, aggregation="statistics"), Settings(sparsity=0.5)
    assert (sums.walking, sums.weighed) == ("synchronous", "samples")
    assert (weights.walking, weights.weighed) == ("one-shot", "uniform")
    assert sums.to_dict()["schedule"] == "synchronous"
    # What was left out stays so: another aggregation has its own.
    other = replace(sums, aggregation="l0")
    assert (other.walking, other.weighed) == ("one-shot", "uniform")
    assert replace(weights, aggregation="statistics").weighed == "samples"
    assert exchanged_together(sums, 12) == 1 and exchanged_together(weights, 12) == 12


def test_an_object_that_needs_no_data_is_told_so():
    with pytest.raises(ValueError, match="needs no data and so no exchange"):
        run(make_clients(2), replace(SUMS, pruner=Magnitude()))


def test_a_sparsity_of_ones_own_has_no_place_in_a_sum():
    clients = make_clients(2)
    clients[1] = Client(clients[1].tokens, name="own", sparsity=0.3)
    with pytest.raises(ValueError, match="'own' has its own sparsity 0.3"):
        run(clients, SUMS)


WEIGHTS = {"q": torch.zeros(4, 3), "k": torch.zeros(2, 3), "o": torch.zeros(4, 5)}


def open_block(kind="hessian", open_sum=None) -> BlockStatistics:
    return BlockStatistics(WEIGHTS, kind, 0, 7, ["a", "b"], open_sum or plain_sums("float32"))


def gathered(scale=1.0, tokens=6) -> Calibration:
    """What a client finds: q and k share their input."""
    shared, other = torch.eye(3) * scale, torch.eye(5) * 2 * scale
    return Calibration({"q": shared, "k": shared, "o": other}, dict.fromkeys("qko", tokens))


def test_the_server_adds_up_and_shares_what_was_shared():
    block = open_block()
    for client, scale in (("a", 1.0), ("b", 3.0)):
        block.add(block.message(client, 2, gathered(scale)))
    found = block.statistics()
    assert found["q"] is found["k"]
    assert torch.equal(found["q"], torch.eye(3) * 4) and torch.equal(found["o"], torch.eye(5) * 8)
    assert (block.clients, block.samples) == (2, 4)


def with_values(message: StatisticsMessage, index: int, **changes) -> StatisticsMessage:
    statistics = list(message.statistics)
    statistics[index] = replace(statistics[index], **changes)
    return replace(message, statistics=tuple(statistics))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": ("q", "v")}, r"sent statistics of layers \['o', 'q', 'v'\]"),
        ({"layers": ("q", "o")}, r"sent statistics of layers \['o', 'o', 'q'\]"),
        ({"layers": ("q",)}, "all clients must run the same model and pruner"),
        ({"shape": (4, 4)}, r"the layer's 3 inputs need \(3, 3\)"),
        ({"values": torch.zeros(5)}, r"it sent \(5,\) numbers, and \(3, 3\) needs 6"),
        ({"tokens": 0}, "count 0 tokens"),
        (
            {"values": torch.full((6,), math.nan)},
            "^a, block 7, layer q and k: .*NaN, infinite or too large",
        ),
        ({"values": torch.full((6,), math.inf)}, "NaN, infinite or too large"),
        ({"values": pack_triangle(torch.diag(torch.tensor([1.0, -0.5, 1.0])))}, "down to -0.5"),
    ],
)
def test_a_message_that_cannot_be_added_leaves_the_sums_alone(changes, sentence):
    block = open_block()
    block.add(block.message("b", 1, gathered()))
    bad = with_values(block.message("a", 1, gathered()), 0, **changes)
    with pytest.raises(ValueError, match=sentence):
        block.add(bad)
    assert block.clients == 1 and torch.equal(block.statistics()["q"], torch.eye(3))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"block": 3}, "of round 0, block 3, and these are the sums of round 0, block 7"),
        ({"round": 9}, "of round 9, block 7"),
        ({"sender": "b"}, "'b' sent its statistics of block 7 twice"),
        ({"sender": "z"}, "'z' sent statistics of block 7, which was asked of 'a', 'b'"),
    ],
)
def test_a_message_of_another_place_or_sender_is_refused(changes, sentence):
    block = open_block()
    block.add(block.message("b", 1, gathered()))
    with pytest.raises(ValueError, match=sentence):
        block.add(replace(block.message("a", 1, gathered()), **changes))
    assert block.clients == 1


def test_sums_of_any_shape_are_counted_before_they_are_added():
    block = BlockStatistics({"q": torch.zeros(2, 3)}, "sums", 0, 7, ["a"], plain_sums("float32"))
    good = block.message("a", 1, Calibration({"q": torch.ones(3, 3)}, {"q": 4}))
    with pytest.raises(ValueError, match=r"it sent \(4,\) numbers, and \(3, 3\) needs 9"):
        block.add(with_values(good, 0, values=torch.ones(4)))
    block.add(good)
    assert torch.equal(block.statistics()["q"], torch.ones(3, 3))


def test_a_layer_is_summed_over_those_whose_tokens_reached_it():
    """As an expert's, which is pooled data's as long as anybody's tokens reach it."""
    block = open_block()
    block.add(block.message("a", 1, gathered()))
    some = Calibration({"o": torch.eye(5)}, {"o": 2})
    block.add(block.message("b", 1, some))
    found = block.statistics()
    assert torch.equal(found["q"], torch.eye(3)) and torch.equal(found["o"], torch.eye(5) * 3)


def test_a_layer_that_nobody_reached_is_named():
    block = open_block()
    block.add(block.message("a", 1, Calibration({"o": torch.eye(5)}, {"o": 2})))
    with pytest.raises(ValueError, match="layer q and k: no calibration token of any client"):
        block.statistics()


def test_a_secure_sum_without_one_of_its_clients_is_refused_and_not_noise():
    block = open_block(open_sum=lambda place, clients: Secret())
    block.add(block.message("a", 1, gathered()))
    with pytest.raises(ValueError, match="'b' did not send their part"):
        block.statistics()
    # Nor may one leave out a layer that its tokens did not reach.
    block.add(block.message("b", 1, Calibration({"o": torch.eye(5)}, {"o": 2})))
    with pytest.raises(ValueError, match="layer q and k: 'b' did not send"):
        block.statistics()


class Secret(PlainSum):
    """A sum whose parts cannot be read."""

    readable = False


def test_open_sum_is_refused_where_nothing_is_summed():
    with pytest.raises(ValueError, match="aggregation 'l0' sends none"):
        run(make_clients(2), Settings(sparsity=0.5), open_sum=MaskedSum)


def test_fixed_point_never_wraps_around():
    """Windows of the largest numbers, until there is no room for the other clients."""
    inputs = torch.full((1, 3), 32000.0)
    pruner, statistic = FixedPoint(make_pruner(replace(SUMS, pruner="wanda")), clients=4), None
    with pytest.raises(ValueError, match="leave no room in fixed point for those of 4 clients"):
        for _ in range(1000):
            statistic = pruner.gather(statistic, inputs)
            assert bool((statistic > 0).all())


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda"])
def test_squares_too_small_for_fixed_point_are_refused(pruner):
    coarse = FixedPoint(make_pruner(replace(SUMS, pruner=pruner)))
    with pytest.raises(ValueError, match="too small for fixed point.*use statistics_dtype float32"):
        coarse.gather(None, torch.full((16, 4), 1e-4))
    # A feature that is nearly off among others, or off, is none of that.
    inputs = torch.ones(16, 4)
    inputs[:, 1], inputs[:, 2] = 1e-6, 0.0
    assert coarse.gather(None, inputs) is not None


def test_negative_correlations_are_no_negative_squares():
    block = open_block()
    correlated = torch.tensor([[2.0, -1.0, 0.0], [-1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    found = gathered()
    found = Calibration(found.statistics | {"q": correlated, "k": correlated}, found.tokens)
    block.add(block.message("a", 1, found))
    assert torch.equal(block.statistics()["q"], correlated)


def test_clients_that_share_their_inputs_otherwise_run_another_model():
    block = open_block()
    block.add(block.message("a", 1, gathered()))
    apart = gathered()
    apart.statistics["k"] = apart.statistics["k"].clone()
    with pytest.raises(ValueError, match="all clients must run the same model and pruner"):
        block.add(block.message("b", 1, apart))


def test_a_secure_total_is_checked_where_its_parts_cannot_be():
    class Broken(Secret):
        def total(self):
            return -super().total()

    block = BlockStatistics(WEIGHTS, "squares", 0, 7, ["a"], lambda place, clients: Broken())
    squares = Calibration(
        {name: torch.ones(w.shape[1]) for name, w in WEIGHTS.items()}, dict.fromkeys("qko", 3)
    )
    block.add(block.message("a", 1, squares))
    with pytest.raises(ValueError, match="the sum over 1 clients.* down to -1"):
        block.statistics()


def test_a_sum_of_nobody_has_no_total():
    with pytest.raises(ValueError, match="no client sent statistics"):
        open_block().statistics()
    with pytest.raises(ValueError, match="a sum of no clients"):
        PlainSum().total()


def test_adding_leaves_the_message_as_it_was():
    total, first = PlainSum(), torch.ones(3)
    total.add("a", first)
    total.add("b", torch.ones(3))
    assert first.tolist() == [1, 1, 1] and total.total().tolist() == [2, 2, 2]


@pytest.mark.parametrize("cols", [1, 2, 3, 8, 255, 256, 257, 513, 700])
def test_a_triangle_comes_back_as_it_was(cols):
    draw = torch.Generator().manual_seed(cols)
    matrix = torch.randn(cols, cols, generator=draw)
    matrix = matrix + matrix.mT
    packed = pack_triangle(matrix)
    assert packed.shape == (cols * (cols + 1) // 2,)
    lower = matrix[torch.ones(cols, cols).tril().bool()]
    assert torch.equal(packed.sort().values, lower.sort().values)
    assert torch.equal(unpack_triangle(packed, cols), matrix)
    assert torch.equal(triangle_diagonal(packed, cols), matrix.diagonal())
    half = unpack_triangle(pack_triangle(matrix, torch.bfloat16), cols)
    assert torch.equal(half, matrix.bfloat16().float())


def test_a_triangle_of_another_size_is_refused():
    with pytest.raises(ValueError, match="a triangle of 4 columns has 10 numbers"):
        unpack_triangle(torch.zeros(9), 4)


def test_a_statistic_message_counts_its_bytes():
    statistic = StatisticMessage(("q",), (3, 3), 5, torch.zeros(6, dtype=torch.bfloat16))
    assert StatisticsMessage("a", 0, 0, 1, (statistic, statistic)).nbytes == 24
