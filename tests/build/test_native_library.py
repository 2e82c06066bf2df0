"""The native library: what was built is what loads, and its two operators agree with numpy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedspa_kernels import native

SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 1000]
LEADING = [(), (1,), (3,), (2, 5), (0,), (4, 0, 2)]

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


@needs_library
def test_the_operators_are_registered_for_the_cpu():
    native.load()
    for name in ("pack_mask", "unpack_mask"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fedspa_native::{name}", "CPU")


@needs_library
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_pack_and_unpack_agree_with_numpy(n, leading):
    native.load()
    mask = random_mask(*leading, n)
    bits = torch.ops.fedspa_native.pack_mask(mask)
    expected = np.packbits(mask.numpy(), axis=-1, bitorder="little")
    assert bits.dtype == torch.uint8 and tuple(bits.shape) == expected.shape
    assert np.array_equal(bits.numpy(), expected)
    restored = torch.ops.fedspa_native.unpack_mask(bits, n)
    # As bytes: a bool that is neither 0 nor 1 would compare equal, and go wrong later.
    assert restored.dtype == torch.bool and restored.shape == mask.shape
    assert torch.equal(restored.view(torch.uint8), mask.view(torch.uint8))


@needs_library
@pytest.mark.parametrize("shape", [(1, 300_001), (701, 423), (262_147,)], ids=str)
def test_work_shared_by_threads_is_the_same_work(shape):
    native.load()
    mask = random_mask(*shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(2, threads))
        bits = torch.ops.fedspa_native.pack_mask(mask)
        restored = torch.ops.fedspa_native.unpack_mask(bits, shape[-1])
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(bits.numpy(), np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    assert torch.equal(restored, mask)


@needs_library
def test_what_would_read_foreign_memory_is_refused():
    native.load()
    pack, unpack = torch.ops.fedspa_native.pack_mask, torch.ops.fedspa_native.unpack_mask
    with pytest.raises(RuntimeError, match="contiguous bool tensor"):
        pack(torch.zeros(8))
    with pytest.raises(RuntimeError, match="contiguous bool tensor"):
        pack(random_mask(16, 16).T)
    with pytest.raises(RuntimeError, match="9 elements need 2 bytes .* there are 1"):
        unpack(torch.zeros(3, 1, dtype=torch.uint8), 9)
    with pytest.raises(RuntimeError, match="-1 elements"):
        unpack(torch.zeros(0, dtype=torch.uint8), -1)


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
