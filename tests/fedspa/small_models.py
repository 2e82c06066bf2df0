"""Small random models of many architectures, and clients whose tokens differ."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from fedspa import Client

VOCABULARY = 97
LENGTH = 16
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 64}
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def configurations(layers: int = 2) -> dict[str, PretrainedConfig]:
    """A small configuration of every architecture that fedspa promises."""
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    llama_like = {**COMMON, **sizes, **GROUPED, **SPECIAL}
    return {
        "opt": OPTConfig(
            **COMMON, **sizes, **SPECIAL, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0
        ),
        "llama": LlamaConfig(**llama_like),
        "mistral": MistralConfig(**llama_like, sliding_window=8),
        "qwen2": Qwen2Config(**llama_like),
        "qwen3": Qwen3Config(**llama_like, head_dim=8),
        "gemma": GemmaConfig(**llama_like, head_dim=8),
        "gpt2": GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=layers, n_head=4, **SPECIAL
        ),
        "gpt_neox": GPTNeoXConfig(**COMMON, **sizes, **SPECIAL, intermediate_size=64),
        "phi3": Phi3Config(**llama_like),
    }


ARCHITECTURES = tuple(configurations())


def make_model(name: str = "llama", layers: int = 2, dtype: torch.dtype = torch.float32):
    """A model of one architecture with seeded random weights."""
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(configurations(layers)[name]).to(dtype).eval()


def make_clients(count: int, samples: int = 4, length: int = LENGTH) -> list[Client]:
    """Named clients; each draws its tokens from a quarter of the vocabulary of its own."""
    clients = []
    for index in range(count):
        draw = torch.Generator().manual_seed(100 + index)
        low = (index * VOCABULARY // 4) % (VOCABULARY - 30)
        tokens = torch.randint(low, low + 30, (samples, length), generator=draw)
        clients.append(Client(tokens, name=f"c{index}"))
    return clients


def save_with_tokenizer(model, folder) -> None:
    """A checkpoint with a tokenizer that knows word0 to word95 and nothing else."""
    vocabulary = {f"word{i}": i for i in range(VOCABULARY - 1)} | {"[UNK]": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    model.save_pretrained(folder)
