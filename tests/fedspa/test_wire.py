"""Frames: a message comes back as it was sent, and nothing else comes back at all."""

import gc
import json
import struct
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_frames import ENVELOPE, PREFIX, SHAPES, block, expected, seal, sums, take_apart

from fedspa.messages import BlockMessage, LayerMessage, StatisticMessage, StatisticsMessage
from fedspa.wire import Envelope, decode, encode

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NUMBERS = (torch.float32, torch.bfloat16, torch.int64)
FRAME = encode(block(), ENVELOPE)
SUMS = encode(sums(), ENVELOPE)
fuzzed = settings(deadline=None, max_examples=300, derandomize=True)


def same(one, other) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if one is None or other is None:
        return one is other
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # One number may be contiguous at any stride, and cannot be viewed as bytes then.
    first, second = (torch.empty(x.numel(), dtype=x.dtype).copy_(x.flatten()) for x in (one, other))
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def assert_same_block(sent: BlockMessage, got: BlockMessage) -> None:
    assert replace(sent, layers={}) == replace(got, layers={})
    assert list(sent.layers) == list(got.layers)
    for name, layer in sent.layers.items():
        back = got.layers[name]
        assert layer.shape == back.shape
        assert layer.pruned == back.pruned
        assert same(layer.bits, back.bits)
        assert same(layer.values, back.values)


def refused(frame: bytes, of, match: str) -> str:
    with pytest.raises(ValueError, match=match) as error:
        decode(frame, of)
    sentence = str(error.value)
    assert sentence.startswith("'c1', block 2")
    return sentence


# What was sent comes back.


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_weights_come_back_bit_for_bit(dtype, sparsity):
    sent = block(dtype, sparsity=sparsity)
    got = decode(encode(sent, ENVELOPE), expected(dtype=dtype))
    assert_same_block(sent, got)
    for name, layer in sent.layers.items():
        assert same(layer.weight(), got.layers[name].weight())


def test_every_bit_pattern_of_bfloat16_survives():
    """NaN with any payload, both zeros and subnormals: judging numbers is not the codec's work."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    shapes = {"all": (256, 256)}
    bits = torch.full((256, 32), 255, dtype=torch.uint8)
    sent = BlockMessage("c1", 1, 2, 7, {"all": LayerMessage((256, 256), bits, patterns)})
    got = decode(encode(sent, ENVELOPE), expected(dtype=torch.bfloat16, shapes=shapes))
    assert same(got.layers["all"].values, patterns)


def test_masks_alone_come_back_with_their_counts():
    sent = block(mask_only=True)
    for layers in (sent.layers, {n: replace(x, kept=None) for n, x in sent.layers.items()}):
        frame = encode(replace(sent, layers=layers), ENVELOPE)
        got = decode(frame, expected("mask", None))
        assert_same_block(sent, got)
        assert all(layer.kept is not None for layer in got.layers.values())


@pytest.mark.parametrize("kind", ["hessian", "squares", "sums"])
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("without", [(), ("down",), ("q", "k", "v", "one"), ("k",)])
def test_statistics_come_back_bit_for_bit(kind, dtype, without):
    """Also without layers that no token reached, as an expert's."""
    sent = sums(dtype, kind, without=without)
    got = decode(encode(sent, ENVELOPE), expected(kind, dtype))
    assert replace(sent, statistics=()) == replace(got, statistics=())
    for one, other in zip(sent.statistics, got.statistics, strict=True):
        assert replace(one, values=None) == replace(other, values=None)
        assert same(one.values, other.values)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_a_pruners_own_sums_may_have_any_shape(shape):
    values = torch.randn(shape).flatten()
    sent = StatisticsMessage("c1", 1, 2, 7, (StatisticMessage(("q",), shape, 3, values),))
    (got,) = decode(encode(sent, ENVELOPE), expected("sums")).statistics
    assert (got.shape, got.tokens) == (shape, 3)
    assert same(got.values, values)


def test_the_same_message_is_the_same_bytes():
    assert encode(block(), ENVELOPE) == FRAME
    assert encode(sums(), ENVELOPE) == SUMS


