"""Whole models: blocks come one at a time, both pipelines prune the same, and times add up."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from bench import results, shapes
from bench.__main__ import main
from bench.model import cli, measure, pipelines
from bench.model.drawn import draw_model, draw_tokens
from bench.model.pipelines import Job
from fedspa.model import linear_layers
from fedspa.settings import Settings

CPU = torch.device("cpu")
LLAMA = shapes.Model("tiny-llama", "llama", 64, 160, 4, 2, 3, 200)
OPT = shapes.Model("tiny-opt", "opt", 64, 128, 4, 4, 3, 200)
FAMILIES = pytest.mark.parametrize("shape", [LLAMA, OPT], ids=["llama", "opt"])


def job(shape, blocks=2, **settings):
    settings = Settings(**({"sparsity": 0.5} | settings))
    return Job(shape, blocks, settings, torch.float32, CPU, seqlen=24)


def run(pipeline, job, samples=6, clients=2):
    return measure.measure(pipeline, job, samples, clients, lambda text: None)


@FAMILIES
def test_blocks_are_drawn_one_at_a_time_and_the_same_again(shape):
    _, blocks = draw_model(shape, 3, 24, torch.float32, CPU, seed=1)
    assert len(blocks) == 3 and all(
        p.is_meta for block in blocks.modules for p in block.parameters()
    )
    first = {name: p.detach().clone() for name, p in blocks[0].named_parameters()}
    second = dict(blocks[1].named_parameters())
    drawn = [not next(block.parameters()).is_meta for block in blocks.modules]
    assert drawn == [False, True, False]
    assert not torch.equal(second["self_attn.q_proj.weight"], first["self_attn.q_proj.weight"])
    again = dict(blocks[0].named_parameters())
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert blocks[0] is blocks[0] and blocks.seconds > 0


@FAMILIES
def test_layers_have_the_named_shapes(shape):
    _, blocks = draw_model(shape, 1, 24, torch.bfloat16, CPU, seed=1)
    sizes = sorted(tuple(layer.weight.shape) for layer in linear_layers(blocks[0]).values())
    assert sizes == sorted((matrix.rows, matrix.cols) for matrix in shapes.layers(shape).values())
    assert {p.dtype for p in blocks[0].parameters()} == {torch.bfloat16}


def test_activations_keep_their_size(shape=LLAMA):
    work = job(shape, blocks=3)
    tokens = draw_tokens(shape, 4, 24, 1, seed=0)
    output = pipelines.fedspa(work, tokens, lambda text: None).output
    assert 0.1 < output.std() < 10


def test_tokens_are_dealt_to_the_clients():
    dealt = draw_tokens(LLAMA, 7, 24, 3, seed=0)
    assert [len(windows) for windows in dealt] == [3, 2, 2]
    assert torch.equal(torch.cat(dealt), draw_tokens(LLAMA, 7, 24, 1, seed=0)[0])


WANDA, PATTERN = {"pruner": "wanda"}, {"sparsity": None, "pattern": "2:4"}


@pytest.mark.parametrize(
    ("shape", "clients", "settings"),
    [(LLAMA, 1, {}), (LLAMA, 2, PATTERN), (LLAMA, 2, WANDA), (OPT, 2, {}), (OPT, 1, WANDA)],
    ids=["llama-1", "llama-2-pattern", "llama-2-wanda", "opt-2", "opt-1-wanda"],
)
def test_fedspa_and_the_peers_prune_the_same_weights(shape, clients, settings):
    ours, our_outcome = run("fedspa", job(shape, **settings), clients=clients)
    theirs, their_outcome = run("peers", job(shape, **settings), clients=clients)
    first, whole = measure.agreement(our_outcome, their_outcome)
    assert first > 0.97 and whole > 0.9
    assert len(our_outcome.bits) == 2 * len(shapes.layers(shape))
    for result in (ours, theirs):
        stages = {"embed", "calibrate", "prune", "aggregate", "propagate", "other", "build"}
        assert result["stages"].keys() == stages
        assert all(seconds >= 0 for seconds in result["stages"].values())
        assert (result["clients"], result["samples"], result["of_blocks"]) == (clients, 6, 3)
        json.dumps(result, allow_nan=False)


def test_a_mask_beside_its_target_gives_no_time(monkeypatch):
    for name, pipeline in list(pipelines.PIPELINES.items()):

        def prunes_more(job, *rest, pipeline=pipeline):
            return pipeline(replace(job, settings=replace(job.settings, sparsity=0.6)), *rest)

        monkeypatch.setitem(pipelines.PIPELINES, name, prunes_more)
        said = r"block 1, self_attn.q_proj: 24\d\d weights are pruned, not 2048; no time is stored"
        with pytest.raises(RuntimeError, match=f"{name}, {said}"):
            run(name, job(LLAMA))


def test_an_output_that_is_not_finite_gives_no_time(monkeypatch):
    def broken(job, tokens, advance):
        outcome = pipelines.fedspa(job, tokens, advance)
        return replace(outcome, output=outcome.output / 0)

    monkeypatch.setitem(pipelines.PIPELINES, "fedspa", broken)
    with pytest.raises(RuntimeError, match="output is not finite"):
        run("fedspa", job(LLAMA))


def test_extrapolation_counts_what_every_block_costs():
    stages = {"embed": 1.0, "calibrate": 2.0, "prune": 4.0, "propagate": 3.0, "build": 50.0}
    found = measure.extrapolate(stages, 2, 32)
    assert found["seconds"] == 1 + (2 + 4) * 16 + 3 * 31
    assert found["how"].startswith("from 2 of 32 blocks, as if every block took as long")
    assert measure.extrapolate(stages, 2, 2) == {"seconds": 10.0, "how": "measured: all 2 blocks"}
    assert measure.extrapolate(stages, 1, 32) is None


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.MODELS, "tiny-llama", LLAMA)
    monkeypatch.setattr(cli.ceilings, "measure", lambda device: {"copy": 1.0, "matmul": {}})
    return ["--shape=tiny-llama", "--samples=4", "--seqlen=24", "--dtype=float32", "--device=cpu"]


def invoke(*arguments):
    return CliRunner().invoke(main, ["model", *arguments])


def test_the_command_writes_what_it_measured(tiny, tmp_path):
    out = tmp_path / "model.json"
    said = invoke(*tiny, "--blocks=2", "--clients=1,2", f"--out={out}")
    assert said.exit_code == 0, said.output
    assert "tiny-llama, 2 of 3 blocks, 2 clients, 4 windows of 24 tokens: about" in said.output
    assert "3 blocks, extrapolated" in said.output and "masks agree in" in said.output
    content = results.read(out)
    found = [(r["clients"], r["pipeline"]) for r in content["results"]]
    assert found == [(1, "fedspa"), (1, "peers"), (2, "fedspa"), (2, "peers")]
    assert (content["kind"], content["device"]) == ("model", "cpu")
    assert all("masks agree in" in r["check"] and r["batch_size"] for r in content["results"])
    assert all(r["peak_bytes"]["device"] is None for r in content["results"])


def test_what_is_complete_is_written_before_the_next(tiny, tmp_path, monkeypatch):
    def fails(job, tokens, advance):
        raise RuntimeError("out of memory")

    out = tmp_path / "model.json"
    monkeypatch.setitem(pipelines.PIPELINES, "peers", fails)
    said = invoke(*tiny, "--blocks=1", "--clients=1", f"--out={out}")
    assert said.exit_code == 1 and "Error: out of memory\n" in said.output
    assert [r["pipeline"] for r in results.read(out)["results"]] == ["fedspa"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape=llama-9"], "model 'llama-9' is not known; choose from opt-125m"),
        (["--blocks=4"], "--blocks is 4, and tiny-llama has 3; ask for 1 to 3"),
        (["--clients=5"], "5 clients cannot share --samples 4"),
        (["--clients=one"], "--clients is 'one'; write numbers of at least 1, such as 1,8"),
        (["--clients=0,1"], "--clients is '0,1'"),
        (["--sparsity=1.5"], "sparsity 1.5 is outside"),
        (["--sparsity=0.5", "--pattern=2:4"], "give exactly one of sparsity and pattern"),
        (["--pattern=2:64"], "does not divide"),
        (["--batch-size=half"], "--batch-size is 'half'; give a number of windows, or auto"),
        (["--dtype=int8"], "'int8' is not one of"),
    ],
)
def test_bad_input_is_a_sentence(tiny, tmp_path, arguments, sentence):
    out = tmp_path / "model.json"
    said = invoke(*tiny, "--blocks=1", "--clients=1", f"--out={out}", *arguments)
    assert said.exit_code == 2 and sentence in said.output, said.output
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_a_sentence(tiny):
    said = invoke(*tiny, "--blocks=1", "--clients=1", "--device=cuda")
    assert said.exit_code == 2 and "PyTorch finds no GPU here; use --device cpu" in said.output


def test_a_size_that_cannot_fit_is_refused(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(cli.memory, "available", lambda device: 1000)
    out = tmp_path / "model.json"
    said = invoke(*tiny, "--blocks=1", "--clients=1", f"--out={out}")
    assert said.exit_code == 1 and "GiB are free on cpu; take fewer --samples" in said.output
    assert not out.exists()
