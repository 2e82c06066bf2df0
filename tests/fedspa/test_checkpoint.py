"""Checkpoints read from disk: every tensor where the headers say, every broken folder refused."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import make_model

from fedspa.streaming import checkpoint as reading
from fedspa.streaming.checkpoint import (
    content_digest,
    find_checkpoint,
    open_checkpoint,
    read_into,
    read_tensor,
)

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def write_sharded(folder, parts):
    folder.mkdir(exist_ok=True)
    for file, tensors in parts.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    places = {name: file for file, tensors in parts.items() for name in tensors}
    write_index(folder, places)
    return folder


def write_index(folder, places):
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def sharded(tmp_path):
    """A folder of two shards: a.weight and b.weight, c.weight."""
    torch.manual_seed(3)
    first = {"a.weight": torch.randn(5, 3)}
    second = {"b.weight": torch.randn(2, 4), "c.weight": torch.randn(3, 3)}
    return write_sharded(tmp_path / "sharded", dict(zip(SHARDS, (first, second), strict=True)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("limit", ["20KB", "1GB"])
def test_a_checkpoint_of_transformers_is_read_bit_for_bit(tmp_path, dtype, limit):
    make_model("llama", dtype=dtype).save_pretrained(tmp_path, max_shard_size=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    opened = open_checkpoint(tmp_path)
    wanted = {}
    for file in files:
        wanted |= load_file(file)
    assert opened.files == [file.name for file in files]
    assert (opened.index is None) == (len(files) == 1) == (limit == "1GB")
    assert set(opened.tensors) == set(wanted)
    assert opened.nbytes == sum(tensor.nbytes for tensor in wanted.values())
    for name, tensor in wanted.items():
        found = read_tensor(opened, name)
        assert found.dtype == dtype and torch.equal(found, tensor), name


def test_tensors_come_by_file_and_then_by_offset(sharded):
    opened = open_checkpoint(sharded)
    places = [(stored.file, stored.begin) for stored in opened.tensors.values()]
    assert places == sorted(places) and len(places) == 3
    assert opened.metadata == {file: {"format": "pt"} for file in SHARDS}


def test_buffers_of_every_dtype_are_read(tmp_path):
    tensors = {
        "mask": torch.tensor([[True, False]]),
        "positions": torch.arange(6).reshape(1, 6),
        "attn.bias": torch.ones(1, 1, 3, 3, dtype=torch.uint8),
        "scale": torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "small": torch.tensor([-3], dtype=torch.int8),
        "wide": torch.tensor([70000], dtype=torch.uint32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        found = read_tensor(opened, name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        bits, wanted = (t.reshape(-1).view(torch.uint8) for t in (found, tensor))
        assert torch.equal(bits, wanted), name


def test_short_reads_are_continued(sharded, monkeypatch):
    opened, read = open_checkpoint(sharded), os.preadv
    wanted = load_file(sharded / SHARDS[0])["a.weight"]
    calls = []

    def seven_bytes(file, buffers, offset):
        calls.append(offset)
        return read(file, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", seven_bytes)
    assert torch.equal(read_tensor(opened, "a.weight"), wanted)
    assert len(calls) == -(-wanted.nbytes // 7)


def test_reading_goes_into_the_memory_that_is_given(sharded):
    opened = open_checkpoint(sharded)
    out = torch.full((5, 3), float("nan"))
    read_into(opened, "a.weight", out)
    assert torch.equal(out, load_file(sharded / SHARDS[0])["a.weight"])


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(3, 5),
        torch.empty(5, 3, dtype=torch.float16),
        torch.empty(3, 5).T,
        torch.empty(5, 3, device="meta"),
    ],
    ids=["shape", "dtype", "strides", "device"],
)
def test_memory_that_does_not_fit_is_refused(sharded, out):
    with pytest.raises(ValueError, match=r"a.weight is torch.float32 of shape \(5, 3\); it cannot"):
        read_into(open_checkpoint(sharded), "a.weight", out)


def test_a_file_cut_during_the_run_is_named(sharded):
    opened = open_checkpoint(sharded)
    os.truncate(sharded / SHARDS[0], opened.tensors["a.weight"].begin + 8)
    with pytest.raises(RuntimeError, match=f"{SHARDS[0]} ended at byte"):
        read_tensor(opened, "a.weight")


def test_a_folder_without_safetensors_is_told_apart(tmp_path, sharded):
    assert find_checkpoint(sharded) and not find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor"):
        open_checkpoint(tmp_path)


def test_missing_shards_are_named(sharded):
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of the 2 shards.*: {SHARDS[1]}; copy"):
        open_checkpoint(sharded)


def test_a_truncated_shard_is_named_with_its_sizes(sharded):
    size = (sharded / SHARDS[1]).stat().st_size
    os.truncate(sharded / SHARDS[1], size - 4)
    with pytest.raises(
        ValueError, match=f"{SHARDS[1]} is truncated: its header says {size} bytes.* has {size - 4}"
    ):
        open_checkpoint(sharded)


def test_a_shard_cut_inside_its_header_is_truncated(sharded):
    os.truncate(sharded / SHARDS[0], 40)
    with pytest.raises(ValueError, match=f"{SHARDS[0]} is truncated.*the file has 40"):
        open_checkpoint(sharded)


def test_a_tensor_that_its_shard_does_not_hold_is_named(sharded):
    write_index(sharded, {"a.weight": SHARDS[0], "b.weight": SHARDS[0], "c.weight": SHARDS[1]})
    with pytest.raises(ValueError, match=f"puts b.weight into {SHARDS[0]}, which does not hold it"):
        open_checkpoint(sharded)


def test_a_tensor_that_the_index_does_not_name_is_refused(sharded):
    write_index(sharded, {"a.weight": SHARDS[0], "b.weight": SHARDS[1]})
    with pytest.raises(ValueError, match=f"{SHARDS[1]} holds c.weight, which the index does not"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    extra = load_file(sharded / SHARDS[0]) | {"b.weight": torch.zeros(2, 4)}
    save_file(extra, sharded / SHARDS[0])
    with pytest.raises(ValueError, match=f"{SHARDS[0]} holds b.weight, .* puts into {SHARDS[1]}"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is no JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "is no name of a .safetensors file"),
        ('{"weight_map": {"a": 3}}', "is no name of a .safetensors file"),
    ],
)
def test_a_broken_index_is_refused(sharded, text, reason):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=f"index.json .*{reason}"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b"{", b"", "no JSON object"),
        (b"[1]", b"", "no JSON object"),
        (b"\xff\xfe", b"", "no JSON object"),
        (b"[" * 100_000, b"", "no JSON object"),
        ({"a": {"dtype": "F32"}}, b"", "a lacks a dtype, a shape or two offsets"),
        ({"a": 3}, b"", "a lacks a dtype"),
        ({"a": entry("F32", [2], 0, 4)}, b"4444", r"a has 4 bytes, but F32 of shape \[2\] takes 8"),
        ({"a": entry("F32", [-1], 0, 4)}, b"4444", r"a has shape \[-1\]"),
        ({"a": entry("F32", [1.0], 0, 4)}, b"4444", r"a has shape \[1.0\]"),
        ({"a": entry("F32", 1, 0, 4)}, b"4444", "a has shape 1"),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, b"666666", "inside a"),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [1], 5, 6)}, b"666666", "before b, belong"),
        ({"a": entry("U8", [4], 0, 4)}, b"55555", "accounts for 72 bytes of 73"),
        ({"__metadata__": {"format": 1}}, b"", "__metadata__ is not made of texts"),
        (b'{"a":{"dtype":"U8","dtype":"I8"}}', b"", "'dtype' stands there twice"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header, data, reason):
    write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ValueError, match=f"model.safetensors is damaged or no.*{reason}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has 0 bytes, too few"),
        (b"\x80\x02}q\x00X\x05\x00\x00\x00", "a header of [0-9]+ bytes is announced"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "git lfs pull"),
    ],
    ids=["empty", "another format", "pointer"],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, reason):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"model.safetensors is .*{reason}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("layer.weight", torch.int8),
        ("layer.weight", torch.float8_e4m3fn),
        ("layer.qweight", torch.int32),
        ("layer.weight_packed", torch.int32),
        ("experts.gate_up_proj_blocks", torch.uint8),
    ],
)
def test_a_quantised_checkpoint_is_refused(tmp_path, name, dtype):
    save_file({name: torch.zeros(4, 4).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is stored as {dtype}, .* it was quantised from"):
        open_checkpoint(tmp_path)


def test_four_bit_elements_are_refused_as_quantised(tmp_path):
    write_raw(tmp_path / "model.safetensors", {"a.weight": entry("F4", [2, 2], 0, 2)}, b"22")
    with pytest.raises(ValueError, match="a.weight is stored as F4, .* it was quantised from"):
        open_checkpoint(tmp_path)


def test_double_precision_weights_are_refused(tmp_path):
    save_file({"a.weight": torch.zeros(2, 2).double()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a.weight is stored as torch.float64; save"):
        open_checkpoint(tmp_path)


def test_a_single_file_goes_before_an_index(sharded):
    save_file({"alone.weight": torch.ones(2, 2)}, sharded / "model.safetensors")
    opened = open_checkpoint(sharded)
    assert list(opened.tensors) == ["alone.weight"] and opened.index is None


def test_the_digest_does_not_depend_on_the_shards(sharded, tmp_path):
    tensors = load_file(sharded / SHARDS[0]) | load_file(sharded / SHARDS[1])
    save_file(tensors, tmp_path / "model.safetensors")
    assert content_digest(open_checkpoint(sharded)) == content_digest(open_checkpoint(tmp_path))


@pytest.mark.parametrize("change", ["bit", "name", "shape", "dtype"])
def test_the_digest_tells_small_changes(tmp_path, change):
    tensor = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    before = content_digest(open_checkpoint(tmp_path))
    bits = tensor.view(torch.int16).clone()
    bits[2, 3] ^= 1
    changed = {
        "bit": {"a": bits.view(torch.float16)},
        "name": {"b": tensor},
        "shape": {"a": tensor.reshape(4, 3)},
        "dtype": {"a": tensor.view(torch.bfloat16)},
    }[change]
    save_file(changed, tmp_path / "model.safetensors")
    assert content_digest(open_checkpoint(tmp_path)) != before


def test_the_digest_of_a_large_model_samples_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WHOLE_MODEL", 0)
    large, small = torch.zeros(2 << 20, dtype=torch.uint8), torch.zeros(100)

    def digest():
        save_file({"large": large, "small": small}, tmp_path / "model.safetensors")
        return content_digest(open_checkpoint(tmp_path))

    found, step = {digest()}, ((2 << 20) - 4096) // 63
    for tensor, index in ((large, 0), (large, -1), (large, 10 * step + 2000), (small, 50)):
        tensor[index] += 1
        found.add(digest())
    assert len(found) == 5
    large[step - 2000] += 1  # between two pieces
    assert digest() in found
