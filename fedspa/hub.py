"""Datasets by name. They need the package `datasets`, and a network or its filled cache.

The three sets are cut the way SparseGPT's and Wanda's published code cuts them, so that
perplexities compare.
"""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

Part = Literal["train", "test"]


@dataclass(frozen=True)
class NamedSet:
    """How one published set is loaded: its place, splits, column, and what joins its documents."""

    path: str
    column: str
    joiner: str
    train: dict[str, Any]
    test: dict[str, Any]
    limit: dict[Part, int] = field(default_factory=dict)


NAMED: dict[str, NamedSet] = {
    "wikitext2": NamedSet(
        path="Salesforce/wikitext",
        column="text",
        joiner="\n\n",
        train={"name": "wikitext-2-raw-v1", "split": "train"},
        test={"name": "wikitext-2-raw-v1", "split": "test"},
    ),
    # The set is a loading script, which datasets >= 4 refuses; this revision is its Parquet copy.
    "ptb": NamedSet(
        path="ptb-text-only/ptb_text_only",
        column="sentence",
        joiner=" ",
        train={"data_dir": "penn_treebank", "revision": "refs/convert/parquet", "split": "train"},
        test={"data_dir": "penn_treebank", "revision": "refs/convert/parquet", "split": "test"},
    ),
    # 1,100 validation documents joined by a space are what the papers evaluate on. For calibration
    # they draw from the whole shard (356,000 documents); its first 10,000 are thousands of windows.
    "c4": NamedSet(
        path="allenai/c4",
        column="text",
        joiner=" ",
        train={"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
        test={
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": "validation",
        },
        limit={"train": 10_000, "test": 1_100},
    ),
}


def named_text(name: str, part: Part) -> str:
    """Load "wikitext2", "ptb" or "c4": train to calibrate, test (c4: validation) to evaluate."""
    named = NAMED[name]
    where = named.train if part == "train" else named.test
    documents = _load(name, named.path, where)
    if part in named.limit:
        documents = documents.select(range(min(named.limit[part], len(documents))))
    return named.joiner.join(documents[named.column])


def hub_documents(source: str, column: str, part: Part) -> list[str]:
    """Load "owner/name[:config[:split]]"; without a split, the one named like the part."""
    path, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    where: dict[str, Any] = {"split": split or part}
    if config:
        where["name"] = config
    documents = _load(source, path, where)
    if column not in documents.column_names:
        raise ValueError(
            f'read_text: {source} has no column "{column}", only '
            f"{', '.join(documents.column_names)}; name the field"
        )
    texts = list(documents[column])
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f'read_text: column "{column}" of {source} is not text in every row; name another field'
        )
    return texts


def import_datasets(purpose: str) -> ModuleType:
    """Import `datasets`, or say how to get it."""
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(
            f"read_text: {purpose} the package datasets is needed; "
            "install it with pip install 'fedspa[data]'"
        ) from error
    return datasets


def _load(name: str, path: str, where: dict[str, Any]) -> Any:
    datasets = import_datasets(f"to load {name}")
    try:
        return datasets.load_dataset(path, **where)
    except ValueError as error:
        # A configuration or split that is not there: the message lists those that are.
        raise ValueError(f"read_text: {name}: {error}") from error
    except Exception as error:
        # Without a network the type depends on the transport (OSError, httpx errors, hub errors).
        raise RuntimeError(
            f"read_text: could not load {name} (tried {path} with {where} on the Hugging Face hub: "
            f"{error}); connect to a network, or give the path of a local file instead"
        ) from error
