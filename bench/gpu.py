"""`python -m bench gpu`: every operator on the CUDA GPU of this machine, into one JSON."""

import re
from pathlib import Path
from typing import Any

import click
import torch

from bench.operators.plan import jobs
from bench.operators.run import options, run_jobs

RESULTS = Path(__file__).parent / "results"
# Of --minutes, what is left for imports, which take some 10 s where nothing is in a cache, and for
# the job that is running when the time is over: it may still compile a kernel.
RESERVE = 30.0


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="[default: bench/results/GPU-…]")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=8.0)
@options
def command(out: Path | None, minutes: float, **choice: Any) -> None:
    """Measure every operator and all of its backends on this machine's CUDA GPU.

    Takes less than --minutes; the file is whole after every case.
    """
    todo = jobs("cuda", **choice)
    if not torch.cuda.is_available():
        raise click.UsageError(
            "no CUDA GPU is available to PyTorch here; run this where there is one, or measure "
            "the CPU with `make bench`"
        )
    # Every float32 product is one in float32, ours and the peers'.
    torch.set_float32_matmul_precision("highest")
    out = out or RESULTS / default_name(torch.cuda.get_device_name())
    raise SystemExit(run_jobs(todo, "cuda", out, max(1.0, 60 * minutes - RESERVE)))


def default_name(gpu: str) -> str:
    """Return a file's name from the GPU's, such as "nvidia-h200-operators.json"."""
    return "-".join(re.findall(r"[a-z0-9]+", gpu.lower())) + "-operators.json"
