"""Run a pruning for every line of the input, in one process, and print what it took beside a plan.

A line is a JSON object: `settings`, `dtype`, `clients`. Run by test_plan.py with a malloc that
gives every larger tensor back, so that nothing but the run's own tensors counts.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench import memory
from fedspa import Client, Settings, federate
from fedspa.planning.architecture import read_architecture
from fedspa.planning.job import Job
from fedspa.planning.memory import most, needs

SAMPLES, LENGTH, VOCABULARY = 4, 48, 128


def run(line, folder):
    """Measured and planned bytes of main memory beyond what the process takes."""
    config = LlamaConfig(
        hidden_size=896,
        intermediate_size=2432,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(1)
    checkpoint = folder / "dense"
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, line["dtype"])).save_pretrained(
        checkpoint
    )
    tokens = torch.randint(0, VOCABULARY, (line["clients"], SAMPLES, LENGTH))
    clients = [Client(windows, name=f"client {i}") for i, windows in enumerate(tokens)]
    settings = Settings(**line["settings"])
    job = Job(
        read_architecture(str(checkpoint)), settings, len(clients), SAMPLES, LENGTH, "cpu", None
    )
    planned = most(needs(job, "host")).host
    measured, _ = memory.peak(
        lambda: federate(checkpoint, clients, settings, out=folder / "out", progress=False), "cpu"
    )
    return {"planned": planned, "measured": measured}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for text in sys.stdin:
        with tempfile.TemporaryDirectory() as temporary:
            print(json.dumps(run(json.loads(text), Path(temporary))), flush=True)
