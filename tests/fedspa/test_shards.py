"""Output shards: valid under their names or absent, a full disk told, memory of a piece."""

import errno
import json
import os
import resource
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import make_model, save_with_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.memory import peak
from fedspa.streaming import pieces
from fedspa.streaming.checkpoint import content_digest, open_checkpoint, read_into, read_tensor
from fedspa.streaming.companions import copy_rest
from fedspa.streaming.merging import merge
from fedspa.streaming.shards import OutputShards, output_bytes

INDEX = "model.safetensors.index.json"


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of a hundred bytes, so that small tensors take several."""
    monkeypatch.setattr(pieces, "PIECE", 100)


@pytest.fixture
def folders(tmp_path):
    """A sharded bfloat16 checkpoint of transformers and an empty folder."""
    make_model("llama", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "model", max_shard_size="20KB"
    )
    (tmp_path / "out").mkdir()
    return tmp_path / "model", tmp_path / "out"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def all_tensors(folder):
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_is_the_checkpoint_again(tmp_path, small_pieces, tied):
    model = make_model("llama", dtype=torch.bfloat16)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    checkpoint = open_checkpoint(tmp_path / "model")
    (tmp_path / "out").mkdir()
    shards = OutputShards(checkpoint, tmp_path / "out", {})
    shards.copy(checkpoint.tensors)
    shards.finish()
    copy_rest(checkpoint, tmp_path / "out", None)
    assert names_in(tmp_path / "out") == names_in(tmp_path / "model")
    for file in checkpoint.files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_is_converted_as_torch_converts_it(folders, small_pieces, dtype):
    model, out = folders
    checkpoint = open_checkpoint(model)
    shards = OutputShards(checkpoint, out, dict.fromkeys(checkpoint.tensors, dtype))
    names = list(checkpoint.tensors)
    shards.copy(names[::2])
    for name in names[1::2]:
        shards.write(name, read_tensor(checkpoint, name))
    shards.finish()
    copy_rest(checkpoint, out, dtype)
    found = all_tensors(out)
    assert list(json.loads((out / INDEX).read_text())["weight_map"]) == list(
        json.loads((model / INDEX).read_text())["weight_map"]
    )
    total = json.loads((out / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in found.values())
    for name, tensor in all_tensors(model).items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype))
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype


def test_buffers_keep_their_dtype_and_wide_elements_come_first(tmp_path):
    stored = {
        "a": torch.tensor([1.5, 2.5, 3.5], dtype=torch.float16),
        "b": torch.tensor([1.0], dtype=torch.float16),
        "mask": torch.tensor([True, False, True]),
        "positions": torch.arange(3),
    }
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    save_file(stored, tmp_path / "in" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "in")
    dtypes = dict.fromkeys(stored, torch.float32) | {"a": torch.float16}
    shards = OutputShards(checkpoint, tmp_path / "out", dtypes)
    for name, at in shards.tensors.items():
        assert at.begin % at.dtype.itemsize == 0, name
    shards.copy(stored)
    shards.finish()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a": torch.float16,
        "b": torch.float32,
        "mask": torch.bool,
        "positions": torch.int64,
    }
    assert all(torch.equal(found[name], stored[name].to(found[name].dtype)) for name in stored)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not (tmp_path / "out" / INDEX).exists()


@pytest.mark.parametrize("shape", [(), (0, 4), (1,), (7, 30), (3, 5, 11)])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_written_is_read_again(tmp_path, small_pieces, shape, transposed):
    (tmp_path / "out").mkdir()
    save_file({"a": torch.zeros(shape, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    shards = OutputShards(open_checkpoint(tmp_path), tmp_path / "out", {})
    tensor = torch.randn(shape[::-1] if transposed else shape)
    tensor = tensor.permute(tuple(reversed(range(tensor.ndim)))) if transposed else tensor
    shards.write("a", torch.nn.Parameter(tensor))
    assert torch.equal(shards.read("a"), tensor.to(torch.bfloat16))
    shards.finish()
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["a"], tensor.to(torch.bfloat16)
    )


def test_short_writes_are_continued(folders, monkeypatch):
    model, out = folders
    checkpoint, write = open_checkpoint(model), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:1000], at))
    shards = OutputShards(checkpoint, out, {})
    shards.copy(checkpoint.tensors)
    shards.finish()
    for file in checkpoint.files:
        assert (out / file).read_bytes() == (model / file).read_bytes()


def test_a_wrong_shape_is_refused(folders):
    checkpoint = open_checkpoint(folders[0])
    shards = OutputShards(checkpoint, folders[1], {})
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(1, 32\), but \(32,\)"):
        shards.write("model.norm.weight", torch.zeros(1, 32))


def test_the_checkpoint_itself_is_no_place_for_the_output(folders):
    before = names_in(folders[0])
    with pytest.raises(ValueError, match="holds the checkpoint that is read"):
        OutputShards(open_checkpoint(folders[0]), folders[1] / ".." / "model", {})
    assert names_in(folders[0]) == before


def test_the_size_is_known_beforehand(folders):
    checkpoint = open_checkpoint(folders[0])
    dtypes = dict.fromkeys(checkpoint.tensors, torch.float32)
    shards = OutputShards(checkpoint, folders[1], dtypes)
    reserved = sum(path.stat().st_size for path in folders[1].iterdir())
    shards.copy(checkpoint.tensors)
    shards.finish()
    whole = sum(path.stat().st_size for path in folders[1].iterdir())
    assert reserved < whole and abs(output_bytes(checkpoint, dtypes) - whole) < 16


def test_no_shard_has_its_name_before_the_end(folders):
    checkpoint = open_checkpoint(folders[0])
    shards = OutputShards(checkpoint, folders[1], {})
    names = list(checkpoint.tensors)
    shards.copy(names[1:])
    assert names_in(folders[1]) == [f"{file}.partial" for file in checkpoint.files]
    with pytest.raises(RuntimeError, match=f"1 of {len(names)} tensors .*, {names[0]} among them"):
        shards.finish()
    assert names_in(folders[1]) == [f"{file}.partial" for file in checkpoint.files]
    shards.copy(names[:1])
    shards.finish()
    assert names_in(folders[1]) == sorted([*checkpoint.files, INDEX])


def test_a_killed_run_is_taken_up(folders):
    model, out = folders
    checkpoint = open_checkpoint(model)
    names = list(checkpoint.tensors)
    child = os.fork()  # a second interpreter would import for seconds
    if child == 0:
        try:
            OutputShards(checkpoint, out, {}).copy(names[:5])
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    shards = OutputShards(checkpoint, out, {}, resume=True)
    assert torch.equal(shards.read(names[0]), read_tensor(checkpoint, names[0]))
    shards.copy(names[5:])
    shards.finish()
    for file in checkpoint.files:
        assert (out / file).read_bytes() == (model / file).read_bytes()


def test_a_run_killed_between_two_renames_is_taken_up(folders):
    model, out = folders
    checkpoint = open_checkpoint(model)
    shards = OutputShards(checkpoint, out, {})
    shards.copy(checkpoint.tensors)
    shards.sync()
    shards.close()
    first = checkpoint.files[0]
    (out / f"{first}.partial").rename(out / first)
    shards = OutputShards(checkpoint, out, {}, resume=True)
    assert not (out / first).exists()
    shards.finish()
    for file in checkpoint.files:
        assert (out / file).read_bytes() == (model / file).read_bytes()


@pytest.mark.parametrize("damage", ["missing", "shorter", "another dtype"])
def test_files_that_do_not_fit_are_not_taken_up(folders, damage):
    checkpoint = open_checkpoint(folders[0])
    OutputShards(checkpoint, folders[1], {}).close()
    partial = folders[1] / f"{checkpoint.files[1]}.partial"
    if damage == "missing":
        partial.unlink()
    if damage == "shorter":
        os.truncate(partial, partial.stat().st_size - 1)
    name = next(n for n, at in checkpoint.tensors.items() if at.file == checkpoint.files[1])
    dtypes = {name: torch.float16} if damage == "another dtype" else {}
    before = names_in(folders[1])
    with pytest.raises(ValueError, match=f"{partial.name} of the killed run .*--restart"):
        OutputShards(checkpoint, folders[1], dtypes, resume=True)
    assert names_in(folders[1]) == before


def test_a_new_run_replaces_what_a_killed_one_left(folders):
    checkpoint = open_checkpoint(folders[0])
    stale = folders[1] / f"{checkpoint.files[0]}.partial"
    stale.write_bytes(b"x" * 1_000_000)
    shards = OutputShards(checkpoint, folders[1], {})
    shards.copy(checkpoint.tensors)
    shards.finish()
    assert (folders[1] / checkpoint.files[0]).stat().st_size < 1_000_000


def test_a_full_disk_shows_before_any_work_and_leaves_nothing(folders, monkeypatch):
    reserve, calls = os.posix_fallocate, []

    def third_fails(file, begin, size):
        calls.append(size)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(file, begin, size)

    monkeypatch.setattr(os, "posix_fallocate", third_fails)
    checkpoint = open_checkpoint(folders[0])
    with pytest.raises(OSError, match=f"No space left.*{checkpoint.files[2]}.partial") as full:
        OutputShards(checkpoint, folders[1], {})
    assert full.value.errno == errno.ENOSPC
    assert names_in(folders[1]) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves no space")
def test_the_space_is_taken_at_the_start(folders):
    checkpoint = open_checkpoint(folders[0])
    OutputShards(checkpoint, folders[1], {}).close()
    for path in folders[1].iterdir():
        assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_a_disk_that_fills_up_later_shows_at_the_write(folders, monkeypatch):
    checkpoint = open_checkpoint(folders[0])
    shards = OutputShards(checkpoint, folders[1], {})

    def full(file, data, at):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left.*.safetensors.partial") as raised:
        shards.copy(checkpoint.tensors)
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        merge([folders[0] / checkpoint.files[0]], folders[1] / "one.safetensors")
    assert names_in(folders[1]) == [f"{file}.partial" for file in checkpoint.files]


def test_the_system_refuses_a_file_before_any_work(tmp_path):
    """A real refusal: files of this process may have 64 KiB, the shard would have more."""
    save_file({"a": torch.zeros(20_000)}, tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    told, tell = os.pipe()
    child = os.fork()  # the limit cannot be taken back
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
            OutputShards(open_checkpoint(tmp_path), tmp_path / "out", {})
        except OSError as error:
            name = os.path.basename(error.filename)
            os.write(tell, f"{errno.errorcode[error.errno]} {name}".encode())
        finally:
            os._exit(0)
    os.close(tell)
    with open(told) as pipe:
        assert pipe.read() == "EFBIG model.safetensors.partial"
    os.waitpid(child, 0)
    assert names_in(tmp_path / "out") == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_file_system_that_reserves_nothing_still_serves(folders, monkeypatch, number):
    def unsupported(file, begin, size):
        raise OSError(number, os.strerror(number))

    if number is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    checkpoint = open_checkpoint(folders[0])
    shards = OutputShards(checkpoint, folders[1], {})
    shards.copy(checkpoint.tensors)
    shards.finish()
    for file in checkpoint.files:
        assert (folders[1] / file).read_bytes() == (folders[0] / file).read_bytes()


@pytest.mark.parametrize("task", ["copy", "convert", "write", "read", "merge", "digest"])
def test_no_task_takes_more_memory_than_a_few_pieces(tmp_path, task):
    """A tensor of 64 MB goes through; a memory map or a copy of it would show as so much."""
    (tmp_path / "out").mkdir()
    weight = torch.ones(4096, 8192, dtype=torch.bfloat16)
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    dtypes = {"a.weight": torch.float32} if task in ("convert", "write") else {}
    shards = OutputShards(checkpoint, tmp_path / "out", dtypes)
    tasks = {
        "copy": lambda: shards.copy(["a.weight"]),
        "convert": lambda: shards.copy(["a.weight"]),
        "write": lambda: shards.write("a.weight", weight.view(8192, 4096).T),
        "read": lambda: read_into(checkpoint, "a.weight", weight),
        "merge": lambda: merge([tmp_path / "model.safetensors"], tmp_path / "one.safetensors"),
        "digest": lambda: content_digest(checkpoint),
    }
    taken, _ = peak(tasks[task], "cpu")
    shards.close()
    if taken is None:
        pytest.skip("the system tells no peak of memory")
    assert taken < 24e6, f"{taken / 1e6:.1f} MB"


def test_everything_but_weights_is_copied(folders):
    model, out = folders
    save_with_tokenizer(make_model(), model)
    for name in ("LICENSE", "README.md", "modeling_own.py", "vocab.txt"):
        (model / name).write_text(f"the content of {name}")
    for name in ("pytorch_model.bin", "a.pth", "b.gguf", "c.onnx", "flax_model.msgpack", ".hidden"):
        (model / name).write_bytes(b"weights")
    (model / "pytorch_model.bin.index.json").write_text("{}")
    (model / "original").mkdir()
    vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    copy_rest(open_checkpoint(model), out, None)
    assert names_in(out) == sorted(
        "LICENSE README.md modeling_own.py vocab.txt config.json generation_config.json "
        "tokenizer.json tokenizer_config.json".split()
    )
    for file in out.iterdir():
        assert file.read_bytes() == (model / file.name).read_bytes()
    assert AutoTokenizer.from_pretrained(out).get_vocab() == vocabulary


@pytest.mark.parametrize("keys", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"], []])
def test_the_configuration_says_the_dtype_of_the_run(folders, keys):
    model, out = folders
    config = json.loads((model / "config.json").read_text())
    config.pop("dtype")
    config |= dict.fromkeys(keys, "bfloat16") | {"text_config": dict.fromkeys(keys, "bfloat16")}
    (model / "config.json").write_text(json.dumps(config))
    copy_rest(open_checkpoint(model), out, torch.float16)
    changed = json.loads((out / "config.json").read_text())
    wanted = dict.fromkeys(keys, "float16")
    assert changed == config | (wanted or {"dtype": "float16"}) | {"text_config": wanted}


def test_a_broken_configuration_is_refused(folders):
    (folders[0] / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        copy_rest(open_checkpoint(folders[0]), folders[1], torch.float16)


def test_parts_are_merged_with_their_metadata(tmp_path, small_pieces):
    first = {"a": torch.arange(200, dtype=torch.uint8), "b": torch.tensor([1.5])}
    second = {"c": torch.arange(33, dtype=torch.uint8), "d": torch.tensor(7)}
    save_file(first, tmp_path / "0.safetensors", metadata={"a": "1600"})
    save_file(second, tmp_path / "1.safetensors", metadata={"c": "264"})
    out = tmp_path / "masks.safetensors"
    merge([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], out, {"round": "2"})
    found = load_file(out)
    assert set(found) == set("abcd")
    for name, tensor in (first | second).items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"a": "1600", "c": "264", "round": "2"}


def test_a_name_in_two_parts_is_refused(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match="0.safetensors and .*0.safetensors both hold a"):
        merge([tmp_path / "0.safetensors"] * 2, tmp_path / "out.safetensors")
    assert names_in(tmp_path) == ["0.safetensors"]
