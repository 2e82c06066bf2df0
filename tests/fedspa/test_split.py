"""Runs that several processes divide: one output, the same result, and none left behind.

The processes themselves are in `split_jobs.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import make_model, save_with_tokenizer
from split_jobs import EXACT, FEW, RUNS, free_port

from fedspa.output import load_masks

JOBS = Path(__file__).parent / "split_jobs.py"
SPLITS = ("samples", "clients")
NAMES = ("a", "b", "c", "d")
# Divided runs by name: what is divided, and by how many ranks.
DIVIDED = {f"{split}-{size}": (split, size) for size in (2, 4) for split in SPLITS}
# Float32 sums over windows and clients are added up in another order; SparseGPT multiplies what
# that rounds by the inverse of a hessian of few tokens. In bfloat16 it also turns a client's vote
# here and there, so that a weight is the average of other clients' values. Relative to the largest
# weight of a matrix, where the masks agree; measured were 1.2e-5 and 0.027.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.06}
# What a report says of time and memory, which no two runs share.
OF_THE_MACHINE = ("seconds", "peak_memory", "peak_gpu_memory")
GONE = "rank 1 of 2 ended: the process is gone without a word (killed, or out of memory?)"


def arguments(folder, out, *more):
    """Of `fedspa prune` with four clients, in two rounds."""
    texts = [f"--client={name}={folder / name}.txt" for name in NAMES]
    short = ["--samples", "8", "--seqlen", "16", "--rounds", "2", "--json"]
    return ["prune", str(folder / "float32"), *texts, *short, "--out", str(folder / out), *more]


def plan(folder):
    """Stages of jobs: a run that is killed goes before the one that resumes it."""

    def command(name, out, *more, **job):
        told = {"name": name, "size": 2, "do": "command", **job}
        return {**told, "arguments": arguments(folder, out, *more)}

    divided = [
        {"name": name, "do": "all_runs", "split": split, "size": size}
        for name, (split, size) in DIVIDED.items()
    ]
    alike = [
        {"name": f"disagree-{split}", "do": "disagreements", "split": split, "size": 2}
        for split in SPLITS
    ]
    other = {"1": ["--sparsity", "0.6"]}
    first = [
        {"name": "single", "do": "all_runs", "size": 1},
        *(command(f"killed-{s}", f"resumed-{s}", "--split", s, killed=1) for s in SPLITS),
        *(command(f"whole-{s}", f"whole-{s}", "--split", s) for s in SPLITS),
        command("unlike", "unlike", "--split", "samples", rank_arguments=other),
        command("undivided", "undivided"),
        command("few", "few", "--split", "samples", "--samples", "1"),
    ]
    second = [command(f"resumed-{s}", f"resumed-{s}", "--split", s) for s in SPLITS]
    return [[*first, *alike], [*second, *divided]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that all jobs wrote, what their ranks said, and how they ended."""
    folder = tmp_path_factory.mktemp("split")
    for dtype in ("float32", "bfloat16"):
        save_with_tokenizer(make_model(dtype=getattr(torch, dtype)), folder / dtype)
    changed = make_model()
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    save_with_tokenizer(changed, folder / "changed")
    for index, name in enumerate(NAMES):
        draw = torch.Generator().manual_seed(index)
        words = torch.randint(20 * index, 20 * index + 30, (400,), generator=draw).tolist()
        (folder / f"{name}.txt").write_text(" ".join(f"word{word}" for word in words))
    command = [sys.executable, JOBS, folder, json.dumps(plan(folder))]
    subprocess.run(command, env=environment(), check=True, timeout=240)
    return folder


def environment():
    """Ours without what a torchrun would have set, with one thread."""
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    paths = [str(JOBS.parents[2]), str(JOBS.parents[2] / "kernels"), ours.get("PYTHONPATH", "")]
    ours |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return ours


def codes(folder, job):
    """The exit code of every rank."""
    ended = json.loads((folder / "ended.json").read_text())[job]
    return [ended[str(rank)][0] for rank in range(len(ended))]


def seconds(folder, job):
    """How long after the first rank of a job the last one ended."""
    return max(after for _, after in json.loads((folder / "ended.json").read_text())[job].values())


def said(folder, job, rank):
    """What a rank wrote to stdout and stderr."""
    return (folder / "said" / f"{job}.{rank}").read_text()


def sentences(folder, job, rank):
    """The errors that a rank told its user."""
    lines = said(folder, job, rank).splitlines()
    return [line for line in lines if line.startswith("Error: ")]


def report(out):
    """The report of an output folder without what differs between any two runs."""
    found = json.loads((out / "report.json").read_text())
    return {key: value for key, value in found.items() if key not in OF_THE_MACHINE}


def differing(one, other):
    """In how many positions the masks differ, and of how many."""
    masks, others = load_masks(one), load_masks(other)
    assert masks.keys() == others.keys()
    differ = sum(int((masks[name] != others[name]).sum()) for name in masks)
    return differ, sum(mask.numel() for mask in masks.values())


def without(entries, *keys):
    """Entries of a report but for what rounding moves."""
    return [{k: v for k, v in entry.items() if k not in keys} for entry in entries]


def bytes_of(out):
    """The weights and the masks as they are on the disk."""
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert {"masks.safetensors", "model.safetensors"} <= set(names)
    return {name: (out / name).read_bytes() for name in names}


def pairs(sizes=(2, 4)):
    """Each divided run with its name."""
    return [
        (name, run)
        for name, (_, size) in DIVIDED.items()
        if size in sizes
        for run in RUNS
        if size == 2 or run in FEW
    ]


