"""Text from every source, windows, and the sentences that refuse a client."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedspa.data import Client, check_clients, pool, read_text, sample_windows, tokenize, windows

datasets = pytest.importorskip("datasets")


# Files


def test_plain_text_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffeins\r\nzwei — drei".encode())
    assert read_text(tmp_path / "a.txt") == "eins\nzwei — drei"
    assert read_text(str(tmp_path / "a.txt")) == "eins\nzwei — drei"


def test_another_encoding_names_the_file_and_the_offset(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9 noir".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"latin.txt is not UTF-8: byte 0xe9 at offset 3; convert it"
    ):
        read_text(tmp_path / "latin.txt")


def test_json_lines_give_one_document_a_line(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in ("one\ntwo", "a\u2028b")
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert read_text(tmp_path / "a.jsonl") == "one\ntwo\n\na\u2028b"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{oops", "line 2 is not JSON"),
        ("[1]", "line 2 is not an object but list"),
        ('{"body": "x"}', 'line 2 has no field "text", only body'),
        ('{"text": 3}', 'line 2: field "text" is int, not text'),
    ],
)
def test_a_wrong_json_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    (tmp_path / "a.ndjson").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=sentence):
        read_text(tmp_path / "a.ndjson")


def test_parquet_is_read_by_column_and_leaves_no_copy(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_dict({"body": ["one", "two"], "n": [1, 2]}).to_parquet(
        str(tmp_path / "a.parquet")
    )
    assert read_text(tmp_path / "a.parquet", field="body") == "one\n\ntwo"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match='no column "text", only body, n'):
        read_text(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match='row 0: column "n" is int, not text'):
        read_text(tmp_path / "a.parquet", field="n")
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="b.parquet is not readable as Parquet"):
        read_text(tmp_path / "b.parquet")


def test_a_saved_dataset_is_read_by_part(tmp_path: Path) -> None:
    train = datasets.Dataset.from_dict({"text": ["one", "two"]})
    test = datasets.Dataset.from_dict({"text": ["three"]})
    train.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict(train=train).save_to_disk(str(tmp_path / "half"))
    assert read_text(tmp_path / "plain") == "one\n\ntwo"
    assert read_text(tmp_path / "both", part="test") == "three"
    with pytest.raises(ValueError, match='no split "test", only train'):
        read_text(tmp_path / "half", part="test")
    with pytest.raises(ValueError, match='no column "body", only text'):
        read_text(tmp_path / "plain", field="body")


def test_a_folder_is_its_files_in_order_of_name(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    assert read_text(tmp_path) == "first\n\nsecond"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder .*empty holds no"):
        read_text(tmp_path / "empty")


def test_missing_and_empty_sources_are_caller_errors(tmp_path: Path) -> None:
    (tmp_path / "client_one.txt").write_text(" \n\n ")
    with pytest.raises(ValueError, match="client_one.txt has no text"):
        read_text(tmp_path / "client_one.txt")
    with pytest.raises(ValueError, match="did you mean client_one.txt"):
        read_text(tmp_path / "client_onw.txt")
    with pytest.raises(ValueError, match="nor a folder"):
        read_text("nowhere/at_all.txt")
    with pytest.raises(ValueError, match="did you mean wikitext2"):
        read_text("wikitext-2")
    with pytest.raises(ValueError, match='part is "heldout"'):
        read_text("c4", part="heldout")  # type: ignore[arg-type]
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="one object a line"):
        read_text(tmp_path / "a.json")


# Datasets by name, on a stand-in for the hub


class Hub:
    """Answers load_dataset with small sets of the published columns; notes what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, path: str, **where: Any) -> Any:
        self.asked.append((path, where))
        column = "sentence" if "ptb" in path else "text"
        documents = 1_200 if "c4" in path else 3
        return datasets.Dataset.from_dict(
            {column: [f"{where['split']}{n}" for n in range(documents)]}
        )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


def test_the_papers_sets_are_joined_as_the_papers_do(hub: Hub) -> None:
    assert read_text("wikitext2") == "train0\n\ntrain1\n\ntrain2"
    assert read_text("wikitext2", part="test").startswith("test0\n\ntest1")
    assert hub.asked[0] == ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "train"})
    assert read_text("ptb", part="test") == "test0 test1 test2"
    c4 = read_text("c4", part="test").split(" ")
    assert len(c4) == 1_100 and c4[-1] == "validation1099"
    assert hub.asked[-1][1]["data_files"] == {
        "validation": "en/c4-validation.00000-of-00008.json.gz"
    }
    assert len(read_text("c4").split(" ")) == 1_200


def test_a_hub_id_carries_its_config_and_split(hub: Hub) -> None:
    assert read_text("owner/prose:old:dev") == "dev0\n\ndev1\n\ndev2"
    assert read_text("owner/prose.v2", part="test") == "test0\n\ntest1\n\ntest2"
    assert hub.asked == [
        ("owner/prose", {"split": "dev", "name": "old"}),
        ("owner/prose.v2", {"split": "test"}),
    ]
    with pytest.raises(ValueError, match='no column "body", only text'):
        read_text("owner/prose", field="body")


