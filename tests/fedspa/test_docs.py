"""The README and the docs: every program runs, every command parses, every path exists."""

import json
import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from small_models import make_clients, make_model, save_with_tokenizer
from transformers import AutoModelForCausalLM

from bench.__main__ import main as benches
from fedspa import Settings, federate
from fedspa.cli import main
from fedspa.flower.node_config import FLOWER_KEYS, Node, flower_home, read_node_config
from fedspa.flower.run_config import Network
from fedspa.output import load_masks

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "kernels" / "README.md"])


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    """Every line of the pages that calls make, fedspa or the benches, as words."""
    lines = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shell = "".join(blocks(page, "sh")) + "\n".join(re.findall(r"^ {4}(\S.*)$", text, re.M))
        called = re.compile(r"\s*(make\b|fedspa\b|python -m bench )")
        lines += [line for line in shell.splitlines() if called.match(line)]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_readmes_program_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    (program,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 16
    save_with_tokenizer(make_model(), tmp_path / "path" / "to" / "model")
    words = " ".join(f"word{i % 90}" for i in range(500))
    (tmp_path / "clinic.txt").write_text(words)
    (tmp_path / "bank.jsonl").write_text(f'{{"text": "{words}"}}\n')
    monkeypatch.chdir(tmp_path)
    # The small model has 64 positions; nothing else of the program is changed.
    exec(program.replace("2048", "32"), {})
    assert "60.0" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained("pruned")


def test_the_pruner_of_the_docs_runs():
    (program,) = blocks(ROOT / "docs" / "pruners.md", "python")
    scope = {}
    exec(program, scope)
    start = program.index("class ")
    assert len(program[start : program.index("settings =")].strip().splitlines()) <= 20
    report = federate(make_model(), make_clients(2), scope["settings"])
    assert 0.5 <= report.sparsity < 0.501
    rounds = Settings(pruner=scope["VariancePruner"](), sparsity=0.5, rounds=2, ramp="linear")
    federate(make_model(), make_clients(2), rounds)


def test_the_readmes_config_file_is_understood(tmp_path, monkeypatch):
    from click.testing import CliRunner

    (table,) = blocks(ROOT / "README.md", "toml")
    save_with_tokenizer(make_model(), tmp_path / "path" / "to" / "model")
    words = " ".join(f"word{i % 90}" for i in range(2000))
    (tmp_path / "clinic.txt").write_text(words)
    (tmp_path / "bank.jsonl").write_text(f'{{"text": "{words}"}}\n')
    (tmp_path / "run.toml").write_text(table.replace("512", "32"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["prune", "--config", "run.toml", "--quiet"])
    assert result.exit_code == 0, result.output
    assert all(int(mask.sum()) * 2 == mask.numel() for mask in load_masks("pruned").values())


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_docs_exists(words):
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(word in targets for word in words[1:] if "=" not in word)
        return
    if words[0] == "python":
        name, *rest = words[3:]
        command = benches.get_command(None, name)
    else:
        name, *rest = words[1:]
        command = main.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= known


def test_there_are_commands_to_check():
    assert len(commands()) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_path_of_a_page_exists(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    for link in links:
        assert (page.parent / link).exists(), link
    named = re.findall(r"`((?:fedspa|kernels|tests|docs|bench)/[\w./-]*)`", text)
    for path in named:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_heading_finds_one(page):
    text = page.read_text(encoding="utf-8")
    for name, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
        there = (page.parent / name if name else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", there, re.M)
        known = [re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings]
        assert anchor in [heading.replace(" ", "-") for heading in known], (name, anchor)


def table(heading: str) -> dict[str, str]:
    """The first two columns of a table of docs/deployment.md, without backticks."""
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^|]*)` \| ([^|]*?) ?\|", section, re.M)
    return {key: default.replace("`", "") for key, default in rows}


def test_the_networks_keys_are_in_the_docs_with_their_defaults():
    app = ROOT / "fedspa" / "flower" / "app" / "pyproject.toml"
    defaults = tomllib.loads(app.read_text())["tool"]["flwr"]["app"]["config"]
    keys = [field.name.replace("_", "-") for field in fields(Network)]
    # What must be given has no default, though Flower wants a value for every key.
    must = ("model", "out", "clients")
    shown = {key: "" if key in must else json.dumps(defaults[key]) for key in keys}
    assert table("Keys of run.toml") == shown
    own = {
        field.name: defaults[field.name.replace("_", "-")]
        for field in fields(Settings)
        if defaults[field.name.replace("_", "-")]
        != ("" if field.default is None else field.default)
    }
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    assert own == {"message_dtype": "bfloat16"} and 'but for `message-dtype = "bfloat16"`' in page


def test_a_nodes_keys_are_in_the_docs_with_their_defaults():
    of_run = {"model": "m", "device": "cuda", "samples": 5, "seqlen": 6}
    network = Network(out=Path("out"), clients=1, min_clients=1, **of_run)
    node = read_node_config({"partition-id": 3, "text": "a.txt"}, network)
    flower = {ours: key for key, ours in FLOWER_KEYS.items()}
    found = table("Keys of client.toml")
    keys = [flower.get(field.name, field.name).replace("_", "-") for field in fields(Node)]
    assert sorted(found) == sorted(keys)
    for field in fields(Node):
        value = getattr(node, field.name)
        default = found[flower.get(field.name, field.name).replace("_", "-")]
        if default == "the run's":
            # A sparsity of None is the settings' own.
            assert value == of_run.get(field.name)
        elif field.name == "name":
            assert default == '"client N"' and value == "client 4"
        elif field.name == "work":
            assert default == "$FLWR_HOME/fedspa/NAME" and value.name == "client 4"
            assert value.parent == flower_home() / "fedspa"
        elif default:
            assert json.loads(default) == value
        else:
            assert field.name in ("partition", "text") or value is None


def test_the_readmes_network_commands_are_those_that_a_test_runs():
    guide = "".join(blocks(ROOT / "docs" / "deployment.md", "bash")).replace("\\\n ", "")
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Over a network")[1]
    (shown,) = re.findall(r"```bash\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    for line in shown.replace("\\\n ", "").splitlines():
        assert line in guide.splitlines(), line
