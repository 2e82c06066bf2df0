"""Several safetensors files brought into one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedspa.streaming.disk import PARTIAL, named, reserve, sync_folder
from fedspa.streaming.header import lay_out, read_header
from fedspa.streaming.pieces import read_pieces, write_pieces


def merge(parts: Sequence[Path], out: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Bring the tensors of several safetensors files into one, a few MiB at a time.

    metadata: added to that of the parts; of two values for one key the later counts

    Raises ValueError where a part is damaged or two hold a tensor of the same name; OSError where
    the disk refuses. There is no file `out` before it is whole.
    """
    shards = [(Path(part), read_header(Path(part))) for part in parts]
    owners: dict[str, Path] = {}
    for part, shard in shards:
        for name in shard.tensors:
            if name in owners:
                raise ValueError(
                    f"{owners[name]} and {part} both hold {name}; keep it in one of them"
                )
            owners[name] = part
    texts = {key: text for _, shard in shards for key, text in shard.metadata.items()}
    # Sorted, since safetensors writes metadata in another order in each process.
    texts = dict(sorted((texts | dict(metadata or {})).items()))
    stored = [(n, at.dtype, at.shape) for _, shard in shards for n, at in shard.tensors.items()]
    head, layout = lay_out(out.name, stored, texts)
    partial = out.with_name(out.name + PARTIAL)
    file = reserve(partial, head, layout.nbytes)
    try:
        for part, shard in shards:
            for name, at in shard.tensors.items():
                write_pieces(partial, file, layout.tensors[name], read_pieces(part, at))
        with named(partial):
            os.fsync(file)
    except BaseException:
        partial.unlink()
        raise
    finally:
        os.close(file)
    partial.rename(out)
    sync_folder(out.parent)
