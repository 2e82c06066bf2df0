"""Hidden states come back the same from every place, and from the files of a killed run."""

import errno
import gc
import json
import time
import weakref

import pytest
import torch
from small_models import make_clients, make_model

from fedspa.model import decoder_blocks
from fedspa.streaming import generations
from fedspa.streaming.activations import Hidden, choose_placement
from fedspa.walk import Stream, embed, run_block

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GB = 10**9


def batches_of(count=3, dtype=torch.float32, seed=0):
    """Batches (2, 5, 8), the last of one window, the second with other strides."""
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, 5, 8, generator=draw).to(dtype) for _ in range(count)]
    made[1] = made[1].transpose(1, 2).contiguous().transpose(1, 2)
    made[-1] = made[-1][:1].clone()
    return made


def places(folder):
    """Every way to keep hidden states on a CPU."""
    return [
        Hidden("cpu"),
        Hidden("cpu", "host"),
        Hidden("cpu", "gpu", folder, "a"),
        Hidden("cpu", "host", folder, "b"),
        Hidden("cpu", "disk", folder, "c"),
    ]


def fill(hidden, batches):
    for batch in batches:
        hidden.append(batch)
    return hidden


def bits(tensor):
    """Of which NaN is equal to itself, and 0 not to -0."""
    return tensor.contiguous().view(torch.uint8)


