"""Where hidden states are kept between two blocks."""

from __future__ import annotations

import torch

PLACEMENTS = ("gpu", "host", "disk")
# The share of what is free that hidden states may take where nobody asked for the place. Batches in
# flight, the fragments of an allocator and other programs share the rest; what the system could
# not write back or swap in main memory ends the run without a word.
SHARE = {"gpu": 0.8, "host": 0.6}
# A generation and the one before it, which stays until a state that names the new one is committed.
FILES = 2
WHERE = {"gpu": "GPU memory", "host": "main memory", "disk": "space on the output's disk"}


def choose_placement(
    wanted: str,
    nbytes: int,
    device: torch.device | str,
    gpu_free: int,
    host_free: int,
    disk_free: int | None = None,
) -> str:
    """Take the place that was asked for, or choose one where hidden states fit.

    "auto" takes the GPU's memory where they fit into 80 % of what is free there, else main memory
    where they fit into 60 %, else the disk. The result of a run does not depend on it.

    wanted:    "auto", "gpu", "host" or "disk"
    nbytes:    of the hidden states of all clients that this process walks
    device:    where blocks are computed
    gpu_free:  bytes there beside what one block needs with its statistics; of no meaning on a CPU
    host_free: bytes of main memory beside what the rest of the run needs; for a GPU the caller
               counts that pinned memory comes in powers of two bytes a batch
    disk_free: bytes where the files would be; None: not known, and then not asked about
    returns:   "gpu", "host" or "disk"
    raises:    ValueError for an unknown place and for "gpu" on a CPU, RuntimeError where they do
               not fit
    """
    if wanted not in ("auto", *PLACEMENTS):
        raise ValueError(
            f"activations: {wanted!r} is unknown; choose one of {['auto', *PLACEMENTS]}"
        )
    device = torch.device(device)
    if wanted == "gpu" and device.type == "cpu":
        raise ValueError(
            "activations: 'gpu' was asked for, but the blocks are computed on the CPU; choose "
            "'auto', 'host' or 'disk', or a device such as 'cuda'"
        )
    gpu = None if device.type == "cpu" else gpu_free
    need = {"gpu": nbytes, "host": nbytes, "disk": FILES * nbytes}
    free = {"gpu": gpu, "host": host_free, "disk": disk_free}
    if wanted == "auto":
        for place, share in SHARE.items():
            there = free[place]
            if there is not None and nbytes <= share * there:
                return place
    place = "disk" if wanted == "auto" else wanted
    there = free[place]
    if there is not None and need[place] > there:
        raise RuntimeError(_too_little(place, need, free, wanted))
    return place


def _too_little(place: str, need: dict[str, int], free: dict[str, int | None], wanted: str) -> str:
    there = free[place] or 0
    tried = ""
    if wanted == "auto":
        main = free["host"] or 0
        tried = f" They do not fit into main memory either, of which {main / 1e9:.2f} GB are free."
    return (
        f"activations: the hidden states need {need[place] / 1e9:.2f} GB of {WHERE[place]}, but "
        f"{there / 1e9:.2f} GB are free.{tried} "
        f"Calibrate with fewer samples or a smaller seqlen, "
        + ("or free some space" if place == "disk" else "or use --activations auto")
    )
