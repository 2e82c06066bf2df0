"""A client's own copy of the pruned checkpoint: complete under its name, or not there."""

from __future__ import annotations

import shutil

from fedspa.flower.node_config import Node
from fedspa.flower.site import Site
from fedspa.output import check_output, publish
from fedspa.streaming.disk import write_whole
from fedspa.streaming.federation import complete
from fedspa.streaming.folder import Folders
from fedspa.streaming.shards import OutputShards

FINISHED = "finished"


def is_written(node: Node, run_id: str) -> bool:
    """Whether this client's result of a run is there already, or need not be.

    run_id: "" for a run that has not begun
    raises: ValueError where its folder holds something else
    """
    if node.out is None:
        return True
    finished = node.work / FINISHED
    if run_id and node.out.exists() and finished.is_file() and finished.read_text() == run_id:
        return True
    check_output(node.out, source=node.model)
    return False


def write_result(site: Site, node: Node) -> None:
    """Write the pruned checkpoint; blocks that this client never drew are as they were.

    Raises OSError where the disk refuses.
    """
    assert node.out is not None
    out = node.out.absolute()
    # Of one name, so that nothing of a process that was ended stays behind.
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    site.blocks.output = OutputShards(
        site.source.checkpoint, partial, site.source.written, resume=False
    )
    try:
        complete(site.run, site.source, site.blocks, Folders(partial, site.folder))
    finally:
        site.blocks.output.close()
    publish(partial)
    # First: a result that is there counts only if it is this run's.
    write_whole(node.work / FINISHED, site.kept.run.encode())
    partial.rename(out)
