"""The native library: what was built is what loads, and what it refuses past the doors."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedspa_kernels import native

needs_library = pytest.mark.skipif(not native.built(), reason=native.why_not())


def random_mask(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) < 0.5


def in_a_copy(folder: Path, code: str) -> subprocess.CompletedProcess:
    """Run code where native.py stands alone in `folder`, with the record that is there."""
    source = Path(native.__file__).read_text()
    (folder / "native.py").write_text(source)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def test_what_is_recorded_is_what_is_there():
    assert native.LIBRARY.is_file() == bool(native.built())
    if native.RECORD.is_file():
        record = json.loads(native.RECORD.read_text())
        assert native.built() == tuple(record["built"])
        assert native.why_not() == record["why_not"]
    else:
        assert native.built() == ()
    # A backend is missing for a reason.
    assert native.why_not() or native.built() == ("cpu", "cuda")


def test_load_says_whether_there_is_a_library_and_can_be_called_again():
    assert native.load() == bool(native.built())
    assert native.load() == bool(native.built())


def schemas() -> list[str]:
    """The names of all operators that csrc/schemas.cpp defines."""
    source = Path(native.__file__).with_name("csrc") / "schemas.cpp"
    return re.findall(r'"(\w+)\(Tensor', source.read_text())


@needs_library
@pytest.mark.parametrize("device", native.built())
def test_every_operator_is_there_for_every_device_that_was_built(device):
    native.load()
    assert len(schemas()) > 10
    for name in schemas():
        operator = f"fedspa_native::{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, device.upper()), operator


@needs_library
def test_what_files_share_has_no_wide_instructions():
    """Inline functions of the standard library are shared: a wide one would end an old machine."""
    if not (shutil.which("nm") and shutil.which("objdump")):
        pytest.skip("nm and objdump are not installed")
    names = subprocess.run(["nm", native.LIBRARY], capture_output=True, text=True, check=True)
    shared = {line.split()[-1] for line in names.stdout.splitlines() if " W " in line}
    assert shared, "no function is shared: this test looks at the wrong thing"
    command = ["objdump", "-d", "--no-show-raw-insn", native.LIBRARY]
    functions = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wide = {
        function.partition(">:")[0].partition("<")[2]
        for function in functions.split("\n\n")
        if re.search(r"%[yz]mm", function)
    }
    assert wide, "nothing is vectorised: this test looks at the wrong thing"
    assert not wide & shared


@needs_library
@pytest.mark.parametrize("shape", [(1, 300_001), (701, 423), (262_147,)], ids=str)
def test_work_shared_by_threads_is_the_same_work(shape):
    native.load()
    mask = random_mask(*shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(2, threads))
        bits = native.KERNELS.pack_mask(mask)
        restored = native.KERNELS.unpack_mask(bits, shape[-1])
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(bits.numpy(), np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    assert torch.equal(restored, mask)


def wrong_calls():
    """Calls that would read or write memory that is not theirs, if they were believed."""
    weight, mask = torch.ones(4, 8), random_mask(4, 8)
    bits, offsets = torch.zeros(4, 1, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    norms, votes = torch.ones(8), torch.ones(4, 8, dtype=torch.int32)
    squares, dead, failed = torch.ones(1, 8, 8), torch.zeros(1, 8, dtype=torch.bool), votes[0, :1]
    wide, damp = torch.ones(1, 129, 129), norms[:1]
    return {
        "pack_mask of floats": ("pack_mask", weight),
        "pack_mask of a view": ("pack_mask", random_mask(16, 16).T),
        "unpack_mask of too few bytes": ("unpack_mask", bits, 9),
        "unpack_mask of -1": ("unpack_mask", bits, -1),
        "smallest_mask of a vector": ("smallest_mask", norms, 1),
        "smallest_mask of too many": ("smallest_mask", weight, 9),
        "smallest_mask of float64": ("smallest_mask", weight.double(), 1),
        "wanda_scores with few norms": ("wanda_scores", weight, norms[:3]),
        "wanda_prune with few norms": ("wanda_prune", weight, norms[:3], False, 8, 1),
        "wanda_prune with norms of columns": ("wanda_prune", weight, norms, True, 8, 1),
        "wanda_prune in odd groups": ("wanda_prune", weight, norms, False, 5, 1),
        "expand_mask with few scores": ("expand_mask", votes, weight[:2], 3, 8, 1),
        "expand_mask in odd groups": ("expand_mask", votes, None, 3, 5, 1),
        "l0_average of two shapes": ("l0_average", [weight, weight[:2]], []),
        "l0_average with one mask": ("l0_average", [weight, weight], [mask]),
        "l0_add_ with a small total": ("l0_add_", norms, votes, None, weight, None, 1.0),
        "count_kept of a wider row": ("count_kept", bits, 100, 8),
        "compress_values with few offsets": (
            "compress_values", weight, bits, offsets[:2], 0, 8
        ),
        "decompress_values with few offsets": (
            "decompress_values", bits, norms, offsets[:2], 8, 8
        ),
        "mirror_upper_ of a rectangle": ("mirror_upper_", weight[None]),
        "add_products_ into a rectangle": ("add_products_", weight, weight),
        "multiply_ of other depths": (
            "multiply_", squares, squares, squares[:, :7], None, False, 0
        ),
        "multiply_ into less": ("multiply_", squares[:, :7], squares, squares, None, False, 0),
        "multiply_ into columns": ("multiply_", squares.mT, squares, squares, None, False, 0),
        "multiply_ with less": (
            "multiply_", squares, squares, squares, squares[:, :7], False, 0
        ),
        "factor_block_ wider than its memory": (
            "factor_block_", wide, damp, dead, wide, wide, failed
        ),
        "factor_block_ into less": (
            "factor_block_", squares, damp, dead, squares[:, :7], squares, failed
        ),
        "factor_block_ with few flags": (
            "factor_block_", squares, damp, dead[:, :7], squares, squares, failed
        ),
    }  # fmt: skip


@needs_library
@pytest.mark.parametrize("call", wrong_calls())
def test_what_would_reach_foreign_memory_is_refused(call):
    name, *arguments = wrong_calls()[call]
    with pytest.raises(RuntimeError, match=name.rstrip("_")):
        getattr(native.KERNELS, name)(*arguments)


def test_a_tree_that_was_never_installed_has_no_library_and_says_why(tmp_path):
    code = "import native; print(native.load(), native.built(), native.why_not())"
    run = in_a_copy(tmp_path, code)
    assert run.stdout.strip() == "False () fedspa was not installed (`make build` does it)", run


def test_a_library_that_does_not_load_is_an_error_with_a_way_out(tmp_path):
    record = {"built": ["cpu"], "why_not": "", "torch": "2.99.0"}
    (tmp_path / "_build.json").write_text(json.dumps(record))
    (tmp_path / "libfedspa_native.so").write_bytes(b"not a library")
    run = in_a_copy(tmp_path, "import native; native.load()")
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: fedspa_kernels: ") and "built with torch 2.99.0" in last
    assert "rebuild it with `pip install" in last