def test_a_frame_is_laid_out_as_it_is_written_down():
    sent = block(torch.bfloat16)
    header, payload = take_apart(encode(sent, ENVELOPE))
    assert (header["kind"], header["dtype"], header["loss"]) == ("weights", "bfloat16", 0.1)
    bits = torch.cat([layer.values for layer in sent.layers.values()]).view(torch.int16).tolist()
    masks = b"".join(layer.bits.numpy().tobytes() for layer in sent.layers.values())
    assert payload == struct.pack(f"<{len(bits)}h", *bits) + masks
    assert seal(header, payload)[PREFIX:].startswith(b"{")


def test_any_order_of_layers_comes_back_in_the_blocks_order():
    sent = block()
    turned = replace(sent, layers=dict(reversed(sent.layers.items())))
    assert_same_block(sent, decode(encode(turned, ENVELOPE), expected()))


def test_tensors_that_are_not_contiguous_are_sent_as_they_read():
    sent = block()
    layer = sent.layers["q"]
    apart = torch.stack([layer.values, layer.values], dim=1)[:, 0]
    turned = layer.bits.T.contiguous().T
    layers = {**sent.layers, "q": replace(layer, values=apart, bits=turned)}
    assert encode(replace(sent, layers=layers), ENVELOPE) == FRAME


def test_what_was_decoded_shares_the_frames_memory_and_holds_it():
    frame = bytearray(encode(block(), ENVELOPE))
    got = decode(memoryview(frame), expected())
    before = got.layers["one"].bits.clone()
    frame[-1] ^= 1
    assert not same(got.layers["one"].bits, before)
    del frame
    gc.collect()
    assert not same(got.layers["one"].bits, before)


@pytest.mark.parametrize("shift", range(1, 9))
def test_a_frame_may_begin_at_any_address(shift):
    buffer = b"x" * shift + SUMS
    got = decode(memoryview(buffer)[shift:], expected("hessian"))
    assert same(got.statistics[0].values, sums().statistics[0].values)
    # Vector units and other libraries may count on it.
    assert all(statistic.values.data_ptr() % 4 == 0 for statistic in got.statistics)


def test_no_warning_is_left_to_a_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(FRAME, expected())


def test_samples_that_nobody_announced_are_taken_as_they_come():
    assert decode(FRAME, expected(samples=None)).samples == 7


def test_what_only_compares_as_equal_is_refused():
    for number in (True, 1.0):
        refused(changed(FRAME, round=number), expected(), f"round {number}, and 1 was expected")
    refused(changed(FRAME, samples=7.0), expected(), "samples 7.0, and not a whole number")


# What cannot be sent is refused where it is made.


def test_what_a_frame_cannot_hold_is_refused_by_its_sender():
    sent = block()
    mixed = {**sent.layers, "q": block(torch.float16).layers["q"]}
    bare = {**sent.layers, "q": block(mask_only=True).layers["q"]}
    for layers in (mixed, bare):
        with pytest.raises(ValueError, match="'c1', block 2: .*message_dtype"):
            encode(replace(sent, layers=layers), ENVELOPE)
    for loss in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="the loss is"):
            encode(replace(sent, loss=loss), ENVELOPE)
    with pytest.raises(ValueError, match="0 statistics"):
        encode(StatisticsMessage("c1", 1, 2, 7, ()), ENVELOPE)
    with pytest.raises(ValueError, match="shorten the names"):
        encode(replace(sent, sender="c" * 2**20), ENVELOPE)


# Whatever is not as it was asked is refused, with a sentence.


@pytest.mark.parametrize("of", ["weights", "hessian"])
@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"envelope": replace(ENVELOPE, model="00")}, "model 'abab.* '00' was expected"),
        ({"envelope": replace(ENVELOPE, run="00")}, "run 'cdcd.* '00' was expected"),
        ({"envelope": replace(ENVELOPE, task="00")}, "task 'efef.* '00' was expected"),
        ({"round": 0}, "round 1, and 0 was expected"),
        ({"samples": 8}, "samples 7, and 8 was expected"),
        ({"dtype": torch.bfloat16}, "dtype 'float32', and 'bfloat16' was expected"),
    ],
)
def test_a_frame_of_something_else_is_refused(of, other, match):
    frame = FRAME if of == "weights" else SUMS
    refused(frame, replace(expected(of), **other), match)


