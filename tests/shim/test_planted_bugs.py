"""The tests of the kernels fail where a CUDA source is wrong: each bug is planted, and found."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import build_shim
import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent


class Bug(NamedTuple):
    """The tests of a family find that in a file `right`, which is there once, became `wrong`."""

    family: str
    file: str
    right: str
    wrong: str


BUGS = {
    "a missing barrier in the transpose": Bug("hessian", "hessian/cuda.cu", "__syncthreads();", ""),
    "a tail that is one row short": Bug(
        "hessian", "hessian/cuda.cu", "from < to && to < size", "from < to && to + 1 < size"
    ),
    "a missing barrier before the sweep": Bug("obs", "obs/sweep.cuh", "__syncthreads();", ""),
    "a last byte that is one mask short": Bug(
        "bitmask",
        "bitmask/pack.cuh",
        "for (int i = 0; i < count; ++i) {\n        value",
        "for (int i = 0; i + 1 < count; ++i) {\n        value",
    ),
    "a missing barrier before the sums of the warps are read": Bug(
        "selection",
        "csrc/radix.cuh",
        "workspace.warps[warp] = sum;\n  }\n  __syncthreads();",
        "workspace.warps[warp] = sum;\n  }",
    ),
    "a last group that is one entry short": Bug(
        "wanda", "csrc/groups.cuh", "index < groups * of", "index + 1 < groups * of"
    ),
    "ties that are forgotten from tile to tile": Bug(
        "expansion", "csrc/large_groups.cuh", "before < room ? room - before : 0", "room"
    ),
    "one index for all clients": Bug("l0", "l0/average.cuh", " + client % 2;", ";"),
    "a tail that is one weight short": Bug("l0", "l0/average.cuh", "single < n", "single + 1 < n"),
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    """What the sources and the shim are compiled into, as they are, by the sources' folders."""
    if not build_shim.find_compiler():
        pytest.skip("there is no C++ compiler")
    sources = [*build_shim.cuda_sources(), *sorted(build_shim.HERE.glob("*.cpp"))]
    folder = tmp_path_factory.mktemp("objects")
    made = build_shim.compile_all(folder, sources, torch_dir=TORCH)
    return {
        f"{source.parent.name}/{source.name}": o for source, o in zip(sources, made, strict=True)
    }


def run_tests(families: set[str], objects: dict[str, Path], library: Path):
    """Link the objects, and run the families' tests on that library."""
    build_shim.link(library, list(objects.values()), torch_dir=TORCH)
    tests = [f"tests/kernels/test_{name}.py" for name in (*sorted(families), "many_warps")]
    options = ["--places", "cpu-native", "--native-library", str(library)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *tests, *options], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_found(bug, objects, tmp_path):
    kernels = tmp_path / "kernels"
    shutil.copytree(build_shim.KERNELS, kernels, ignore=shutil.ignore_patterns("*.py", "*.so"))
    text = (kernels / bug.file).read_text()
    assert text.count(bug.right) == 1, f"{bug.file} has changed: plant the bug anew"
    (kernels / bug.file).write_text(text.replace(bug.right, bug.wrong))
    source = kernels / bug.family / "cuda.cu"
    [wrong] = build_shim.compile_all(tmp_path, [source], torch_dir=TORCH, kernels=kernels)
    planted = {**objects, f"{bug.family}/cuda.cu": wrong}
    run = run_tests({bug.family}, planted, tmp_path / "planted.so")
    assert run.returncode == 1 and " failed" in run.stdout, run.stdout[-2000:] + run.stderr[-2000:]


@pytest.mark.slow
def test_nothing_is_found_where_nothing_was_planted(objects, tmp_path):
    """For one family of each kind of bug; all families pass in `make test-cuda-on-cpu`."""
    run = run_tests({"bitmask", "hessian"}, objects, tmp_path / "right.so")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
