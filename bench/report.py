"""`python -m bench report`: docs/performance.md and its pictures, from the results that are stored.

docs/deployment-cost.md too, from those of `python -m bench network`.

The same files give the same page, byte for byte, and the pictures too with the same matplotlib.
"""

from collections.abc import Iterator
from pathlib import Path

import click

from bench import pictures, provenance, summary, tables
from bench.drawing import svg
from bench.growth import page as growth_page
from bench.growth.fit import Curve, block_curves, curves
from bench.loaded import Machine, machines, middle, read_folder
from bench.network import page as network_page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
ANALYSIS = ROOT / "docs" / "performance-analysis.md"
COST = ROOT / "docs" / "deployment-cost.md"
# Pictures that carry this line are the report's, and go when they are no longer drawn.
MARK = "<!-- drawn by python -m bench report -->\n"

HEAD = """\
# Performance

Written by `python -m bench report` from the files in `bench/results`: measure again or change the
report, not this page.
"""
REPRODUCE = """\
## To reproduce

```sh
make bench                                          # every operator on the CPU
python -m bench gpu                                 # every operator on a GPU, in one command
python -m bench model --shape llama-2-7b --blocks 2 # whole models, block by block
python -m bench growth                              # time and memory against sizes
python -m bench compare A.json B.json               # what got faster or slower beyond noise
python -m bench report                              # this page, from bench/results/*.json
```

Every result was compared with the reference before the clock ran; a wrong one has no time. The
contenders of a case run one after the other in one process, round after round, on fresh random
inputs. `× pytorch` is how many times as long as FedSpa the best PyTorch took, as the median over
those rounds. `× floor` is such a ratio too, to what a target names: for `obs_prune` one Cholesky
factorisation and the product R·K² (on a CPU half of it) in float32, for `accumulate_hessian_` the
whole product of its size in the inputs' dtype, all through PyTorch. GB/s count the least bytes that
must move, TFLOP/s two operations for every multiply-add that is needed, whatever the code really
does; both are held against a copy and a matrix product of the same run. Peak MB are beyond the
inputs, results included.
"""
CEILINGS = """\
They are what PyTorch reaches here, not what the hardware could: a kernel that uses instructions
which PyTorch's library leaves unused on this processor can pass 100 %, although only the operations
that are needed count (of a symmetric product, half of the square)."""
FAILED = """\
The newest file with these cases has no time for them; the tables show an older one's, if any."""


def write(folder: Path, page: Path, analysis: Path) -> list[Path]:
    """Write the page and its pictures, in a folder of the page's name; return all files."""
    files = read_folder(folder)
    found = machines([file for file in files if file[1]["kind"] != "network"])
    drawings = page.with_suffix("")
    text, figures = compose(found, drawings.name, analysis)
    drawings.mkdir(parents=True, exist_ok=True)
    for old in drawings.glob("*.svg"):
        if old.name not in figures and MARK in old.read_text(encoding="utf-8"):
            old.unlink()
    for name, drawing in figures.items():
        (drawings / name).write_text(drawing, encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    return [page, *(drawings / name for name in figures)]


def write_cost(folder: Path, page: Path) -> list[Path]:
    """Write what the network costs where that was measured; return the pages that were written."""
    files = [file for file in read_folder(folder) if file[1]["kind"] == "network"]
    if files:
        page.write_text(network_page.compose(files), encoding="utf-8")
    return [page] if files else []


def compose(found: list[Machine], drawings: str, analysis: Path) -> tuple[str, dict[str, str]]:
    """Return the page's text, and its pictures by file name.

    drawings: the pictures' folder, as the page refers to it
    analysis: a page to include where targets are missed, if it is there
    """
    figures: dict[str, str] = {}
    lines = [HEAD, *summary.lines(found), ""]
    lines += ["## Targets", ""]
    for machine in found:
        lines += [f"### {machine.name}", "", *tables.target_table(machine), ""]
    if not any(machine.device == "cuda" for machine in found):
        nowhere = Machine("cuda", "An H200")
        lines += [f"### {nowhere.name}", "", "Not measured: no GPU result file yet.", ""]
        lines += [*tables.target_table(nowhere), ""]
    if analysis.is_file():
        lines += ["## Where a target is missed", "", analysis.read_text(encoding="utf-8").strip()]
        lines += [""]
    lines += [REPRODUCE]
    for machine in found:
        lines += _operators(machine, drawings, figures)
    for machine in found:
        lines += _failed(machine)
    for machine in found:
        lines += _models(machine)
    for machine in found:
        lines += _growth(machine, drawings, figures)
    lines += ["## Files", "", *provenance.file_table(found)]
    return "\n".join(lines).rstrip() + "\n", figures


def _operators(machine: Machine, drawings: str, figures: dict[str, str]) -> Iterator[str]:
    if not machine.operators:
        return
    yield from (f"## Operators on {machine.name}", "", provenance.ceilings(machine), CEILINGS, "")
    for dtype in sorted({case["dtype"] for case in machine.operators}):
        cases = [case for case in machine.operators if case["dtype"] == dtype]
        figure = pictures.roofline(cases, middle([case["ceilings"] for case in cases]))
        name = f"roofline-{machine.slug}-{dtype}.svg"
        figures[name] = MARK + svg(figure)
        yield f"![Rates of every case in {dtype} under the machine's roofs]({drawings}/{name})"
        yield ""
    yield "A point is a case, with its rows × cols and its clients where there is room to say so."
    yield ""
    for operator in tables.operators(machine.operators):
        cases = [case for case in machine.operators if case["operator"] == operator]
        yield from (f"### `{operator}`", "", *tables.notes(cases), "")
        yield from (*tables.operator_table(cases), "")


def _failed(machine: Machine) -> Iterator[str]:
    if machine.failed:
        yield from (f"## Not measured on {machine.name}", "", FAILED, "")
        yield from (*tables.failed_table(machine.failed), "")


def _models(machine: Machine) -> Iterator[str]:
    if machine.models:
        yield from (f"## Whole models on {machine.name}", "")
        yield from (*tables.model_table(machine.models), "")
        yield from (*tables.model_notes(machine.models), "")


def _growth(machine: Machine, drawings: str, figures: dict[str, str]) -> Iterator[str]:
    found: list[Curve] = [*curves(machine.growth), *block_curves(machine.models)]
    if not found:
        return
    yield from (f"## How cost grows on {machine.name}", "", *growth_page.sentences(found), "")
    yield from (growth_page.floors_meaning(), "", *growth_page.exponents(found), "")
    for axis in growth_page.axes(found):
        along = [curve for curve in found if curve.axis == axis]
        name = f"growth-{machine.slug}-{axis}.svg"
        figures[name] = MARK + svg(pictures.growth(along, axis))
        yield from (f"### Along {axis}", "")
        yield from (f"![Time and peak memory along {axis}]({drawings}/{name})", "")
        yield from (*growth_page.points(along, axis), "")


@click.command("report")
@click.option("--results", "folder", default=RESULTS, type=click.Path(path_type=Path))
@click.option("--out", default=PAGE, type=click.Path(path_type=Path))
@click.option("--analysis", default=ANALYSIS, type=click.Path(path_type=Path))
@click.option("--cost", default=COST, type=click.Path(path_type=Path))
def command(folder: Path, out: Path, analysis: Path, cost: Path) -> None:
    """Write docs/performance.md, its pictures and docs/deployment-cost.md from bench/results."""
    files = write(folder, out, analysis)
    click.echo(f"{files[0]} and {len(files) - 1} pictures")
    for page in write_cost(folder, cost):
        click.echo(str(page))