def test_nobody_speaks_for_another_client_or_block():
    for of, frame in (("weights", FRAME), ("hessian", SUMS)):
        with pytest.raises(ValueError, match="^'c2', block 2: .*sender 'c1', and 'c2' was"):
            decode(frame, expected(of, sender="c2"))
        with pytest.raises(ValueError, match="^'c1', block 3: .*block 2, and 3 was"):
            decode(frame, expected(of, block=3))


def test_another_kind_is_refused():
    bits = encode(block(mask_only=True), ENVELOPE)
    refused(bits, expected(), "kind 'mask', and 'weights' was expected")
    refused(bits, expected("hessian"), "kind 'mask', and 'statistics' was expected")
    refused(seal(take_apart(FRAME)[0], b""), expected("mask", None), "kind 'weights', and 'mask'")
    narrow = seal(take_apart(SUMS)[0], b"")
    refused(narrow, expected("squares"), r"shape \(13, 13\), and squares of 13 .* need \(13,\)")
    frame = encode(sums(kind="squares"), ENVELOPE)
    refused(frame, expected("hessian"), r"shape \(13,\), and hessian of 13 inputs need \(13, 13\)")


def test_an_impossible_expectation_is_the_callers_mistake():
    for kind, dtype in (
        ("mask", torch.float32),
        ("weights", None),
        ("weights", torch.int8),
        ("wights", torch.float32),
    ):
        with pytest.raises(ValueError, match=f"'{kind}' with dtype {dtype} cannot be expected"):
            expected(kind, dtype)


def test_another_schema_version_is_told_before_anything_is_read():
    refused(seal({}, b"", schema=2), expected(), "schema version 2, and this FedSpa speaks 1")


def test_a_frame_that_was_cut_or_added_to_is_refused():
    for end in (0, 8, PREFIX, PREFIX + 5, len(FRAME) - 1):
        refused(FRAME[:end], expected(), "bytes came")
    refused(FRAME + b"\0", expected(), "or something was added")
    refused(b"PK" + FRAME[2:], expected(), "a frame of FedSpa with 8f")


