"""The texts of an experiment file: where they are, and what they are read as."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast, get_args

from fedspa.data import read_text
from fedspa.domains import DOMAINS, Half, domain_text
from fedspa.experiments.cases import Text
from fedspa.hub import NAMED
from fedspa.text import SAVED_DATASET

SHIPPED = "shipped:"
PARTS: dict[str, Literal["train", "test"]] = {"calibration": "train", "heldout": "test"}


def resolve_text(where: str, source: Any, part: str, folder: Path, *, both: bool) -> Text:
    """The text that an experiment file means by a source.

    where: how to call it in an error. part: "calibration" or "heldout".
    folder: the file's, from which relative paths start.
    both: whether the source serves both parts, which a plain file cannot.
    raises: ValueError for a source that cannot be one.
    """
    if isinstance(source, dict):
        if part not in source:
            raise ValueError(f"{where}: {source} has no {part!r}; name its {part} text as well")
        return resolve_text(f"{where}, {part}", source[part], part, folder, both=False)
    if not isinstance(source, str) or not source:
        raise ValueError(
            f'{where} is {source!r}; give a source such as "{SHIPPED}{DOMAINS[0]}" or "c4", or '
            f'{{calibration = "a.txt", heldout = "b.txt"}}'
        )
    if source.startswith(SHIPPED):
        if source.removeprefix(SHIPPED) not in DOMAINS:
            raise ValueError(
                f"{where}: {source!r} is not shipped; choose one of "
                f"{[SHIPPED + name for name in DOMAINS]}"
            )
        return Text(source, part)
    path = folder / Path(source).expanduser()
    if source in NAMED or not path.exists():
        # A dataset's name, or a path whose absence its cases will tell.
        return Text(source, part)
    if both and not any((path / name).is_file() for name in SAVED_DATASET):
        raise ValueError(
            f"{where}: {source} has no held-out part of its own; name another text to judge by: "
            f'{{calibration = "{source}", heldout = "OTHER"}}'
        )
    return Text(str(path.absolute()), part)


def read_source(text: Text) -> str:
    """Read a text; raises ValueError and RuntimeError as `fedspa.data.read_text`."""
    if text.source.startswith(SHIPPED):
        assert text.part in get_args(Half)
        return domain_text(text.source.removeprefix(SHIPPED), cast(Half, text.part))
    return read_text(text.source, part=PARTS[text.part])
