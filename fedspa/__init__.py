"""Federated pruning of large language models: calibration data stays with the clients."""

from fedspa.data import Client
from fedspa.evaluate import perplexity
from fedspa.loading import load
from fedspa.output import load_masks
from fedspa.report import Report
from fedspa.run import federate
from fedspa.settings import Settings

__version__ = "0.1.0"

__all__ = ["Client", "Report", "Settings", "federate", "load", "load_masks", "perplexity"]