def assert_same(hidden, batches):
    found = list(hidden)
    assert len(hidden) == len(found) == len(batches)
    for one, other in zip(found, batches, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_place_gives_the_same_bits_and_strides_back(tmp_path, dtype):
    batches = batches_of(dtype=dtype)
    batches[0][0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    for hidden in places(tmp_path):
        fill(hidden, batches)
        for _ in range(2):
            assert len(hidden) == 3 and hidden.shapes == [(2, 5, 8), (2, 5, 8), (1, 5, 8)]
            for one, other in zip(hidden, batches, strict=True):
                assert one.stride() == other.stride() and one.dtype == other.dtype
                assert torch.equal(bits(one), bits(other))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_walk_has_the_bits_of_a_walk_over_a_list(tmp_path, architecture):
    model, tokens = make_model(architecture, layers=3), make_clients(1, samples=5)[0].tokens
    blocks = decoder_blocks(model)
    entered = embed(model, blocks, tokens, 2)
    walks = [Stream(fill(h, list(entered.hidden)), entered.arguments) for h in places(tmp_path)]
    for index, block in enumerate(blocks):
        entered.hidden = [run_block(block, *inputs) for inputs in entered.inputs(index)]
        for walk in walks:
            walk.hidden.replace(run_block(block, *inputs) for inputs in walk.inputs(index))
            assert_same(walk.hidden, entered.hidden)


def test_on_a_cpu_the_tensors_themselves_are_kept(tmp_path):
    batches = batches_of()
    for hidden in places(tmp_path)[:4]:
        assert all(a is b for a, b in zip(fill(hidden, batches), batches, strict=True))


@pytest.mark.parametrize("placement", ["gpu", "host", "disk"])
def test_memory_is_one_set_and_the_batches_in_flight(tmp_path, placement):
    count, seen, most = 12, [], 0
    hidden = Hidden("cpu", placement, tmp_path)

    def noted(batch):
        seen.append(weakref.ref(batch))
        return batch

    def alive():
        return len({id(batch()) for batch in seen if batch() is not None})

    def following():
        nonlocal most
        for batch in hidden:
            noted(batch)
            yield noted(torch.zeros(1, 4, 8))
            most = max(most, alive())
            # What was made is let go as soon as it is written, not when the next is there.
            deadline = time.monotonic() + 5
            while placement == "disk" and alive() > 1:
                assert time.monotonic() < deadline
                time.sleep(0.001)

    for _ in range(count):
        hidden.append(noted(torch.zeros(1, 4, 8)))
    for _ in range(2):
        hidden.replace(following())
    hidden.flush()
    gc.collect()
    # In flight: the one that was read, the one that was made, and before it the one being written.
    assert most <= (3 if placement == "disk" else count + 2)
    assert alive() == (0 if placement == "disk" else count)


def test_the_next_batch_may_be_looked_at_before_its_predecessor_is_replaced(tmp_path):
    batches = batches_of(5)
    for hidden in places(tmp_path):
        fill(hidden, batches)

        def following(old):
            ahead = next(old)
            for batch in old:
                ahead, batch = batch, ahead
                yield batch + 1
            yield ahead + 1

        hidden.replace(following(iter(hidden)))
        assert_same(hidden, [batch + 1 for batch in batches])


@pytest.mark.parametrize("before", ["gpu", "host", "disk"])
@pytest.mark.parametrize("after", ["gpu", "host", "disk"])
def test_a_killed_runs_states_are_restored_in_any_place(tmp_path, before, after):
    killed = fill(Hidden("cpu", before, tmp_path, "alice"), batches_of())
    killed.replace(batch * 2 for batch in killed)
    killed.flush()
    description = json.loads(json.dumps(killed.describe()))
    expected = [batch * 2 for batch in batches_of()]
    killed.replace(batch * 3 for batch in killed)  # the state that names this was not committed

    resumed = Hidden("cpu", after, tmp_path, "alice")
    resumed.restore(description)
    assert_same(resumed, expected)
    assert resumed.describe() == description
    resumed.replace(batch + 1 for batch in resumed)
    assert_same(resumed, [batch + 1 for batch in expected])
    assert resumed.describe()["generation"] == description["generation"] + 1
    resumed.settle()
    assert [path.name for path in tmp_path.iterdir()] == ["alice.2"]


def test_files_hold_the_bytes_in_order_and_stay_until_settled(tmp_path):
    (tmp_path / "alice.10.txt").touch()
    (tmp_path / "bob.0").touch()
    batches = batches_of()
    hidden = fill(Hidden("cpu", "host", tmp_path, "alice"), batches)
    hidden.flush()
    assert (tmp_path / "alice.0").read_bytes() == b"".join(b.numpy().tobytes() for b in batches)
    hidden.replace(batch + 1 for batch in hidden)
    hidden.replace(batch + 1 for batch in hidden)
    hidden.flush()
    names = {"alice.10.txt", "bob.0", "alice.0", "alice.1", "alice.2"}
    assert {path.name for path in tmp_path.iterdir()} == names
    hidden.settle()
    assert {path.name for path in tmp_path.iterdir()} == names - {"alice.0", "alice.1"}
    hidden.clear()
    assert {path.name for path in tmp_path.iterdir()} == {"alice.10.txt", "bob.0"}
    assert len(hidden) == 0 and list(hidden) == []
    assert_same(fill(hidden, batches), batches)


def test_batches_that_share_memory_within_come_back_row_major(tmp_path):
    batch = torch.randn(1, 1, 8).expand(2, 3, 8)
    hidden = fill(Hidden("cpu", "disk", tmp_path), [batch])
    (found,) = hidden
    assert torch.equal(found, batch) and found.is_contiguous()


@pytest.mark.parametrize("placement", ["host", "disk"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "are gone"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "should have 800 bytes.*has 796"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "should have 800 bytes.*has 801"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-512] + bytes(512)),
            "damaged.*CRC-32 [0-9a-f]{8}, [0-9a-f]{8} when",
        ),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, placement, damage, message):
    killed = fill(Hidden("cpu", "gpu", tmp_path, "alice"), batches_of())
    killed.flush()
    damage(tmp_path / "alice.0")
    resumed = Hidden("cpu", placement, tmp_path, "alice")
    with pytest.raises(RuntimeError, match=f"alice.0: .*{message}.*--restart"):
        resumed.restore(killed.describe())
    assert len(resumed) == 0


def test_an_error_while_states_are_replaced_is_not_taken_for_fewer_states(tmp_path):
    def failing(hidden):
        for index, batch in enumerate(hidden):
            if index == 2:
                raise ValueError("out of luck")
            yield batch + 1

    batches = batches_of()
    for hidden in places(tmp_path):
        fill(hidden, batches)
        with pytest.raises(ValueError, match="out of luck"):
            hidden.replace(failing(hidden))
        if hidden._placement == "disk":
            assert_same(hidden, batches)
        else:
            with pytest.raises(RuntimeError, match="batch 0 of 3 was let go"):
                list(hidden)


