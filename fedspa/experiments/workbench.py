"""What the cases of one process share: a model in memory, its dense weights, texts as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor, nn

from fedspa.compare import unpack
from fedspa.data import Client, sample_windows, tokenize, windows
from fedspa.evaluate import check_windows, domain_perplexity
from fedspa.experiments.cases import Case, Text
from fedspa.experiments.grid import model_file
from fedspa.experiments.partition import deal
from fedspa.experiments.sources import read_source
from fedspa.loading import Loaded, load, need_tokenizer
from fedspa.messages import BlockMessage
from fedspa.model import decoder_blocks, layer_weights, linear_layers, set_weights, weight_of


class Workbench:
    """Holds one model at a time, which every case finds dense."""

    def __init__(self, device: str = "cpu") -> None:
        """device: where models are loaded to."""
        self.device = device
        self._held: tuple[str, str] | None = None
        self._loaded: Loaded | None = None
        self._dense: list[dict[str, Tensor]] = []
        self._tokens: dict[Text, Tensor] = {}

    def lay_out(self, case: Case) -> None:
        """Have the case's model in memory, with its pretrained weights.

        raises: ValueError and RuntimeError as `fedspa.load`.
        """
        wanted = (case.source, case.dtype)
        if self._held != wanted:
            # Before the next one is loaded: two may not fit.
            self._held, self._loaded, self._dense = None, None, []
            self._tokens.clear()
            loaded = load(model_file(case.source), dtype=case.dtype, device=self.device)
            self._dense = [layer_weights(block) for block in decoder_blocks(loaded.model)]
            self._held, self._loaded = wanted, loaded
        self.write([])

    @property
    def loaded(self) -> Loaded:
        """The model that is laid out, and its tokenizer."""
        assert self._loaded is not None
        return self._loaded

    @property
    def model(self) -> nn.Module:
        """The model that is laid out."""
        return self.loaded.model

    @property
    def dense(self) -> list[dict[str, Tensor]]:
        """The pretrained weights of every block, (rows, cols) by the layer's name."""
        return self._dense

    @property
    def prunable(self) -> int:
        """How many weights could be pruned."""
        blocks = decoder_blocks(self.model)
        return sum(weight_of(x).numel() for b in blocks for x in linear_layers(b).values())

    def write(self, messages: Sequence[BlockMessage]) -> None:
        """Give the model the weights of these messages, and the dense ones of all other blocks.

        Of a message that is masks alone the dense weights stay where it keeps them.
        """
        weights = unpack(self._dense, messages)
        for block, layers in zip(decoder_blocks(self.model), weights, strict=True):
            set_weights(block, layers)

    def domains(self, case: Case) -> dict[str, Tensor]:
        """The calibration windows of every domain, (windows, seqlen) int64, drawn with the seed.

        raises: ValueError where a text is missing or holds too few.
        """
        data, found = case.data, {}
        assert case.seed is not None
        for name, text in data.calibration.items():
            drawn = sample_windows(self._read(text), data.windows, data.seqlen, case.seed)
            _check_enough(name, drawn, data.windows, data.seqlen, "windows")
            found[name] = drawn
        return found

    def clients(self, case: Case) -> list[Client]:
        """Who holds which of these windows; of a centralised case one client holds all."""
        domains = self.domains(case)
        if case.kind == "centralised":
            return [Client(torch.cat(list(domains.values())), name="centralised")]
        assert case.clients is not None and case.partition is not None and case.seed is not None
        return deal(domains, case.clients, case.partition, case.seed, case.capacities)

    def heldout(self, case: Case) -> dict[str, Tensor]:
        """The first windows of every held-out text, (eval_windows, seqlen) int64, checked.

        raises: ValueError where a text is missing, holds too few, or cannot be evaluated on.
        """
        data, found = case.data, {}
        for name, text in data.heldout.items():
            cut = windows(self._read(text), data.seqlen)[: data.eval_windows]
            _check_enough(name, cut, data.eval_windows, data.seqlen, "eval_windows")
            found[name] = cut
        check_windows(self.model, found)
        return found

    def evaluate(self, heldout: dict[str, Tensor]) -> tuple[dict[str, float], float]:
        """The perplexity of every domain as the model stands, and the seconds that it took."""
        start = perf_counter()
        return domain_perplexity(self.model, heldout), perf_counter() - start

    def _read(self, text: Text) -> Tensor:
        """A text's tokens, (n,) int64; read once."""
        if text not in self._tokens:
            self._tokens[text] = tokenize(need_tokenizer(self.loaded), read_source(text))
        return self._tokens[text]


def _check_enough(name: str, found: Tensor, wanted: int, seqlen: int, setting: str) -> None:
    if len(found) < wanted:
        raise ValueError(
            f"data: the text of {name!r} holds {len(found)} windows of {seqlen} tokens, fewer than "
            f"{wanted}; give more text, or lower {setting} or seqlen"
        )
