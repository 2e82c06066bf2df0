"""The README and the docs: every program runs, every command parses, every path exists."""

import re
import shlex
from pathlib import Path

import pytest
from small_models import make_clients, make_model, save_with_tokenizer
from transformers import AutoModelForCausalLM

from bench.__main__ import main as benches
from fedspa import Settings, federate
from fedspa.cli import main
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