def test_a_file_of_that_name_is_reached_by_its_path(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c4").write_text("explosive")
    monkeypatch.chdir(tmp_path)
    assert read_text("./c4") == "explosive"
    assert read_text(Path("c4")) == "explosive"
    assert hub.asked == []


def test_no_network_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(path: str, **where: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        RuntimeError, match="Salesforce/wikitext.*no route to host.*path of a local file"
    ):
        read_text("wikitext2")


def test_a_split_that_is_not_there_is_the_callers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_split(path: str, **where: Any) -> None:
        raise ValueError("Unknown split \"dev\". Should be one of ['train'].")

    monkeypatch.setattr(datasets, "load_dataset", without_split)
    with pytest.raises(ValueError, match="owner/prose::dev: Unknown split"):
        read_text("owner/prose::dev")


def test_without_datasets_the_sentence_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "a.txt").write_text("plain text needs no package")
    for source in ("wikitext2", "owner/prose", str(tmp_path / "a.parquet")):
        with pytest.raises(RuntimeError, match=r"pip install 'fedspa\[data\]'"):
            read_text(source)
    assert read_text(tmp_path / "a.txt") == "plain text needs no package"


# Tokens and windows


def small_tokenizer(limit: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", model_max_length=limit
    )


def test_a_long_text_is_tokenized_whole_and_quietly(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tokens = tokenize(small_tokenizer(limit=8), "a b " * 50)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [0] + [2, 3] * 50
    assert capfd.readouterr().err == "" and caplog.text == ""


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="0 characters gave no token"):
        tokenize(lambda text, verbose: {"input_ids": []}, "")


def test_windows_follow_each_other_without_overlap() -> None:
    assert windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(torch.arange(4), 4).shape == (1, 4)
    with pytest.raises(ValueError, match="3 tokens are less than one window of 4"):
        windows(torch.arange(3), 4)
    with pytest.raises(ValueError, match="seqlen is 0"):
        windows(torch.arange(3), 0)
    with pytest.raises(ValueError, match=r"shape \(1, 3\)"):
        windows(torch.zeros(1, 3, dtype=torch.int64), 2)


def test_sampled_windows_are_distinct_and_depend_on_the_seed_alone() -> None:
    tokens = torch.arange(1_000)
    drawn = sample_windows(tokens, 20, 10, seed=3)
    torch.manual_seed(0)
    assert torch.equal(drawn, sample_windows(tokens, 20, 10, seed=3))
    assert not torch.equal(drawn, sample_windows(tokens, 20, 10, seed=4))
    starts = drawn[:, 0]
    assert len(set(starts.tolist())) == 20 and (starts % 10 == 0).all()
    assert torch.equal(drawn, starts[:, None] + torch.arange(10))


def test_a_short_text_gives_the_windows_it_has() -> None:
    assert sample_windows(torch.arange(35), 100, 10, seed=0).shape == (3, 10)
    with pytest.raises(ValueError, match="9 tokens are less than one window of 10"):
        sample_windows(torch.arange(9), 5, 10, seed=0)
    with pytest.raises(ValueError, match="samples is 0"):
        sample_windows(torch.arange(9), 0, 3, seed=0)


# Clients


def client(**change: Any) -> Client:
    return Client(**{"tokens": torch.zeros(2, 4, dtype=torch.int64), **change})


def test_sound_clients_pass_also_with_windows_of_different_length() -> None:
    check_clients(
        [client(), client(name="b", tokens=torch.full((1, 9), 6)), client(sparsity=0.0)], 7
    )


@pytest.mark.parametrize(
    ("clients", "sentence"),
    [
        ([], "there are no clients"),
        (
            [client(tokens=torch.zeros(4, dtype=torch.int64))],
            r"client 'client 1' has tokens of shape \(4,\)",
        ),
        ([client(tokens=torch.zeros(2, 4))], "dtype torch.float32"),
        ([client(tokens=[[1]], name="x")], "client 'x' has tokens of type list"),
        ([client(tokens=torch.zeros(0, 4, dtype=torch.int64))], "0 samples of 4 tokens"),
        (
            [client(), client(tokens=torch.tensor([[1, 2], [3, 7]]))],
            "client 'client 2' has token id 7 at position 1 of sample 1, outside the model's",
        ),
        ([client(tokens=torch.tensor([[-1, 2]]))], "token id -1 at position 0 of sample 0"),
        ([client(capacity=0.0)], r"capacity 0.0.*\(0, 1\]"),
        ([client(capacity=float("nan"))], "capacity nan"),
        ([client(capacity=1.5)], "capacity 1.5"),
        ([client(sparsity=1.0)], r"sparsity 1.0.*\[0, 1\)"),
        ([client(name="a"), client(name="b"), client(name="a")], "2 clients are named 'a'"),
    ],
)
def test_an_unsound_client_is_named_with_its_value(clients: list[Client], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_clients(clients, 7)


def test_pooling_keeps_every_token_of_every_client() -> None:
    first, second = client(tokens=torch.ones(1, 4, dtype=torch.int64)), client(capacity=0.1)
    pooled = pool([first, second])
    assert torch.equal(pooled.tokens, torch.cat([first.tokens, second.tokens]))
    assert (pooled.name, pooled.capacity, pooled.sparsity) == ("centralised", 1.0, None)
    with pytest.raises(ValueError, match="windows have 4 and 9 tokens"):
        pool([first, client(tokens=torch.zeros(1, 9, dtype=torch.int64))])
    with pytest.raises(ValueError, match="no clients"):
        pool([])
