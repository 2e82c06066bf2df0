"""What a killed run leaves is whole, exact, and refused by any other run."""

import json
import math
import os
import random
import signal
import time

import pytest
import torch
from small_models import make_clients

from fedspa import Client, Settings
from fedspa.report import BlockResult, LayerResult
from fedspa.streaming.fingerprint import compare, fingerprint, tokens_digest
from fedspa.streaming.state import STATE_FILE, Account, State, commit, load


def make_state(step=0, layers=2):
    """A state with a number in every field that follows from `step`."""
    account = Account(
        ((0, 2), (1,)), 7 * step, 3, 11, 13, 5, 9, 0.1 * step + 1e-17, {0: 0, 2: step}
    )
    return State(
        run={"model": {"digest": "ab" * 32}, "ranks": {}},
        round=step // 4,
        block=step % 4,
        accounts={"alice": account, "ünï/b": Account()},
        hidden={"alice": {"generation": step, "batches": [[2, [1, 4, 8], [32, 8, 1]]]}},
        layers=tuple(LayerResult(0, i, "q", (2, 3), 1, 1 / 3, (2, 4)) for i in range(layers)),
        results=(BlockResult(0, 0, ("alice",), {"ünï/b": "late"}), BlockResult(1, 0, ())),
        agreed={0: 0, 11: step},
        sent={0: 123, 11: 2**53 + 1},
        seconds={"prune": 0.1 + 0.2},
    )


def now(settings=None, clients=None, model="ab" * 32, batches=(2, 2), device="cpu", ranks=None):
    settings = Settings(sparsity=0.5) if settings is None else settings
    clients = make_clients(2) if clients is None else clients
    return fingerprint({"digest": model}, settings, clients, batches, device, ranks)


def through_json(values):
    return json.loads(json.dumps(values))


def test_a_state_comes_back_exactly(tmp_path):
    assert load(tmp_path) is None
    for step in (0, 5):
        commit(tmp_path, make_state(step))
        assert load(tmp_path) == make_state(step)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    loss = load(tmp_path).accounts["alice"].loss
    assert math.copysign(1, loss) == 1 and loss.hex() == (0.1 * 5 + 1e-17).hex()


def test_a_loss_that_is_not_finite_comes_back(tmp_path):
    commit(tmp_path, State({}, 0, 0, accounts={"a": Account(loss=math.inf)}))
    assert load(tmp_path).accounts["a"].loss == math.inf


def test_a_state_is_whole_and_never_older_after_any_kill(tmp_path):
    commit(tmp_path, make_state(0))
    draw, last, moved = random.Random(3), 0, 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                step = last
                while True:
                    step += 1
                    # Long enough that a write takes a while, of a length that changes.
                    commit(tmp_path, make_state(step, layers=400 * (1 + step % 3)))
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = load(tmp_path)
        step = 4 * found.round + found.block
        assert step >= last
        assert step == 0 or found == make_state(step, layers=400 * (1 + step % 3))
        moved, last = moved + (step > last), step
    assert moved >= 5


def test_a_full_disk_leaves_the_former_state(tmp_path):
    commit(tmp_path, make_state(1))
    (tmp_path / (STATE_FILE + ".partial")).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        commit(tmp_path, make_state(2))
    assert load(tmp_path) == make_state(1)


def test_damage_is_said_in_a_sentence(tmp_path):
    commit(tmp_path, make_state())
    whole = (tmp_path / STATE_FILE).read_text()
    record = json.loads(whole)
    cases = {
        whole[: len(whole) // 2]: "damaged, it is not JSON",
        "[]": "format_version is None",
        "{}": "format_version is None",
        json.dumps(record | {"format_version": 99}): "format_version is 99, .* goes on with 2",
        json.dumps(record | {"block": "three"}): "damaged, a field is missing, unknown or wrong",
        json.dumps(record | {"more": 1}): "damaged, a field .* 'more'",
        json.dumps({k: v for k, v in record.items() if k != "sent"}): "damaged, a field .* 'sent'",
        json.dumps(record | {"accounts": {"a": {}}}): "damaged, a field .* 'drawn'",
        "\udc00".encode("utf-8", "surrogatepass"): "damaged, it is not JSON",
    }
    for content, message in cases.items():
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / STATE_FILE).write_bytes(data)
        with pytest.raises(ValueError, match=f"state.json: .*{message}.*--restart"):
            load(tmp_path)


