"""Zero-shot accuracy on the tasks of lm-evaluation-harness, an optional package."""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedspa.batches import choose_batch
from fedspa.loading import Loaded, need_tokenizer
from fedspa.model import vocabulary_size

Metrics = dict[str, float | None]

# Question and answer of nearly every zero-shot task are shorter; the longest requests come first,
# so that a batch that does not fit a GPU shows at once.
TOKENS_OF_A_REQUEST = 256
# What stands in a task's results beside its metrics.
NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True)
class Tasks:
    """Tasks that are known to the harness.

    manager: lm_eval's TaskManager, which loads them.
    """

    names: tuple[str, ...]
    manager: Any


def find_tasks(names: Sequence[str], folder: Path | None = None) -> Tasks:
    """Look the tasks up, before a model is loaded for them.

    names: tasks, groups or tags of the harness, or tasks that files (.yaml) in the folder define.
    folder: task files of one's own; they go before the harness's where a name is in both.
    raises: ValueError for a name or folder that is not there; RuntimeError without lm_eval.
    """
    if not names:
        raise ValueError("eval: --tasks names no task; give one or more, such as piqa,arc_easy")
    if folder is not None and not folder.is_dir():
        raise ValueError(f"eval: there is no folder {folder} with task files (--tasks-path)")
    managers = _task_managers()
    # The harness's own 14,000 tasks take seconds to read, which one's own tasks can do without.
    if folder is not None:
        own = managers(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return Tasks(tuple(names), own)
    known = managers(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in known.all_tasks:
            near = get_close_matches(name, known.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists them"
            where = "" if folder is None else f", and no file (.yaml) in {folder} defines it"
            raise ValueError(f"eval: there is no task {name!r}{where}; {hint}")
    return Tasks(tuple(names), known)


def zero_shot(
    loaded: Loaded,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    show: bool = False,
) -> dict[str, Metrics]:
    """Measure a model on tasks without examples in the prompt, also those that usually have some.

    limit: at most that many questions of each task; None: all of them.
    batch_size: requests in one forward pass; None: by the device (`batches.py`).
    show: whether the harness may draw its progress on stderr.
    returns: {task: {metric: value}}, where "acc_stderr" is the standard error of "acc" and None
        where one question gives none; groups and the tasks in them each have a line.
    raises: ValueError where the tokenizer is not the model's or a task file is wrong; RuntimeError
        where a task's data cannot be loaded.
    """
    tokenizer = need_tokenizer(loaded)
    prefix = _first_token(loaded)
    if batch_size is None:
        words = vocabulary_size(loaded.model)
        batch_size = choose_batch(loaded.model, TOKENS_OF_A_REQUEST, logits=words)
    with _quiet(show), _as_sentences(tasks.names):
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        _seed()
        opened = tasks.manager.load(list(tasks.names))
        for task in opened["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
        judge = HFLM(
            pretrained=loaded.model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            prefix_token_id=prefix,
        )
        found = evaluate(judge, opened, limit=limit, log_samples=False)
    return {task: _metrics(values) for task, values in found["results"].items()}


def task_lines(found: Mapping[str, Metrics]) -> list[str]:
    """One line of text for each task: "piqa: acc 0.6832 ± 0.0109, acc_norm 0.6801 ± 0.0109"."""
    return [
        f"{task}: "
        + ", ".join(
            f"{metric} {_number(value)}{_deviation(metrics.get(_error_of(metric)))}"
            for metric, value in metrics.items()
            if metric not in {_error_of(other) for other in metrics}
        )
        for task, metrics in found.items()
    ]


def _task_managers() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RuntimeError(
            f"eval: --tasks needs the package lm-eval ({error}); "
            "install it with pip install 'fedspa[tasks]'"
        ) from error
    return TaskManager


def _first_token(loaded: Loaded) -> int:
    """What stands before an answer whose question is empty: the beginning, else the end of text."""
    config = loaded.model.config
    candidates = (
        loaded.tokenizer.bos_token_id,
        loaded.tokenizer.eos_token_id,
        getattr(config, "bos_token_id", None),
        getattr(config, "eos_token_id", None),
    )
    for candidate in candidates:
        if isinstance(candidate, int):
            return candidate
    raise ValueError(
        f"{loaded.name}: neither its tokenizer nor its configuration names a token for the "
        f"beginning or the end of a text, which tasks need; set bos_token in its tokenizer"
    )


def _seed() -> None:
    """Seed as the harness's simple_evaluate does: some tasks shuffle their answers.

    It is not called itself since it describes the machine for seconds, and lets git complain.
    """
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)


@contextmanager
def _as_sentences(names: Sequence[str]) -> Iterator[None]:
    """Turn what goes wrong in tasks into a sentence."""
    from jinja2 import TemplateError

    asked = ", ".join(names)
    try:
        yield
    except OSError as error:
        # Without a network, or without a file that a task of one's own names.
        raise RuntimeError(
            f"eval: the data of the tasks {asked} could not be loaded ({_first_line(error)}); "
            f"connect to a network, or give tasks with local files by --tasks-path"
        ) from error
    except (ValueError, TypeError, LookupError, ImportError, TemplateError) as error:
        raise ValueError(
            f"eval: the tasks {asked} cannot be used as they are defined: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _metrics(values: Mapping[str, Any]) -> Metrics:
    """Metrics by their names; the harness says "acc,none", where "none" is the answer's filter."""
    return {
        key.removesuffix(",none"): float(value) if isinstance(value, int | float) else None
        for key, value in values.items()
        if key not in NOT_METRICS
    }


def _error_of(metric: str) -> str:
    """The key of a metric's standard error; a filter's name stays behind: acc_stderr,strict."""
    name, comma, rest = metric.partition(",")
    return f"{name}_stderr{comma}{rest}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _deviation(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"


@contextmanager
def _quiet(show: bool) -> Iterator[None]:
    """Keep the harness's warnings, which are about its own defaults, and unless asked its bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with nullcontext() if show else redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
