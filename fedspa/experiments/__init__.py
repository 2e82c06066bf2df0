"""Grids of runs: models x methods x targets x clients x partitions x seeds, from one TOML file.

    experiment = read_experiment("grid.toml")
    records = run_experiment(experiment, "runs/experiments/grid", workers=2)

`python -m fedspa experiment grid.toml` does the same, and writes tables and pictures.
"""

from fedspa.experiments.experiment_file import Experiment, read_experiment
from fedspa.experiments.workers import run_experiment

__all__ = ["Experiment", "read_experiment", "run_experiment"]
