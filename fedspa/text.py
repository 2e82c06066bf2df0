"""Reads the text that clients calibrate and are evaluated on: files, and datasets by name."""

import json
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from fedspa.hub import NAMED, hub_documents, import_datasets, named_text

Part = Literal["train", "test"]

SAVED_DATASET = ("dataset_dict.json", "dataset_info.json", "state.json")
NOT_PROSE = {
    ".json": "give one object a line as .jsonl",
    ".csv": "convert it to .jsonl or .parquet",
    ".gz": "unpack it first",
    ".zip": "unpack it first",
}


def read_text(source: str | Path, *, field: str = "text", part: Part = "train") -> str:
    """Read the text of one source, its documents joined by a blank line.

    source:  a text file (UTF-8), JSON lines (.jsonl, .ndjson), Parquet (.parquet), a folder of such
             files or one that `datasets` saved; or by name "wikitext2", "ptb" (joined by spaces),
             "c4" (likewise), or "owner/name[:config[:split]]" on the Hugging Face hub. Names need a
             network or a filled cache. "./c4" is a file, "c4" the dataset.
    field:   the column or key that holds the text, where documents have several
    part:    "train" to calibrate, "test" to evaluate, of a dataset with splits; a file has no parts
    raises:  ValueError where the source is missing, is not text or holds none; RuntimeError where a
             package or a network that it needs is not there
    """
    if part not in get_args(Part):
        raise ValueError(f'read_text: part is "{part}"; it is "train" or "test"')
    if isinstance(source, str) and source in NAMED:
        text = named_text(source, part)
    elif Path(source).exists():
        text = "\n\n".join(_local_documents(Path(source), field, part))
    elif isinstance(source, str) and _names_a_hub_dataset(source):
        text = "\n\n".join(hub_documents(source, field, part))
    else:
        raise ValueError(_missing(Path(source)))
    if not text.strip():
        raise ValueError(f"read_text: {source} has no text; it is empty or only white space")
    return text


def _local_documents(path: Path, field: str, part: Part) -> list[str]:
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED_DATASET):
            return _saved_dataset(path, field, part)
        return _folder(path, field)
    reason = NOT_PROSE.get(path.suffix.lower())
    if reason:
        raise ValueError(f"read_text: {path} is not a format that is read as prose; {reason}")
    return READERS.get(path.suffix.lower(), _plain)(path, field)


def _folder(path: Path, field: str) -> list[str]:
    known = {".txt", ".md", *READERS}
    members = [member for member in sorted(path.iterdir()) if member.suffix.lower() in known]
    if not members:
        raise ValueError(
            f"read_text: the folder {path} holds no {_listed(known)} file and no saved dataset; "
            "give a file, or a folder written by save_to_disk"
        )
    return [
        document
        for member in members
        for document in READERS.get(member.suffix.lower(), _plain)(member, field)
    ]


def _plain(path: Path, field: str) -> list[str]:
    return [_decoded(path)]


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"read_text: {path} is not UTF-8: byte {content[error.start]:#04x} at offset "
            f"{error.start}; convert it to UTF-8"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _json_lines(path: Path, field: str) -> list[str]:
    documents = []
    # Not splitlines: a JSON string may hold U+2028, which is no end of a line here.
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"read_text: {path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}); write one object a line") from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{where} is not an object but {type(record).__name__}; write {{{field!r}: ...}}"
            )
        if field not in record:
            raise ValueError(
                f'{where} has no field "{field}", only {_listed(record)}; name the field'
            )
        if not isinstance(record[field], str):
            raise ValueError(
                f'{where}: field "{field}" is {type(record[field]).__name__}, not text; '
                "name another field"
            )
        documents.append(record[field])
    return documents


def _parquet(path: Path, field: str) -> list[str]:
    # pyarrow comes with `datasets`, whose load_dataset would leave private text in its cache.
    import_datasets(f"to read {path}")
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(path)
        columns = parquet.schema_arrow.names
        if field in columns:
            return _texts(parquet.read(columns=[field]).column(0).to_pylist(), path, field)
    except pyarrow.ArrowException as error:
        raise ValueError(f"read_text: {path} is not readable as Parquet: {error}") from error
    raise ValueError(
        f'read_text: {path} has no column "{field}", only {_listed(columns)}; name the field'
    )


def _saved_dataset(path: Path, field: str, part: Part) -> list[str]:
    datasets = import_datasets(f"to read the saved dataset {path}")
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if part not in saved:
            raise ValueError(f'read_text: {path} has no split "{part}", only {_listed(saved)}')
        saved = saved[part]
    if field not in saved.column_names:
        raise ValueError(
            f'read_text: {path} has no column "{field}", only {_listed(saved.column_names)}; '
            "name the field"
        )
    return _texts(saved[field], path, field)


def _texts(values: Iterable[Any], path: Path, field: str) -> list[str]:
    documents = list(values)
    for row, value in enumerate(documents):
        if not isinstance(value, str):
            raise ValueError(
                f'read_text: {path}, row {row}: column "{field}" is {type(value).__name__}, '
                "not text; name another field"
            )
    return documents


def _names_a_hub_dataset(source: str) -> bool:
    """owner/name[:config[:split]], unless it has a file's suffix or its owner is a folder here."""
    name = source.split(":", 1)[0]
    path = Path(name)
    suffixes = {".txt", ".md", *READERS, *NOT_PROSE}
    return (
        name.count("/") == 1
        and all(name.split("/"))
        and not name.startswith((".", "~"))
        and path.suffix.lower() not in suffixes
        and not path.parent.is_dir()
    )


def _missing(path: Path) -> str:
    folder = path.parent
    sentence = f"read_text: there is no file {path}"
    way_out = f"give a path, {_listed(NAMED)}, or owner/name on the hub"
    if not folder.is_dir():
        return f"{sentence}, nor a folder {folder}; {way_out}"
    near = get_close_matches(path.name, [member.name for member in folder.iterdir()], n=3)
    near += get_close_matches(path.name, NAMED, n=1)
    if near:
        return f"{sentence}; did you mean {' or '.join(near)}?"
    return f"{sentence}; {way_out}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


READERS: dict[str, Callable[[Path, str], list[str]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}
