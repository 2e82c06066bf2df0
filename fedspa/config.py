"""What the command line reads besides flags: a TOML file, and text sources by name."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from fedspa.data import Client, read_text, sample_windows, tokenize, windows
from fedspa.loading import Loaded, need_tokenizer
from fedspa.streaming.architecture import Source

TABLES = "fedspa.client_tables"
# What the values of a [[client]] table must be.
KINDS: dict[str, Any] = {
    "name": str,
    "text": str,
    "capacity": int | float,
    "sparsity": int | float,
    "samples": int,
    "seqlen": int,
}


@dataclass(frozen=True)
class ClientSpec:
    """A client as the command line describes it; None stands for the run's own value."""

    name: str
    text: str
    capacity: float = 1.0
    sparsity: float | None = None
    samples: int | None = None
    seqlen: int | None = None

    def read(self, field: str) -> str:
        """Its text."""
        try:
            return read_text(self.text, field=field)
        except ValueError as error:
            raise ValueError(f"client {self.name!r}: {error}") from error

    def client(self, loaded: Loaded | Source, text: str, seed: int) -> Client:
        """Its calibration windows, drawn from its text with the seed."""
        assert self.samples is not None and self.seqlen is not None
        try:
            tokens = tokenize(need_tokenizer(loaded), text)
            drawn = sample_windows(tokens, self.samples, self.seqlen, seed)
        except ValueError as error:
            raise ValueError(f"client {self.name!r}: {error}") from error
        if len(drawn) < self.samples:
            click.echo(
                f"client {self.name!r} has {len(drawn)} windows of {self.seqlen} tokens, fewer "
                f"than the {self.samples} samples asked for; all of them are used",
                err=True,
            )
        return Client(drawn, self.capacity, self.name, self.sparsity)


def read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make a TOML file's keys the command's defaults; a click callback.

    Raises ValueError where the file is missing or wrong, or a key is unknown.
    """
    if path is None:
        return
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"config: there is no file {path}") from error
    except OSError as error:
        raise ValueError(f"config: {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} is not TOML: {error}") from error
    names = {
        option.removeprefix("--").replace("-", "_"): parameter.name
        for parameter in ctx.command.params
        for option in (*parameter.opts, parameter.name or "")
    }
    del names["config"]
    defaults: dict[str, Any] = {}
    for key, value in table.items():
        known = known_key(f"config: {path}", key.replace("-", "_"), names)
        if known == "client":
            _read_clients(ctx, path, value, defaults)
        else:
            defaults[names[known]] = value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _read_clients(ctx: click.Context, path: Path, value: Any, defaults: dict[str, Any]) -> None:
    """Take "client" as flags would give it, or as [[client]] tables."""
    items = value if isinstance(value, list) else []
    if items and all(isinstance(item, dict) for item in items):
        ctx.meta[TABLES] = _client_tables(path, items)
    elif items and all(isinstance(item, str) for item in items):
        defaults["client"] = items
    else:
        raise ValueError(
            f"config: {path}: client must be tables headed [[client]], with two brackets, or a "
            f'list such as ["a=a.txt", "b=b.txt"]'
        )


def client_specs(
    flags: Sequence[str], ctx: click.Context, options: Mapping[str, Any]
) -> list[ClientSpec]:
    """The clients of the flags, else of the [[client]] tables, complete with the run's values."""
    tables: list[ClientSpec] = ctx.meta.get(TABLES, [])
    if flags and tables:
        raise ValueError(
            f"prune: there are clients in --client ({len(flags)}) and in the [[client]] tables "
            f"({len(tables)}); name all of them in one place"
        )
    specs = tables or [ClientSpec(*_split("--client", flag)) for flag in flags]
    if not specs:
        raise ValueError(
            "prune: there are no clients; give --client NAME=FILE once for each, or [[client]] "
            "tables in --config"
        )
    return [_complete(spec, options) for spec in specs]


def read_named(flags: Sequence[str], field: str) -> dict[str, str]:
    """The evaluation texts of flags NAME=SOURCE, or of a source alone, which names itself."""
    named = [_split("--text", flag, default=Path(flag).stem) for flag in flags]
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two texts are named {twice[0]!r}; name them apart, as in NAME=SOURCE")
    return {name: read_text(source, field=field, part="test") for name, source in named}


def cut(
    loaded: Loaded | Source, texts: Mapping[str, str], seqlen: int, limit: int | None
) -> dict[str, Tensor]:
    """The evaluation windows of every text, (windows, seqlen), at most `limit` of each."""
    return {
        name: windows(tokenize(need_tokenizer(loaded), text), seqlen)[:limit]
        for name, text in texts.items()
    }


def _split(flag: str, value: str, default: str | None = None) -> tuple[str, str]:
    name, equals, source = value.partition("=")
    if not equals and default is not None:
        return default, value
    if not (name and source):
        raise ValueError(f"{flag} {value!r} is not NAME=SOURCE, such as {flag} hospital=notes.txt")
    return name, source


def _complete(spec: ClientSpec, options: Mapping[str, Any]) -> ClientSpec:
    return replace(
        spec,
        samples=options["samples"] if spec.samples is None else spec.samples,
        seqlen=options["seqlen"] if spec.seqlen is None else spec.seqlen,
    )


def _client_tables(path: Path, tables: Sequence[dict[str, Any]]) -> list[ClientSpec]:
    names = {f.name: f.name for f in fields(ClientSpec)}
    specs = []
    for number, table in enumerate(tables, start=1):
        for key in table:
            known_key(f"config: {path}, client {number}", key, names)
        missing = [name for name in ("name", "text") if name not in table]
        if missing:
            raise ValueError(f"config: {path}, client {number} has no {' and no '.join(missing)}")
        for key, kind in KINDS.items():
            if key in table and (not isinstance(table[key], kind) or table[key] is True):
                raise ValueError(
                    f"config: {path}, client {number}: {key} is {table[key]!r}; "
                    f"give {'a text' if kind is str else 'a number'}"
                )
        specs.append(ClientSpec(**table))
    return specs


def known_key(where: str, key: str, names: Mapping[str, Any]) -> str:
    """The key, or ValueError with the one that may be meant; `where` is the sentence's subject."""
    if key in names:
        return key
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {sorted(names)}"
    raise ValueError(f"{where} has the unknown key {key!r}; {hint}")
