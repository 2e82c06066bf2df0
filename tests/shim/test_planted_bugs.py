"""The tests of the kernels fail where a CUDA source is wrong: each bug is planted, and found."""

import shutil
import subprocess
import sys
from pathlib import Path

import build_shim
import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent

BUGS = {
    "a missing barrier in the transpose": ("hessian", "cuda.cu", "__syncthreads();", ""),
    "a tail that is one entry short": ("hessian", "cuda.cu", "&& to < size", "&& to + 1 < size"),
    "a missing barrier before the sweep": ("obs", "sweep.cuh", "__syncthreads();", ""),
    "a last byte that is one mask short": ("bitmask", "cuda.cu", "i < count;", "i + 1 < count;"),
}


def run_tests(family: str, source: Path, target: Path) -> subprocess.CompletedProcess:
    """Build the family from a source, and run the family's tests on it."""
    schemas = build_shim.KERNELS / "csrc" / "schemas.cpp"
    build_shim.build(target, [schemas, source / "cuda.cu"], torch_dir=TORCH)
    tests = [
        "-m",
        "pytest",
        "-q",
        "-x",
        f"tests/kernels/test_{family}.py",
        "-p",
        "no:cacheprovider",
    ]
    options = ["--places", "cpu-native", "--native-library", str(target)]
    command = [sys.executable, *tests, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def planted(request, tmp_path) -> Path:
    """A copy of a family's folder, with a bug in one file."""
    if not build_shim.find_compiler():
        pytest.skip("there is no C++ compiler")
    family, name, right, wrong = request.param
    folder = shutil.copytree(build_shim.KERNELS / family, tmp_path / family)
    text = (folder / name).read_text()
    assert right in text, f"{family}/{name} has changed: plant the bug anew"
    (folder / name).write_text(text.replace(right, wrong))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("planted", BUGS.values(), ids=BUGS, indirect=True)
def test_a_planted_bug_is_found(planted, tmp_path):
    run = run_tests(planted.name, planted, tmp_path / "planted.so")
    assert run.returncode == 1 and " failed" in run.stdout, run.stdout[-2000:] + run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({bug[0] for bug in BUGS.values()}))
def test_nothing_is_found_where_nothing_was_planted(family, tmp_path):
    if not build_shim.find_compiler():
        pytest.skip("there is no C++ compiler")
    run = run_tests(family, build_shim.KERNELS / family, tmp_path / "right.so")
    assert run.returncode == 0, run.stdout[-2000:]
