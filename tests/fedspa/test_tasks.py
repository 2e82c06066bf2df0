"""Zero-shot accuracy through lm-evaluation-harness, on a task that lies in two small files."""

import json
import math
import random
import sys

import pytest
import torch
from click.testing import CliRunner
from small_models import make_model, save_with_tokenizer

import fedspa
from fedspa.cli import main
from fedspa.tasks import find_tasks, task_lines, zero_shot

pytest.importorskip("lm_eval")

QUESTIONS = 24
# The same sums in float32, in batches of other sizes.
NEAR = 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random model with a tokenizer of 97 whole words."""
    folder = tmp_path_factory.mktemp("model")
    save_with_tokenizer(make_model(), folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return fedspa.load(checkpoint)


def write_task(folder, name="colours", **other):
    """A task file, and beside it questions of five words with three answers of unequal length."""
    draw = random.Random(3)
    records = [
        {
            "question": " ".join(f"word{draw.randrange(90)}" for _ in range(5)),
            "answers": [
                " ".join(f"word{draw.randrange(90)}" for _ in range(words)) for words in (1, 2, 4)
            ],
            "right": draw.randrange(3),
        }
        for _ in range(QUESTIONS)
    ]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = {
        "task": name,
        "dataset_path": "json",
        # datasets keeps a copy of what it reads, for a test not in the user's own cache.
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **other,
    }
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(task))
    return records


def log_likelihood(loaded, question, answer):
    """The sum of the log-probabilities of an answer's tokens after a question, by hand."""
    ids = loaded.tokenizer(f"{question} {answer}", return_tensors="pt").input_ids
    start = len(question.split())
    with torch.no_grad():
        shares = loaded.model(ids).logits[0].float().log_softmax(-1)
    return sum(float(shares[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))


def accuracy_by_hand(loaded, records):
    """(acc, acc_norm): the answer of the highest sum, and of the highest sum a character."""
    plain = by_length = 0
    for record in records:
        sums = [log_likelihood(loaded, record["question"], a) for a in record["answers"]]
        per_character = [s / len(a) for s, a in zip(sums, record["answers"], strict=True)]
        plain += sums.index(max(sums)) == record["right"]
        by_length += per_character.index(max(per_character)) == record["right"]
    return plain / len(records), by_length / len(records)


def run(*arguments, code=0):
    """Invoke the command line and check its exit code."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def test_accuracy_is_that_of_the_log_likelihoods(loaded, tmp_path):
    records = write_task(tmp_path)
    found = zero_shot(loaded, find_tasks(["colours"], tmp_path))
    plain, by_length = accuracy_by_hand(loaded, records)
    assert list(found) == ["colours"]
    assert found["colours"]["acc"] == pytest.approx(plain, abs=NEAR)
    assert found["colours"]["acc_norm"] == pytest.approx(by_length, abs=NEAR)
    # Random models guess: a test in which both were 0 or 1 would compare nothing.
    assert 0 < plain < 1 and 0 < by_length < 1 and plain != by_length
    deviation = math.sqrt(plain * (1 - plain) / (QUESTIONS - 1))
    assert found["colours"]["acc_stderr"] == pytest.approx(deviation, abs=NEAR)


def test_the_batch_changes_nothing(loaded, tmp_path):
    write_task(tmp_path)
    tasks = find_tasks(["colours"], tmp_path)
    assert zero_shot(loaded, tasks, batch_size=1) == zero_shot(loaded, tasks, batch_size=7)


def test_a_limit_takes_the_first_questions(loaded, tmp_path):
    records = write_task(tmp_path)
    tasks = find_tasks(["colours"], tmp_path)
    found = zero_shot(loaded, tasks, limit=5)
    assert found["colours"]["acc"] == accuracy_by_hand(loaded, records[:5])[0]
    assert zero_shot(loaded, tasks, limit=1)["colours"]["acc_stderr"] is None


def test_the_command_prints_a_line_for_each_task_and_json(checkpoint, loaded, tmp_path):
    first = write_task(tmp_path)
    write_task(tmp_path, "shapes", doc_to_target=0)
    flags = ["--tasks", "colours, shapes", "--tasks-path", tmp_path, "--quiet"]
    result = run("eval", checkpoint, *flags)
    plain, _ = accuracy_by_hand(loaded, first)
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"colours: acc {plain:.4f} ± ") and "acc_norm" in lines[0]
    assert lines[1].startswith("shapes: ") and len(lines) == 2
    assert result.stderr == ""

    (tmp_path / "text.txt").write_text(" ".join(f"word{i % 90}" for i in range(100)))
    text = ["--text", f"held={tmp_path / 'text.txt'}", "--seqlen", 16]
    record = json.loads(run("eval", checkpoint, *text, *flags, "--json").stdout)
    assert record["tasks"]["colours"]["acc"] == pytest.approx(plain, abs=NEAR)
    assert set(record["tasks"]) == {"colours", "shapes"} and record["perplexity"]["held"] > 1


def test_lines_name_metrics_with_a_filter_and_leave_out_what_is_unknown():
    found = {
        "sums": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.125},
        "one": {"acc": 1.0, "acc_stderr": None},
    }
    assert task_lines(found) == ["sums: exact_match,strict 0.2500 ± 0.1250", "one: acc 1.0000"]


def test_nothing_to_measure_is_said(checkpoint):
    assert "give text with --text NAME=SOURCE" in run("eval", checkpoint, code=2).stderr
    assert "names no task" in run("eval", checkpoint, "--tasks", ",", code=2).stderr


@pytest.mark.parametrize("option", [["--limit", "3"], ["--tasks-path", "."]])
def test_options_of_tasks_without_tasks_are_refused(checkpoint, option):
    text = ["--text", "a=nowhere.txt"]
    result = CliRunner().invoke(main, ["eval", str(checkpoint), *text, *option])
    assert result.exit_code == 2 and "about tasks, and there are none" in result.output


def test_an_unknown_task_or_folder_is_named(tmp_path):
    write_task(tmp_path)
    with pytest.raises(ValueError, match=r"no task 'colors'.*did you mean colours"):
        find_tasks(["colors"], tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        find_tasks(["colours"], tmp_path / "missing")


def test_data_that_cannot_be_fetched_is_code_1(checkpoint, tmp_path):
    write_task(tmp_path, dataset_path="nobody/nothing", dataset_kwargs={})
    flags = ["--tasks", "colours", "--tasks-path", tmp_path]
    result = run("eval", checkpoint, *flags, "--quiet", code=1)
    assert "data of the tasks colours could not be loaded" in result.stderr


def test_a_task_file_that_names_no_column_is_code_2(checkpoint, tmp_path):
    write_task(tmp_path, doc_to_text="{{no_such_column}}")
    flags = ["--tasks", "colours", "--tasks-path", tmp_path]
    result = run("eval", checkpoint, *flags, "--quiet", code=2)
    assert "cannot be used as they are defined" in result.stderr
    assert "no_such_column" in result.stderr


def test_a_model_without_a_first_token_is_refused(loaded, tmp_path, monkeypatch):
    write_task(tmp_path)
    for name in ("bos_token_id", "eos_token_id"):
        monkeypatch.setattr(loaded.model.config, name, None)
    with pytest.raises(ValueError, match="beginning or the end of a text"):
        zero_shot(loaded, find_tasks(["colours"], tmp_path))


def test_without_the_package_its_installation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(RuntimeError, match=r"pip install 'fedspa\[tasks\]'"):
        find_tasks(["piqa"])
