"""The command line: `fedspa demo`, `prune`, `eval`, `plan` and `experiment`.

Exit codes: 0 done; 2 the input cannot be used; 1 the machine could not do it; 130 interrupted,
143 ended.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from transformers.utils import logging

from fedspa import config
from fedspa.demo import demo_model, run_demo
from fedspa.evaluate import domain_perplexity
from fedspa.experiments.cli import command as experiment
from fedspa.loading import Loaded, load, open_model
from fedspa.machine import give_back_freed_memory, keep_freed_memory
from fedspa.options import COUNT, DEFAULT_SPARSITY, DEMO_SPARSITY, common, method, settings_of
from fedspa.output import check_output, free_name
from fedspa.planning.cli import command as plan
from fedspa.progress import progress_bar
from fedspa.prune import prune_into
from fedspa.ranks import SPLITS
from fedspa.report import Report, client_table, method_table
from fedspa.run import Surroundings
from fedspa.streaming.architecture import Source
from fedspa.streaming.placement import PLACEMENTS
from fedspa.tasks import Metrics, find_tasks, task_lines, zero_shot


class _Sentences(click.Group):
    """Turns what the library raises into one sentence and an exit code."""

    owns_process = False

    def main(self, args: Sequence[str] | None = None, *rest: Any, **named: Any) -> Any:
        """Run in a process that is the command's own; a caller with arguments keeps its malloc."""
        if args is None:
            self.owns_process = True
            keep_freed_memory()
        return super().main(args, *rest, **named)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; with --traceback errors pass through as they are."""
        signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except (ValueError, RuntimeError, OSError) as error:
            # click's own exits are RuntimeErrors.
            if ctx.params["traceback"] or isinstance(error, click.exceptions.Exit | click.Abort):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2 if isinstance(error, ValueError) else 1)
        except KeyboardInterrupt:
            click.echo("interrupted; no output was written", err=True)
            ctx.exit(130)


def _terminate(number: int, frame: object) -> None:
    """Let a terminated run remove what it had half written."""
    raise SystemExit(128 + number)


@click.group(cls=_Sentences, context_settings={"show_default": True})
@click.version_option(package_name="fedspa")
@click.option("--traceback", is_flag=True, help="Show where an error comes from.")
def main(traceback: bool) -> None:
    """Federated pruning of large language models: the calibration text stays with the clients."""


@main.command()
@click.argument("model", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="[default: runs/demo, runs/demo-2, …]")
@click.option("--samples", type=COUNT, default=5, help="Windows to calibrate, and to judge.")
@click.option("--seqlen", type=COUNT, default=512, help="Tokens of a window.")
@method
@common
def demo(model: str | None, out: Path | None, samples: int, seqlen: int, **options: Any) -> None:
    """Prune SmolLM2-135M (or MODEL) over four clients, and show what federation bought."""
    settings = settings_of(options, DEMO_SPARSITY, message_dtype="bfloat16")
    out = out or free_name(Path("runs/demo"))
    check_output(out)
    loaded = _load(model or demo_model(), options)
    show = _progress(options)
    report = run_demo(loaded, out, settings, samples=samples, seqlen=seqlen, progress=show)
    _show(report, out, options)


@main.command()
@click.argument("model")
@click.option(
    "--client",
    "client",
    multiple=True,
    metavar="NAME=SOURCE",
    help="A client and its text: a file, a folder, or a dataset's name. Once for each client.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("--samples", type=COUNT, default=128, help="Calibration windows a client.")
@click.option("--seqlen", type=COUNT, default=2048, help="Tokens of a window.")
@click.option("--field", default="text", help="Where records hold their text.")
@click.option(
    "--eval",
    "evaluate",
    multiple=True,
    metavar="NAME=SOURCE",
    help="Text to measure perplexity on, before and after.",
)
@click.option("--eval-windows", type=COUNT, help="At most that many windows of each text.")
@click.option("--compare", "baselines", is_flag=True, help="Measure the baselines as well.")
@click.option(
    "--activations",
    type=click.Choice(["auto", *PLACEMENTS]),
    default="auto",
    help="Where hidden states lie between two blocks.",
)
@click.option("--split", type=click.Choice(SPLITS), help="What the ranks of torchrun divide.")
@click.option("--restart", is_flag=True, help="Forget what a killed run left, and start anew.")
@method
@common
def prune(model: str, client: tuple[str, ...], out: Path, **options: Any) -> None:
    """Prune MODEL (a checkpoint folder, .gguf file or id) over clients, into a new folder.

    A checkpoint of safetensors is streamed: one decoder block is in memory at a time, and the same
    command goes on after the last finished block if the run was killed. With --compare the model
    is loaded as a whole. Under torchrun several processes share the work, see --split.
    """
    settings = settings_of(options, DEFAULT_SPARSITY)
    around = Surroundings(
        device=options["device"],
        dtype=options["dtype"],
        activations=options["activations"],
        split=options["split"],
        restart=options["restart"],
        progress=_progress(options),
        events=options["as_json"],
    )
    check_output(out, source=model)
    if options["baselines"] and not options["evaluate"]:
        raise ValueError("prune: --compare measures perplexity; give text with --eval NAME=SOURCE")
    specs = config.client_specs(client, click.get_current_context(), options)
    texts = [spec.read(options["field"]) for spec in specs]
    judged = config.read_named(options["evaluate"], options["field"])
    opened = _open(model, options)
    clients = [
        spec.client(opened, text, options["seed"]) for spec, text in zip(specs, texts, strict=True)
    ]
    heldout = config.cut(opened, judged, options["seqlen"], options["eval_windows"])
    if isinstance(opened, Source) and main.owns_process:
        give_back_freed_memory()
    both = options["baselines"]
    report = prune_into(out, opened, clients, settings, around, heldout, baselines=both)
    if report is not None:
        _show(report, out, options)


@main.command("eval")
@click.argument("model")
@click.option(
    "--text",
    multiple=True,
    metavar="NAME=SOURCE",
    help="Text to measure perplexity on: a file, a folder, or a dataset's name.",
)
@click.option("--seqlen", type=COUNT, default=2048, help="Tokens of a window.")
@click.option("--max-windows", type=COUNT, help="At most that many windows of each text.")
@click.option("--batch-size", type=COUNT, help="Windows in a forward pass; else by the device.")
@click.option("--field", default="text", help="Where records hold their text.")
@click.option("--tasks", help="Tasks of lm-evaluation-harness, such as piqa,arc_easy.")
@click.option("--tasks-path", type=click.Path(path_type=Path), help="A folder of more task files.")
@click.option("--limit", type=COUNT, help="At most that many questions of each task.")
@common
def evaluate(model: str, text: tuple[str, ...], seqlen: int, **options: Any) -> None:
    """Measure MODEL: its perplexity on text, and its zero-shot accuracy on tasks.

    For perplexity a text is concatenated and cut into windows of --seqlen that do not overlap.
    """
    if not text and options["tasks"] is None:
        raise ValueError(
            "eval: there is nothing to measure; give text with --text NAME=SOURCE for perplexity, "
            "or --tasks for zero-shot accuracy, or both"
        )
    unused = [name for name in ("tasks_path", "limit") if options[name] is not None]
    if options["tasks"] is None and unused:
        flag = unused[0].replace("_", "-")
        raise ValueError(f"eval: --{flag} is about tasks, and there are none; name some by --tasks")
    texts = config.read_named(text, options["field"])
    names = [name.strip() for name in (options["tasks"] or "").split(",") if name.strip()]
    tasks = None if options["tasks"] is None else find_tasks(names, options["tasks_path"])
    loaded = _load(model, options)
    heldout = config.cut(loaded, texts, seqlen, options["max_windows"])
    batch = options["batch_size"]
    steps = sum(len(windows) for windows in heldout.values())
    with progress_bar("evaluating", steps, _progress(options)) as advance:
        step = partial(advance, model)
        found = domain_perplexity(loaded.model, heldout, batch_size=batch, advance=step)
    accuracy: dict[str, Metrics] = {}
    if tasks is not None:
        show, limit = _progress(options), options["limit"]
        accuracy = zero_shot(loaded, tasks, limit=limit, batch_size=batch, show=show)
    if options["as_json"]:
        windows = {name: len(cut) for name, cut in heldout.items()}
        result = {"model": model, "seqlen": seqlen, "windows": windows, "perplexity": found}
        click.echo(json.dumps({**result, "tasks": accuracy}, indent=2))
    else:
        for name, value in found.items():
            click.echo(f"{name}: perplexity {value:.3f} ({len(heldout[name])} × {seqlen} tokens)")
        for line in task_lines(accuracy):
            click.echo(line)


main.add_command(plan)
main.add_command(experiment)


def _load(source: str | Path, options: dict[str, Any]) -> Loaded:
    _be_quiet(options)
    if not options["quiet"]:
        click.echo(f"loading {source}", err=True)
    return load(source, dtype=options["dtype"], device=options["device"])


def _open(source: str, options: dict[str, Any]) -> Loaded | Source:
    """A model to prune: streamed where that can be."""
    if options["baselines"]:
        return _load(source, options)
    _be_quiet(options)
    return open_model(source, dtype=options["dtype"], device=options["device"], say=_say(options))


def _say(options: dict[str, Any]) -> Callable[[str], None] | None:
    return None if options["quiet"] else partial(click.echo, err=True)


def _be_quiet(options: dict[str, Any]) -> None:
    logging.set_verbosity_error()
    if options["quiet"]:
        logging.disable_progress_bar()


def _progress(options: dict[str, Any]) -> bool:
    return not options["quiet"]


def _show(report: Report, out: Path, options: dict[str, Any]) -> None:
    """Print the result: JSON, or tables and where everything is."""
    if options["as_json"]:
        click.echo(report.to_json(), nl=False)
        return
    if options["quiet"]:
        return
    console = Console()
    console.print(client_table(report.clients))
    if report.methods:
        console.print(method_table(report.methods))
    if report.unprunable:
        console.print(f"not pruned: {', '.join(report.unprunable)}")
    console.print(f"model, masks and report are in {out}; open {out / 'report.html'}")
