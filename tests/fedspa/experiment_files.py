"""A folder with a small model, texts of three domains, and experiment files about them."""

import random
from pathlib import Path

from small_models import make_model, save_with_tokenizer

METHODS = """
[method.dense]
kind = "dense"
[method.standalone]
kind = "standalone"
[method.mean]
aggregation = "mean"
[method.l0]
[method.mask]
aggregation = "mask"
expansion = ["layer", "row"]
scaling = [false, true]
[method.synchronous]
schedule = "synchronous"
[method.statistics]
aggregation = "statistics"
[method.centralised]
kind = "centralised"
"""
ALL = '["dense", "standalone", "mean", "l0", "mask", "synchronous", "statistics", "centralised"]'
GRID = f"""
[[grid]]
targets = [0.5]
clients = [3]
partitions = ["domain"]
methods = {ALL}
"""


def make_folder(folder: Path) -> Path:
    """The model and the texts, whose words are drawn around another one in each domain."""
    save_with_tokenizer(make_model(), folder / "model")
    draw = random.Random(5)
    for place, domain in enumerate("abc"):
        for part in ("calibration", "heldout"):
            words = [min(95, max(0, round(draw.gauss(20 + 25 * place, 8)))) for _ in range(120)]
            (folder / f"{domain}.{part}.txt").write_text(" ".join(f"word{w}" for w in words))
    return folder


def experiment_text(methods=METHODS, grids=GRID, windows=4, models='["model"]', more="") -> str:
    """An experiment file."""
    domains = "\n".join(
        f'{d} = {{calibration = "{d}.calibration.txt", heldout = "{d}.heldout.txt"}}' for d in "abc"
    )
    return f"""
name = "small"
models = {models}
{more}
[data]
windows = {windows}
seqlen = 16
eval_windows = 2
[data.domains]
{domains}
{methods}
{grids}
"""


def write_experiment(folder: Path, name="grid.toml", **parts) -> Path:
    """An experiment file in a folder."""
    path = folder / name
    path.write_text(experiment_text(**parts))
    return path