@pytest.mark.parametrize(("divided", "run"), pairs())
def test_divided_run_is_the_run_of_one_process(folder, divided, run):
    assert set(codes(folder, divided)) == {0}, said(folder, divided, 0)
    one, other = folder / "single" / run, folder / divided / run
    differ, positions = differing(one, other)
    # Of 18432 positions none differs where this was written; one is more than 0.005 %.
    assert differ <= positions * 1e-4
    masks, other_masks = load_masks(one), load_masks(other)
    weights, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    tolerance = TOLERANCE["bfloat16" if run == "bfloat16" else "float32"]
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        pruned = layer in masks
        agreed = masks[layer] == other_masks[layer] if pruned else torch.ones_like(weight) == 1
        error = (weight - others[name]).float().abs()[agreed].amax()
        assert error <= tolerance * weight.float().abs().amax(), name


@pytest.mark.parametrize(("divided", "run"), pairs())
def test_output_is_written_once_and_says_the_same(folder, divided, run):
    one, other = folder / "single" / run, folder / divided / run
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    wanted, found = report(one), report(other)
    # Rounding moves a loss, and in bfloat16 a vote.
    losses = [[client["loss"] for client in each["clients"]] for each in (wanted, found)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05 if run == "bfloat16" else 1e-3)
    for each in (wanted, found):
        each["clients"] = without(each["clients"], "loss")
        each["layers"] = without(each["layers"], "votes")
    assert wanted == found
    assert sum(client["bytes_up"] for client in found["clients"]) > 0


@pytest.mark.parametrize("divided", DIVIDED)
def test_nothing_hidden_is_left(folder, divided):
    size = DIVIDED[divided][1]
    runs = {run for run in RUNS if size == 2 or run in FEW}
    assert {path.name for path in (folder / divided).iterdir()} == runs


@pytest.mark.parametrize(
    ("divided", "run"), [(d, EXACT[split]) for d, (split, _) in DIVIDED.items()]
)
def test_where_only_work_is_divided_the_bits_are_the_same(folder, divided, run):
    """Magnitudes need no sum over samples; of masks the votes are summed, which are integers."""
    one, other = folder / "single" / run, folder / divided / run
    assert bytes_of(one) == bytes_of(other)
    assert report(one) == report(other)


@pytest.mark.parametrize("split", SPLITS)
def test_ranks_that_disagree_are_refused_alike(folder, split):
    job = f"disagree-{split}"
    assert codes(folder, job) == [0, 0], said(folder, job, 0)
    lines = [said(folder, job, rank).splitlines() for rank in range(2)]
    told, other = [
        {
            key: text
            for line in each
            if line.startswith("{")
            for key, text in json.loads(line).items()
        }
        for each in lines
    ]
    assert told == other
    assert '"sparsity" is 0.5 on rank 0, 0.6 on rank 1' in told.pop("settings")
    assert 'disagree on model: "content" is ' in told.pop("model")
    for what, client in (("text", "c2"), ("held text", "c2"), ("capacity", "c0")):
        assert f'disagree on clients: "{client}" is ' in told.pop(what)
    few = {"samples": ("few samples", "1 samples of client 'c3'"), "clients": ("few clients", "1")}
    what, parts = few[split]
    assert f"2 ranks cannot divide {parts}" in told.pop(what)
    assert not told
    # What the ranks could divide was pruned; nothing else was written.
    (left,) = {"few samples", "few clients"} - {what}
    assert {path.name for path in (folder / job).iterdir()} == {left}


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        ("unlike", 'ranks disagree on settings: "sparsity" is 0.5 on rank 0, 0.6 on rank 1'),
        ("undivided", "2 ranks would all do the same work: say what they divide (--split samples"),
        ("few", "2 ranks cannot divide 1 samples of client"),
    ],
)
def test_command_that_ranks_cannot_divide_is_code_2_and_writes_nothing(folder, job, sentence):
    assert codes(folder, job) == [2, 2], said(folder, job, 0)
    for rank in range(2):
        (told,) = sentences(folder, job, rank)
        assert told.startswith(f"Error: {sentence}")
    assert not list(folder.glob(f"*{job}*"))


@pytest.mark.parametrize("split", SPLITS)
def test_killed_rank_ends_all_and_the_same_command_goes_on(folder, split):
    killed, resumed, whole = (f"{what}-{split}" for what in ("killed", "resumed", "whole"))
    assert codes(folder, killed) == [1, -9]
    assert sentences(folder, killed, 0) == [f"Error: {GONE}"]
    assert seconds(folder, killed) < 60
    assert codes(folder, whole) == codes(folder, resumed) == [0, 0], said(folder, resumed, 0)
    # It was killed in the second block of the second round, of two each.
    events = said(folder, resumed, 0)
    assert '"event": "resumed", "round": 1, "block": 1' in events
    assert bytes_of(folder / resumed) == bytes_of(folder / whole)
    assert report(folder / resumed) == report(folder / whole)
    assert not list(folder.glob(".*"))
    # Only the first rank prints the result.
    assert '"bytes_up"' in said(folder, whole, 0) and '"bytes_up"' not in said(folder, whole, 1)


def test_torchrun_divides_a_command(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}", "-m", "fedspa"]
    command += arguments(folder, "torchrun", "--split", "clients")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["clients"] == report(folder / "whole-clients")["clients"]
    assert bytes_of(folder / "torchrun") == bytes_of(folder / "whole-clients")
