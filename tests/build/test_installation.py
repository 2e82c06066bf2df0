"""setup.py on machines with less than it would like, and what ends up in an installation."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def setup_file():
    """setup.py as a module of its own: what it remembers is not left over from another test."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("fedspa_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    """A PATH with no program at all, and nothing in the environment that names a compiler."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources, to build in."""
    pytest.importorskip("setuptools")
    # Caches change while tests run beside these.
    skip = ".git .venv build dist tests .*_cache .hypothesis __pycache__".split()
    return shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(*skip))


def backend(tree: Path, hook: str, **environment: str) -> subprocess.CompletedProcess:
    """What pip runs with --no-build-isolation."""
    code = f"from setuptools import build_meta; build_meta.{hook}('.')"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, "CMAKE_ARGS": "-DCUDA=OFF", **environment},
        capture_output=True,
        text=True,
    )


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def stale_installation(folder: Path) -> Path:
    (folder / "libfedspa_native.so").write_text("of an earlier build")
    (folder / "_build.json").write_text('{"built": ["cpu"], "why_not": ""}')
    return folder


def test_without_a_compiler_python_alone_is_installed_and_said_aloud(
    setup_file, no_compiler, tmp_path, capsys
):
    package = stale_installation(tmp_path)
    setup_file.build_native(package)
    reason = "no C++ compiler was found when fedspa was installed"
    assert capsys.readouterr().out == f"fedspa: installing Python only; {reason}.\n"
    assert json.loads((package / "_build.json").read_text()) == {"built": [], "why_not": reason}
    assert not (package / "libfedspa_native.so").exists()
    assert not setup_file.NativeDistribution().has_ext_modules()


def test_a_compiler_that_cannot_make_a_library_counts_as_none(
    setup_file, no_compiler, tmp_path, monkeypatch
):
    program(tmp_path, "c++", "echo 'fatal error: bit: No such file or directory' >&2; exit 1")
    assert setup_file.why_python_only().endswith(
        "c++ made no C++20 shared library when fedspa was installed"
    )


def test_a_compiler_named_in_cxx_that_is_not_there_counts_as_none(setup_file, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++ -O1")
    assert setup_file.why_python_only() == "no C++ compiler was found when fedspa was installed"


def test_a_source_that_does_not_compile_ends_the_installation(setup_file, tree):
    if setup_file.why_python_only():
        pytest.skip(setup_file.why_python_only())
    package = stale_installation(tree / "kernels" / "fedspa_kernels")
    for source in package.glob("*/*.cpp"):
        source.write_text("")  # the others would be compiled beside it for half a minute
    (package / "bitmask" / "cpu.cpp").write_text("this is no C++\n")
    run = backend(tree, "build_editable")
    assert run.returncode != 0 and "cpu.cpp:1:1: error:" in run.stdout, run
    assert not (package / "libfedspa_native.so").exists()


def test_there_is_no_top_level_package_named_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    # From elsewhere: here `import kernels` would find the folder.
    code = """import importlib.util, fedspa_kernels
spec = importlib.util.find_spec("kernels")
print(spec and spec.origin)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    assert str(ROOT) not in run.stdout


def test_a_wheel_has_both_packages_and_no_third(tree):
    """Built with no compiler in sight: a wheel for every platform."""
    stale_installation(tree / "kernels" / "fedspa_kernels")
    run = backend(tree, "build_wheel", PATH="/nowhere", CXX="")
    assert run.returncode == 0, run.stderr
    assert "installing Python only; no C++ compiler was found" in run.stdout
    (wheel,) = tree.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True
    ).stdout.split()
    files = {name for name in names if "/" in name}
    tops = {name.split("/")[0] for name in files if ".dist-info/" not in name}
    assert tops == {"fedspa", "fedspa_kernels"}
    assert "fedspa_kernels/_build.json" in files
    assert "fedspa_kernels/bitmask/reference.py" in files
    assert not [name for name in files if name.endswith((".so", ".cpp"))]
    data = [path for path in (ROOT / "fedspa").rglob("*") if path.suffix in (".txt", ".html")]
    assert data and {path.relative_to(ROOT).as_posix() for path in data} <= files


KERNELS_ALONE = """import sys
sys.modules["fedspa"] = sys.modules["triton"] = None  # importing them would raise
import torch, fedspa_kernels
from fedspa_kernels import native
assert native.built() == ("cpu",) and sys.argv[1] in native.__file__, native.__file__
weight = torch.arange(-8.0, 8.0).view(2, 8)
pruned = fedspa_kernels.wanda_prune(weight, torch.ones(8), pattern="2:4", backend="native")
assert pruned.mask.view(-1, 4).sum(1).tolist() == [2] * 4
"""


@pytest.mark.slow
def test_a_wheel_from_the_source_archive_brings_kernels_that_run_alone(setup_file, tree, tmp_path):
    if setup_file.why_python_only():
        pytest.skip(setup_file.why_python_only())
    run = backend(tree, "build_sdist")
    assert run.returncode == 0, run.stderr
    (archive,) = tree.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    # Hardly optimised, which takes a minute less: what is built is tried on sixteen weights.
    lists = unpacked / "CMakeLists.txt"
    assert lists.read_text().count(":-O3 ") == 1
    lists.write_text(lists.read_text().replace(":-O3 ", ":-O1 "))
    run = backend(unpacked, "build_wheel")
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = unpacked.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    place = tmp_path / "installed"
    shutil.unpack_archive(wheel, place, format="zip")
    command = [sys.executable, "-c", KERNELS_ALONE, str(place)]
    environment = {**os.environ, "PYTHONPATH": str(place)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr


def test_ci_runs_make_test_and_nothing_else():
    script = ROOT / ".ci" / "run"
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and os.access(script, os.X_OK)
    (command,) = [line for line in lines if "make" in line]
    assert command == "exec make test PLACES=cpu-native,cpu-reference"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines), lines
    assert len(lines) == len({line.split("==")[0] for line in lines})
    return dict(line.split("==") for line in lines)


def required(names: set[str]) -> set[str]:
    """These packages and all that they need on this machine, as far as installed; names."""
    found, todo = set(), list(names)
    while todo:
        requirement = Requirement(todo.pop())
        name = normal(requirement.name)
        if name in found:
            continue
        found.add(name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        extras = [{"extra": extra} for extra in ("", *requirement.extras)]
        for text in needed:
            marker = Requirement(text).marker
            if marker is None or any(marker.evaluate(extra) for extra in extras):
                todo.append(text)
    return found


def test_every_dependency_is_pinned_exactly():
    extras = PROJECT["optional-dependencies"].values()
    wanted = {*PROJECT["dependencies"], *sum(extras, []), "setuptools", "cmake", "ninja"}
    assert {normal(Requirement(requirement).name) for requirement in wanted} <= pins().keys()
    # What is measured against is installed without what it asks for (Makefile, .venv/.peers).
    wanted -= set(PROJECT["optional-dependencies"]["bench"])
    if made_by_make():
        assert required(wanted) <= pins().keys()


def test_what_make_installed_has_the_pinned_version():
    if not made_by_make():
        pytest.skip("this is not the Python that make set up")
    pinned = pins()
    installed = {}
    for distribution in importlib.metadata.distributions(path=[sysconfig.get_path("purelib")]):
        name = normal(distribution.metadata["Name"])
        if name in pinned:
            installed[name] = distribution.version.split("+")[0]
    assert installed == {name: pinned[name] for name in installed}


def made_by_make() -> bool:
    return (ROOT / ".venv" / ".installed").exists() and Path(sys.prefix) == ROOT / ".venv"