def test_the_same_run_goes_on():
    compare(through_json(now()), now())
    compare(
        through_json(now(ranks={"split": None, "size": 2})), now(ranks={"size": 2, "split": None})
    )
    # By repr every nan is the same, by == none is.
    compare(through_json({"a": {"b": math.nan}}), {"a": {"b": math.nan}})


def changed_tokens():
    clients = make_clients(2)
    clients[1].tokens[3, 15] += 1
    return clients


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "cd" * 32}, "model digest was abababababab… and is cdcdcdcdcdcd…"),
        ({"settings": Settings(sparsity=0.6)}, "settings sparsity was 0.5 and is 0.6"),
        ({"settings": Settings(pattern="2:4")}, "pattern was None and is '2:4'"),
        (
            {"clients": changed_tokens()},
            "client 'c1' tokens was [0-9a-f]{12}… and is [0-9a-f]{12}…",
        ),
        ({"clients": make_clients(1), "batches": (2,)}, "client 'c1' was there and is not"),
        ({"clients": make_clients(3), "batches": (2,) * 3}, "client 'c2' is there and was not"),
        ({"batches": (2, 4)}, "client 'c1' batch was 2 and is 4"),
        ({"ranks": {"size": 2}}, "ranks size is there and was not"),
    ],
)
def test_another_run_is_refused_with_what_changed(change, message):
    with pytest.raises(ValueError, match=f"{message}.*--restart.*another output folder"):
        compare(through_json(now()), now(**change))


def test_a_machine_that_rounds_otherwise_is_refused(monkeypatch):
    stored = through_json(now())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "VSX")
    monkeypatch.setenv("FEDSPA_BACKEND", "reference")
    with pytest.raises(ValueError) as error:
        compare(stored, now())
    assert "machine threads was 1 and is 7" in str(error.value)
    assert "machine instructions was " in str(error.value) and "is 'VSX'" in str(error.value)


def test_only_the_first_of_many_changes_are_spelled_out():
    stored = {"clients": {str(i): {"samples": 1} for i in range(9)}}
    other = {"clients": {str(i): {"samples": "x" * 500} for i in range(9)}}
    with pytest.raises(ValueError, match="client '3' samples.*; and 5 more") as error:
        compare(stored, other)
    assert "client '4'" not in str(error.value) and len(str(error.value)) < 1000


def test_a_pruner_object_is_known_again_by_what_it_says_of_itself():
    class Mine:
        needs_inputs = False

        def prune(self):
            pass

    class Said(Mine):
        def __init__(self, strength):
            self.strength = strength

        def __repr__(self):
            return f"Said({self.strength})"

    def of(pruner):
        return now(settings=Settings(pruner=pruner, sparsity=0.5))

    first, second = Mine(), Mine()
    assert repr(first) != repr(second)
    compare(of(first), of(second))
    compare(of(Said(1)), of(Said(1)))
    with pytest.raises(ValueError, match=r"pruner was 'Said\(1\)' and is 'Said\(2\)'"):
        compare(of(Said(1)), of(Said(2)))


def test_the_digest_of_tokens_is_of_their_shape_and_values():
    tokens = torch.arange(12).view(3, 4)
    assert tokens_digest(tokens) == tokens_digest(tokens.t().contiguous().t())
    others = [tokens.view(4, 3), tokens.flip(0), tokens + 1]
    assert len({tokens_digest(t) for t in [tokens, *others]}) == 4
    assert now(clients=[Client(tokens), Client(tokens + 1)])["clients"].keys() == {
        "client 1",
        "client 2",
    }