def test_every_single_bit_that_is_turned_is_noticed():
    for frame, of in ((FRAME, expected()), (SUMS, expected("hessian"))):
        for place in range(0, len(frame) * 8, 7):
            damaged = bytearray(frame)
            damaged[place // 8] ^= 1 << place % 8
            refused(bytes(damaged), of, ":")


def test_sizes_are_bounded_before_anything_is_made_of_them():
    sizes = struct.pack("<IIQ", 1, 2**31, 0)
    refused(FRAME[:8] + sizes + FRAME[24:], expected(), "a header of 2147483648 bytes")
    sizes = struct.pack("<IIQ", 1, 36, 2**60)
    refused(FRAME[:8] + sizes + FRAME[24:], expected(), "layers come to [0-9]+ at most")
    refused(FRAME[:8] + sizes + FRAME[24:], expected("hessian"), "layers come to [0-9]+ at most")
    sizes = struct.pack("<IIQ", 1, 35, 0)
    refused(FRAME[:8] + sizes + FRAME[24:], expected(), "begins at byte 63")
    header, payload = take_apart(FRAME)
    refused(seal(header, payload + bytes(700)), expected(), "at most")


def changed(frame: bytes, **fields) -> bytes:
    """A frame with other fields in its header, whose checksum is right."""
    header, payload = take_apart(frame)
    return seal({**header, **fields}, payload)


def test_layers_must_be_those_of_the_block():
    layers = take_apart(FRAME)[0]["layers"]
    (first, *rest) = layers
    for wrong, match in (
        ([*layers, first], "layer 'q' came twice"),
        ([["z", *first[1:]], *rest], "layer 'z' came unasked"),
        (rest, r"the layers \['q'\] are missing"),
        ([["q", 13, 5, first[3]], *rest], r"layer q: its shape is \(13, 5\), .* \(5, 13\)"),
        ([["q", 5, 13, first[3] + 1], *rest], "the payload has"),
        ([["q", 5, 13, 66], *rest], "66 of 65 weights are kept"),
        ([["q", 5, 13, -1], *rest], "kept weights -1"),
        ([["q", True, 13, 1], *rest], "rows True"),
        ([["q", 5, 13], *rest], "not by 4 fields"),
        ([["q", 5, 13, 10**400], *rest], "not a whole number"),
        ({"q": 1}, "not a list"),
        (None, "not a list"),
    ):
        refused(changed(FRAME, layers=wrong), expected(), match)


def test_a_count_must_be_the_masks():
    layers = take_apart(FRAME)[0]["layers"]
    layers[0][3] += 1
    layers[1][3] -= 1
    refused(changed(FRAME, layers=layers), expected(), f"layer q: {layers[0][3]} weights came, and")
    header, payload = take_apart(encode(block(mask_only=True), ENVELOPE))
    header["layers"][4][3] ^= 1
    refused(seal(header, payload), expected("mask", None), "layer one: [01] weights came, and")


def test_bits_behind_the_last_column_are_refused():
    sent = block(mask_only=True)
    layer = sent.layers["q"]
    bits = layer.bits.clone()
    bits[2, 1] |= 1 << 5
    frame = encode(replace(sent, layers={**sent.layers, "q": replace(layer, bits=bits)}), ENVELOPE)
    refused(frame, expected("mask", None), "layer q: bits .* behind its last column 12")


def test_statistics_must_be_those_of_the_block():
    (first, *rest) = take_apart(SUMS)[0]["statistics"]
    names, shape, tokens, numbers = first
    for wrong, match in (
        ([first, first, *rest], "layer 'q' came twice"),
        ([[["q", "q"], shape, tokens, numbers], *rest], "layer 'q' came twice"),
        ([[["z"], shape, tokens, numbers], *rest], "layer 'z' came unasked"),
        ([[[["q"]], shape, tokens, numbers], *rest], "came unasked"),
        ([[["q", "down"], shape, tokens, numbers]], r"\[8, 13\] inputs"),
        ([[[], shape, tokens, numbers], *rest], r"of layers \[\]"),
        ([[names, [13, 14], tokens, numbers], *rest], r"shape \(13, 14\)"),
        ([[names, shape, tokens, numbers + 1], *rest], "92 numbers came"),
        ([[names, shape, -1, numbers], *rest], "tokens -1"),
        ([[names, shape, 1.0, numbers], *rest], "tokens 1.0"),
        ([[names, "13", tokens, numbers], *rest], "shape '13'"),
        ([[names, shape, tokens], *rest], "not by 4 fields"),
        ([first], "its statistics come to"),
        ([], "not a list of one"),
    ):
        refused(changed(SUMS, statistics=wrong), expected("hessian"), match)
    huge = [[["q"], [2**62] * 8, 1, 1]]
    refused(changed(SUMS, statistics=huge), expected("sums"), "numbers came")
    empty = [[["q"], [2**62, 0], 1, 0]]
    refused(changed(SUMS, statistics=empty), expected("sums"), "numbers came")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"[" * 200_000, "not JSON"),
        (b'{"loss":' * 100_000 + b"1" + b"}" * 100_000, "not JSON"),
        (b'{"kind":"weights","kind":"mask"}', "stands twice"),
        (b'{"loss":NaN}', "NaN is no number"),
        (b'{"loss":' + b"9" * 5000 + b"}", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "has no 'kind'"),
        (b"", "not JSON"),
    ],
)
def test_a_header_that_is_no_header_is_refused(text, match):
    refused(seal(text, b""), expected(), match)


def test_a_sentence_stays_short_and_printable_whatever_was_sent():
    for name in ("x" * 900_000, "\ud800" * 1000, "a\nb"):
        sentence = refused(changed(FRAME, run=name), expected(), "run ")
        assert len(sentence) < 400
        assert "\n" not in sentence
        sentence.encode()
    for field in ("sender", "layers"):
        nested = json.loads("[" * 900 + "]" * 900)
        assert len(refused(changed(FRAME, **{field: nested}), expected(), r"\[\[")) < 400


