"""Builds the native library with CMake.

What is static stands in pyproject.toml, and the list of sources and flags in CMakeLists.txt.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PACKAGE = "fedspa_kernels"
LIBRARY = "libfedspa_native.so"
RECORD = "_build.json"
MINIMUM_TORCH = (2, 10)  # the first with the whole of the stable ABI that the sources use

# What every native source asks of the compiler and the linker, without torch.
PROBE = '#include <bit>\nextern "C" int probe() { return std::has_single_bit(4u); }\n'


def find_tool(name: str) -> str | None:
    """Where a program is: beside the Python that builds (a wheel brought it), or else on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=path)


def find_compiler() -> list[str] | None:
    """The C++ compiler that CMake would take: $CXX, or else the first one on PATH."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        return command if shutil.which(command[0]) else None
    found = [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))]
    return found[:1] or None


def compiles(compiler: list[str]) -> bool:
    """Whether the compiler makes a C++20 shared library; its headers or linker may be missing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        command = [*compiler, "-std=c++20", "-fPIC", "-shared", str(source), "-o", f"{source}.so"]
        return subprocess.run(command, capture_output=True).returncode == 0


@functools.cache
def why_python_only() -> str:
    """The reason why the native library cannot be built on this machine, or "" where it can."""
    if not sys.platform.startswith("linux"):
        return f"the native library is built on Linux only, and this is {sys.platform}"
    if importlib.util.find_spec("torch") is None:
        return (
            "torch was not seen when fedspa was installed: install torch first, and then fedspa "
            "with --no-build-isolation"
        )
    torch_version = importlib.metadata.version("torch")
    if tuple(int(part) for part in torch_version.split(".")[:2]) < MINIMUM_TORCH:
        return f"torch {torch_version} was found, and the native library needs 2.10 or later"
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler was found when fedspa was installed"
    if not compiles(compiler):
        return f"{shlex.join(compiler)} made no C++20 shared library when fedspa was installed"
    if find_tool("cmake") is None:
        return "cmake was not found when fedspa was installed"
    if find_tool("ninja") is None and find_tool("make") is None:
        return "neither ninja nor make was found when fedspa was installed"
    return ""


def compile_library(work: Path) -> dict:
    """Runs CMake in `work`, where unchanged object files are used again; returns what it built.

    A source that does not compile ends the installation: every tool is there, so the fault is ours.
    """
    torch_dir = Path(importlib.util.find_spec("torch").origin).parent
    torch_version = importlib.metadata.version("torch")
    ninja = find_tool("ninja")
    cmake = find_tool("cmake")
    configure = [cmake, "-S", str(ROOT), "-B", str(work), f"-DTORCH_DIR={torch_dir}"]
    configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    environment = {"CXX": shlex.join(find_compiler()), **os.environ}

    # CMake's cache does not survive another tool, torch or place: what was missing stays missing.
    tools = json.dumps([configure, environment["CXX"], find_tool("nvcc"), torch_version])
    key = work / "tools.json"
    if not key.is_file() or key.read_text() != tools:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    subprocess.run(configure, check=True, env=environment)
    key.write_text(tools)
    subprocess.run([cmake, "--build", str(work), "--parallel"], check=True, env=environment)
    return {**json.loads((work / "built.json").read_text()), "torch": torch_version}


def build_native(package: Path) -> None:
    """Puts the library and a record of the build into `package`, or the record alone."""
    # The old ones go first: no library may outlive a later build that is skipped or that fails.
    for name in (LIBRARY, RECORD):
        (package / name).unlink(missing_ok=True)
    reason = why_python_only()
    if reason:
        record = {"built": [], "why_not": reason}
        print(f"fedspa: installing Python only; {reason}.", flush=True)
    else:
        work = ROOT / "build" / "native"
        record = compile_library(work)
        shutil.copy2(work / LIBRARY, package / LIBRARY)
    (package / RECORD).write_text(json.dumps(record) + "\n")


class BuildNative(Command):
    """Adds the native library to the package: in place for an editable installation.

    A command of its own. An editable installation forgives every error of a build_py that was
    customised (setuptools 84, editable_wheel._safely_run), and so would hide what g++ says.
    """

    user_options: list = []

    def initialize_options(self) -> None:
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        source = self.get_finalized_command("build_py").get_package_dir(PACKAGE)
        build_native(Path(source if self.editable_mode else self._built_package()))

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in has them, also where nothing can be built

    def get_outputs(self) -> list[str]:
        names = (RECORD,) if why_python_only() else (RECORD, LIBRARY)
        return [os.path.join(self._built_package(), name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def _built_package(self) -> str:
        return os.path.join(self.build_lib, PACKAGE)


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class BinaryWheel(bdist_wheel):
    """One platform and every Python: nothing in the library touches Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class NativeDistribution(Distribution):
    """Tells setuptools whether the wheel is bound to a platform: it sees no extension module."""

    def has_ext_modules(self) -> bool:
        return not why_python_only()


# Guarded, so that the tests can read this file. Build front ends run it as __main__.
if __name__ == "__main__":
    setup(
        cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BinaryWheel},
        distclass=NativeDistribution,
    )