@pytest.mark.parametrize("placement", ["gpu", "disk"])
def test_a_full_disk_is_never_forgotten(tmp_path, monkeypatch, placement):
    hidden = fill(Hidden("cpu", placement, tmp_path, "alice"), batches_of())
    hidden.flush()

    def full(path, file, buffer, begin):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(generations, "write_range", full)
    with pytest.raises(OSError, match="No space left.*alice.1"):
        hidden.replace([batch + 1 for batch in batches_of()])
    hidden = fill(Hidden("cpu", placement, tmp_path, "bob"), [torch.ones(1)])
    for call in (hidden.flush, hidden.describe, hidden.flush, lambda: hidden.append(torch.ones(1))):
        with pytest.raises(OSError, match="No space left.*bob.0"):
            call()
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space left.*bob.0"):
        hidden.replace([torch.ones(1)])
    hidden.clear()
    assert_same(fill(hidden, batches_of()), batches_of())


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="placement 'ram' is unknown; choose one of"):
        Hidden("cpu", "ram")
    with pytest.raises(ValueError, match="'disk' needs a folder"):
        Hidden("cpu", "disk")
    for name in ("", "a/b", "a/", "/"):
        with pytest.raises(ValueError, match="cannot be the name of a file"):
            Hidden("cpu", "disk", tmp_path, name)
    hidden = fill(Hidden("cpu"), batches_of())
    with pytest.raises(ValueError, match="batch 3 is torch.float16, .* torch.float32"):
        hidden.append(torch.ones(2, 5, 8, dtype=torch.float16))
    with pytest.raises(ValueError, match="in no file; give them a folder"):
        hidden.describe()
    with pytest.raises(ValueError, match="have no folder"):
        hidden.restore({"generation": 0})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fill(Hidden("cpu", "disk", tmp_path / "nowhere"), batches_of()).flush()


@pytest.mark.parametrize(
    ("device", "gpu", "host", "disk", "place"),
    [
        ("cuda", 100, 100, 100, "gpu"),
        ("cuda", 12.4, 100, 100, "host"),
        ("cuda", 12.6, 0, 0, "gpu"),
        ("cuda", 0, 16.6, 100, "disk"),
        ("cuda", 0, 16.7, 0, "host"),
        ("cuda", 0, 0, None, "disk"),
        ("cpu", 100, 100, 100, "host"),
        ("cpu", 100, 0, 20, "disk"),
    ],
)
def test_hidden_states_go_where_they_fit(device, gpu, host, disk, place):
    free = [None if amount is None else int(amount * GB) for amount in (gpu, host, disk)]
    assert choose_placement("auto", 10 * GB, device, *free) == place
    assert choose_placement(place, 10 * GB, device, 10 * GB, 10 * GB, 20 * GB) == place


def test_no_hidden_states_need_no_gpu():
    assert choose_placement("auto", 0, "cpu", 0, 0) == "host"


def test_a_place_where_they_do_not_fit_is_refused_with_the_numbers():
    for wanted in ("gpu", "host"):
        with pytest.raises(RuntimeError, match=r"need 10.00 GB .*9.00 GB are free.*--activations"):
            choose_placement(wanted, 10 * GB, "cuda", 9 * GB, 9 * GB)
    with pytest.raises(RuntimeError, match=r"need 20.00 GB of space .*19.00 GB are free. Cal"):
        choose_placement("disk", 10 * GB, "cpu", 0, 100 * GB, 19 * GB)
    with pytest.raises(RuntimeError, match=r"19.00 GB are free. They .* 5.00 GB are free"):
        choose_placement("auto", 10 * GB, "cuda", 0, 5 * GB, 19 * GB)
    with pytest.raises(ValueError, match="'gpu' was asked for, but .* on the CPU"):
        choose_placement("gpu", 10, "cpu", 0, 100)
    with pytest.raises(ValueError, match="'ram' is unknown"):
        choose_placement("ram", 10, "cpu", 0, 100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("placement", ["gpu", "host", "disk"])
def test_on_a_gpu_every_place_gives_the_same_bits(tmp_path, placement):
    batches = [batch.cuda() for batch in batches_of(9)]
    for folder in (None, tmp_path):
        if placement == "disk" and folder is None:
            continue
        hidden = fill(Hidden("cuda", placement, folder), batches)
        expected = batches
        for _ in range(3):
            assert_same(hidden, expected)
            hidden.replace(batch @ batch.mT @ batch for batch in hidden)
            expected = [batch @ batch.mT @ batch for batch in expected]
        assert_same(hidden, expected)
        if folder is not None:
            hidden.flush()
            resumed = Hidden("cuda", placement, folder)
            resumed.restore(hidden.describe())
            assert_same(resumed, expected)