@pytest.mark.parametrize("loss", [-1.0, 1, "1", None, True, 1e999])
def test_a_loss_is_a_finite_number(loss):
    text = json.dumps({**take_apart(FRAME)[0], "loss": loss}).replace("Infinity", "1e999").encode()
    refused(seal(text, take_apart(FRAME)[1]), expected(), "the loss is")


# Whatever the bytes are, ValueError is all that comes of them.


KINDS = (
    (FRAME, expected()),
    (encode(block(torch.bfloat16), ENVELOPE), expected(dtype=torch.bfloat16)),
    (encode(block(mask_only=True), ENVELOPE), expected("mask", None)),
    (SUMS, expected("hessian")),
    (encode(sums(torch.int64, "squares"), ENVELOPE), expected("squares", torch.int64)),
    (encode(sums(torch.bfloat16, "sums"), ENVELOPE), expected("sums", torch.bfloat16)),
)


def decode_or_refuse(frame: bytes, of):
    """The message, or None where it was refused: anything but ValueError goes on."""
    try:
        return decode(frame, of)
    except ValueError as error:
        assert 0 < len(str(error)) < 2000
        str(error).encode()
        return None


@fuzzed
@given(content=st.binary(max_size=300), of=st.sampled_from([of for _, of in KINDS]))
def test_random_bytes_are_refused(content, of):
    assert decode_or_refuse(content, of) is None
    assert decode_or_refuse(FRAME[:PREFIX] + content, of) is None
    assert decode_or_refuse(seal(content, b""), of) is None


@fuzzed
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_changed_bytes_are_refused(kind, data):
    frame, of = kind
    begin = data.draw(st.integers(0, len(frame)))
    end = data.draw(st.integers(begin, min(len(frame), begin + 40)))
    content = frame[:begin] + data.draw(st.binary(max_size=20)) + frame[end:]
    assert (decode_or_refuse(content, of) is None) == (content != frame)


@fuzzed
@given(one=st.sampled_from(KINDS), other=st.sampled_from(KINDS))
def test_a_header_with_anothers_payload_is_no_message_of_it(one, other):
    header, payload = take_apart(one[0])[0], take_apart(other[0])[1]
    assert (decode_or_refuse(seal(header, payload), one[1]) is None) == (one != other)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, -(2**63), 10**30, 0, 1, 13])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["q", "down", "weights", "float32"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@fuzzed
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_headers_with_anything_in_them_come_to_a_message_or_to_a_sentence(kind, data):
    """Sealed with a right checksum, as somebody who means harm would."""
    frame, of = kind
    header, payload = take_apart(frame)
    place, key = header, data.draw(st.sampled_from(sorted(header)))
    # Down into lists, to any depth that is there.
    while isinstance(place[key], list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.integers(0, len(place) - 1))
    place[key] = data.draw(JSON)
    got = decode_or_refuse(seal(header, payload), of)
    if got is not None:
        assert encode(got, ENVELOPE)


@fuzzed
@given(payload=st.binary(min_size=1), data=st.data())
def test_payloads_with_anything_in_them_come_to_a_message_or_to_a_sentence(payload, data):
    frame, of = data.draw(st.sampled_from(KINDS))
    header, whole = take_apart(frame)
    begin = data.draw(st.integers(0, len(whole)))
    content = (whole[:begin] + payload + whole[begin:])[: len(whole)]
    got = decode_or_refuse(seal(header, content), of)
    if got is not None:
        assert take_apart(encode(got, ENVELOPE)) == (header, content)


def test_envelopes_are_compared_as_a_whole():
    for name in ("model", "run", "task"):
        other = Envelope(**{**vars(ENVELOPE), name: ENVELOPE.model + "0"})
        assert decode_or_refuse(encode(block(), other), expected()) is None


def test_shapes_of_nothing_else_are_needed():
    """A block of one layer, as the smallest; and one whose layers all keep nothing."""
    shapes = {"only": SHAPES["one"]}
    sent = block(shapes=shapes, sparsity=1.0)
    got = decode(encode(sent, ENVELOPE), expected(shapes=shapes))
    assert_same_block(sent, got)
